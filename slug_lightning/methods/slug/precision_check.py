"""Whether a choice could be another in another precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from slug_lightning.methods.slug.candidates import pareto, pareto_front
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.gradients import NoLossError
from slug_lightning.objective.metrics import Metric
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import Layer, parameters_of
from slug_lightning.utils.names import some_of

UNIT_ROUNDOFF = {"bf16": 2.0**-8, "16": 2.0**-11, "transformer-engine": 2.0**-8}
"""Unit roundoff of the precisions in which a forward pass may be computed, by how the trainer's name for it begins."""


def rounding(precision: str) -> float:
    """Unit roundoff of a trainer's precision; 0 for 32 and 64 bits, to which the others are compared.

    Example:
        >>> rounding("bf16-mixed"), rounding("16-true"), rounding("32-true")
        (0.00390625, 0.00048828125, 0.0)
    """
    return next((unit for name, unit in UNIT_ROUNDOFF.items() if str(precision).startswith(name)), 0.0)


def usage_error(metrics: Mapping[str, Metric], before: Mapping[str, float], tolerance: float, unit: float) -> float:
    """How far off rounding may put the constraint usage: the error of the values before and after, as a share of tolerance.

    Example:
        >>> usage_error({"acc": Metric("acc", True)}, {"acc": 0.5}, 0.01, 2.0**-8)
        0.390625
    """
    errors = [2 * unit * (abs(before[name]) if metric.higher_is_better else 1.0) for name, metric in metrics.items()]
    return max(errors) / (tolerance or 1.0)


Errors = dict[str, tuple[float, float]]
"""By layer, the relative error of its importance and the error of its alignment."""


def score_errors(objective: Objective, layers: Sequence[Layer], notes: list[str]) -> Errors:
    """Score half a batch in the trainer's precision and in 32 bits; where that fails, a note says so."""
    parameters = parameters_of(layers)

    def scored(exact: bool) -> list[LayerStatistics]:
        forget = {name: g.cpu() for name, g in objective.sample_gradient("forget", parameters, exact).items()}
        retain = objective.sample_gradient("retain", parameters, exact)
        return layer_statistics(layers, forget, retain, objective.processes)

    try:
        return rounding_errors(scored(exact=True), scored(exact=False))
    except Exception as error:
        # What fails in one of several processes must fail in all.
        if objective.processes.world_size > 1 and not isinstance(error, NoLossError):
            raise
        notes.append(f"precision: how much rounding matters is not known ({error})")
        return {}


def rounding_errors(exact: Sequence[LayerStatistics], rounded: Sequence[LayerStatistics]) -> Errors:
    """Compare scores; a layer's error is its own, or the median of all if that is larger, as one sample may be right by luck."""
    before = {one.name: one for one in exact}
    pairs = [(before[one.name], one) for one in rounded if one.name in before]
    importance = {old.name: abs(new.importance / old.importance - 1) for old, new in pairs}
    alignment = {old.name: abs(_alignment(new) - _alignment(old)) for old, new in pairs}
    usual = (median(importance.values()), median(alignment.values())) if pairs else (0.0, 0.0)
    return {layer: (max(importance[layer], usual[0]), max(alignment[layer], usual[1])) for layer in importance}


def _alignment(layer: LayerStatistics) -> float:
    assert layer.alignment is not None  # scores are compared only where there is a front
    return layer.alignment


def close_calls(precision: str, trials: Sequence[Trial], best: Trial | None, error: float) -> list[str]:
    """Note which layers' costs are as good as the same, given the error of the constraint usage (`usage_error`)."""
    # Of those that hold as much of the margin: a smaller step costs less all the same.
    rivals = [t for t in trials if best and t.layer != best.layer and t.feasible and t.margin >= best.margin]
    near = list(
        dict.fromkeys(t.layer for t in rivals if t.constraint_usage - best.constraint_usage < error)  # type: ignore[operator,union-attr]
    )
    if not near:
        return []
    return [f"precision: in {precision}, what an edit of {some_of(near, 3)} would cost is the same as what this one costs"]


def close_scores(precision: str, layers: Sequence[LayerStatistics], errors: Errors, best: Trial | None) -> list[str]:
    """Note which layers might be on the front, or off it, by rounding alone."""
    front = {candidate.layer for candidate in pareto(layers)} if errors else set()
    edge = [one.name for one in layers if one.name in errors and _may_change_sides(one, layers, errors[one.name], front)]
    edge.sort(key=lambda layer: best is None or layer != best.layer)  # the edited one first
    return [f"precision: in {precision}, these may or may not be on the front: {some_of(edge, 3)}"] if edge else []


def _may_change_sides(
    one: LayerStatistics, layers: Sequence[LayerStatistics], error: tuple[float, float], front: set[str]
) -> bool:
    """Whether a layer would be off its front, or on it, if its score were off by its error."""
    others = [(s.importance, _alignment(s)) for s in layers if s.layer.tower == one.layer.tower and s.name != one.name]
    sign = -1 if one.name in front else 1
    moved = one.importance * (1 + sign * error[0]), max(_alignment(one) - sign * error[1], 0.0)
    return pareto_front([moved, *others])[0] != (one.name in front)

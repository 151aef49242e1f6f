"""Whether a choice could be another in another precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from slug_lightning.methods.slug.candidates import Score, pareto_front
from slug_lightning.methods.slug.step_search import Trial
from slug_lightning.objective.metrics import Metric
from slug_lightning.utils.names import some_of

ROUNDING = {"bf16": 2.0**-8, "16": 2.0**-11, "transformer-engine": 2.0**-8}
"""Unit roundoff of the precisions in which a forward pass may be computed, by how the trainer's name for it begins."""


def rounding(precision: str) -> float:
    """Unit roundoff of a trainer's precision; 0 for 32 and 64 bits, to which the others are compared.

    Example:
        >>> rounding("bf16-mixed"), rounding("16-true"), rounding("32-true")
        (0.00390625, 0.00048828125, 0.0)
    """
    return next((unit for name, unit in ROUNDING.items() if str(precision).startswith(name)), 0.0)


def usage_error(metrics: Mapping[str, Metric], before: Mapping[str, float], tolerance: float, unit: float) -> float:
    """How far off rounding may put the damage to what is kept: that of the values before and after, as a share of tolerance.

    Example:
        >>> usage_error({"acc": Metric("acc", True)}, {"acc": 0.5}, 0.01, 2.0**-8)
        0.390625
    """
    errors = [2 * unit * (abs(before[name]) if metric.higher_is_better else 1.0) for name, metric in metrics.items()]
    return max(errors) / (tolerance or 1.0)


def rounding_errors(exact: Sequence[Score], rounded: Sequence[Score]) -> dict[str, tuple[float, float]]:
    """How far off a precision puts each layer's score, as seen on a sample computed both ways.

    Args:
        exact: scores in 32 bits.
        rounded: the same in the trainer's precision.

    Returns:
        By layer the relative error of the importance and the error of the alignment: its own, or the median of all if that
        is larger, as one sample may be right by luck.
    """
    before = {score.layer: score for score in exact}
    pairs = [(before[score.layer], score) for score in rounded if score.layer in before]
    importance = {old.layer: abs(new.importance / old.importance - 1) for old, new in pairs}
    alignment = {old.layer: abs(new.alignment - old.alignment) for old, new in pairs}
    usual = (median(importance.values()), median(alignment.values())) if pairs else (0.0, 0.0)
    return {layer: (max(importance[layer], usual[0]), max(alignment[layer], usual[1])) for layer in importance}


def close_calls(
    precision: str,
    scores: Sequence[Score],
    errors: Mapping[str, tuple[float, float]],
    trials: Sequence[Trial],
    best: Trial | None,
    error: float,
) -> list[str]:
    """Sentences for the report: where another precision might have chosen another layer.

    Args:
        precision: the trainer's name for it.
        scores: of all layers.
        errors: of the scores, as `rounding_errors` gives them.
        trials: of the search.
        best: the chosen one.
        error: of the damage, as `usage_error` gives it.
    """
    notes = []
    rivals = [t for t in trials if best and t.layer != best.layer and t.feasible]
    near = list(dict.fromkeys(t.layer for t in rivals if t.constraint_usage - best.constraint_usage < error))  # type: ignore[operator,union-attr]
    if near:
        notes.append(
            f"precision: in {precision}, what an edit of {some_of(near, 3)} would cost cannot be told from what this one costs"
        )
    edge = [score.layer for score in scores if score.layer in errors and _may_change_sides(score, scores, errors[score.layer])]
    if edge:
        edge.sort(key=lambda layer: best is None or layer != best.layer)  # the edited one first
        notes.append(f"precision: in {precision}, it cannot be told whether these belong to the front: {some_of(edge, 3)}")
    return notes


def _may_change_sides(score: Score, scores: Sequence[Score], error: tuple[float, float]) -> bool:
    """Whether a layer would be off its front, or on it, if its score were off by its error."""
    others = [(s.importance, s.alignment) for s in scores if s.tower == score.tower and s.layer != score.layer]
    sign = -1 if score.on_front else 1
    moved = score.importance * (1 + sign * error[0]), max(score.alignment - sign * error[1], 0.0)
    return pareto_front([moved, *others])[0] != score.on_front

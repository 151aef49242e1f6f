"""Whether a choice could be another in another precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slug_lightning.layers import some_of
from slug_lightning.metrics import Metric
from slug_lightning.pareto import pareto_front
from slug_lightning.scores import Score
from slug_lightning.search import Trial

ROUNDING = {"bf16": 2.0**-8, "16": 2.0**-11, "transformer-engine": 2.0**-8}
"""Unit roundoff of the precisions in which a forward pass may be computed, by how the trainer's name for it begins."""


def rounding(precision: str) -> float:
    """Unit roundoff of a trainer's precision; 0 for 32 and 64 bits, to which the others are compared.

    Example:
        >>> rounding("bf16-mixed"), rounding("16-true"), rounding("32-true")
        (0.00390625, 0.00048828125, 0.0)
    """
    return next((unit for name, unit in ROUNDING.items() if str(precision).startswith(name)), 0.0)


def damage_error(metrics: Mapping[str, Metric], before: Mapping[str, float], tolerance: float, unit: float) -> float:
    """How far off rounding may put the damage to what is kept: that of the values before and after, as a share of tolerance.

    Example:
        >>> damage_error({"acc": Metric("acc", True)}, {"acc": 0.5}, 0.01, 2.0**-8)
        0.390625
    """
    errors = [2 * unit * (abs(before[name]) if metric.higher_is_better else 1.0) for name, metric in metrics.items()]
    return max(errors) / (tolerance or 1.0)


def close_calls(precision: str, scores: Sequence[Score], trials: Sequence[Trial], best: Trial | None, error: float) -> list[str]:
    """Sentences for the report: layers that another precision might have chosen, or let take part.

    Args:
        precision: the trainer's name for it.
        scores: of all layers.
        trials: of the search.
        best: the chosen one.
        error: of the damage, as `damage_error` gives it.
    """
    unit = rounding(precision)
    if not unit:
        return []
    notes = []
    rivals = [t for t in trials if best and t.layer != best.layer and t.feasible]
    near = [t.layer for t in rivals if t.damage - best.damage <= error]  # type: ignore[operator,union-attr]
    if near:
        notes.append(
            f"precision: in {precision}, what an edit of {some_of(near)} would cost cannot be told from what this one costs"
        )
    edge = [score.layer for score in scores if not score.on_front and _reaches_front(score, scores, unit)]
    if edge:
        notes.append(f"precision: in {precision}, it cannot be told whether {some_of(edge, 3)} belong to the front, too")
    return notes


def _reaches_front(score: Score, scores: Sequence[Score], unit: float) -> bool:
    """Whether a layer would be on its front if rounding had been to its disadvantage, and to the others' advantage."""
    others = [s for s in scores if s.tower == score.tower and s.on_front]
    better = score.importance * (1 + 2 * unit), max(score.alignment - 2 * unit, 0.0)
    return pareto_front([better, *((s.importance, s.alignment) for s in others)])[0]

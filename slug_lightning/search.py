"""The smallest step that forgets, and the layer where it harms least: pure numbers, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

START = 0.1
"""First relative step λ‖g_f‖/‖θ‖ (SLUG, arXiv 2407.11867)."""
FINE = 0.02
"""Bisection ends when the bracket is this narrow, relative to its upper end."""


@dataclass(frozen=True)
class Trial:
    """One evaluation of one step along one layer.

    Attributes:
        layer: name of the layer.
        step: λ, the factor of the forget gradient.
        relative_step: λ‖g_f‖/‖θ‖.
        forgotten: whether the forget target is met.
        damage: the worst retain metric's loss as a share of its tolerance: at most 1 is within bounds, below 0 is a
            gain; None where it was not measured, because the step does not forget.
        forget: value of the forget metric.
        retain: values of the retain metrics by name, None where not measured.
    """

    layer: str
    step: float
    relative_step: float
    forgotten: bool
    damage: float | None
    forget: float
    retain: dict[str, float] | None

    @property
    def feasible(self) -> bool:
        """Whether both bounds hold."""
        return self.forgotten and self.damage is not None and self.damage <= 1


def search_step(evaluate: Callable[[float], Trial], max_evaluations: int = 10) -> list[Trial]:
    """Find the smallest relative step that forgets: double from 0.1 until it does, then bisect.

    Args:
        evaluate: tries a relative step.
        max_evaluations: how often it may be called, at least 1.

    Returns:
        Every trial, in order. The last upper end of the bracket is the smallest step seen to forget
        (SLUG, arXiv 2407.11867).

    Example:
        >>> def evaluate(r):
        ...     return Trial("w", r, r, forgotten=r >= 0.33, damage=r, forget=1 - r, retain=None)
        >>> [round(trial.relative_step, 3) for trial in search_step(evaluate, 7)]
        [0.1, 0.2, 0.4, 0.3, 0.35, 0.325, 0.338]
    """
    low, high, step = 0.0, float("inf"), START
    trials: list[Trial] = []
    while len(trials) < max_evaluations and (high == float("inf") or high - low > FINE * high):
        trials.append(evaluate(step))
        if trials[-1].forgotten:
            high = step
        else:
            low = step
        step = 2 * low if high == float("inf") else (low + high) / 2
    return trials


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Choose among the feasible trials: the least damage to what is kept, ties to the smaller relative step.

    Example:
        >>> a = Trial("a", 1.0, 0.2, True, 0.5, 0.0, {})
        >>> b = Trial("b", 1.0, 0.1, True, 0.5, 0.0, {})
        >>> c = Trial("c", 1.0, 0.1, True, 1.5, 0.0, {})
        >>> best_trial([a, b, c]).layer, best_trial([c])
        ('b', None)
    """
    feasible = [trial for trial in trials if trial.feasible]
    return min(feasible, key=lambda t: (t.damage, t.relative_step), default=None)

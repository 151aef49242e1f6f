"""The smallest step that forgets, and the layer where it harms least: pure numbers, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

START = 0.1
"""First relative step λ‖g_f‖/‖θ‖ (SLUG, arXiv 2407.11867)."""
FINE = 0.05
"""The search ends when the bracket is this narrow, relative to its upper end (but for rounding),"""
ROUNDING = 1e-6
OVERSHOOT = 0.05
"""or when the metric is no further beyond the target than this share of the whole way."""


@dataclass(frozen=True)
class Trial:
    """One evaluation of one step along one layer.

    Attributes:
        layer: name of the layer.
        step: λ, the factor of the forget gradient.
        relative_step: λ‖g_f‖/‖θ‖.
        forgotten: whether the forget target is met.
        constraint_usage: the worst retain metric's loss as a share of its tolerance: at most 1 is within bounds, below 0 is a
            gain; None where it was not measured.
        forget: value of the forget metric.
        retain: values of the retain metrics by name, None where not measured.
        dropped: whether the measurement of what is kept was broken off, since the layer could no longer be the best.
    """

    layer: str
    step: float
    relative_step: float
    forgotten: bool
    constraint_usage: float | None
    forget: float
    retain: dict[str, float] | None
    dropped: bool = False

    @property
    def feasible(self) -> bool:
        """Whether both bounds hold."""
        return self.forgotten and self.constraint_usage is not None and self.constraint_usage <= 1


def search_step(
    evaluate: Callable[[float], Trial], share: Callable[[float], float], max_evaluations: int = 10, start: float = START
) -> list[Trial]:
    """Find a step that just forgets: bracket it, then narrow the bracket by interpolation.

    SLUG (arXiv 2407.11867) doubles from 0.1 and bisects. The metric's value tells more than whether the target is met:
    the next step is where a power law through both ends of the bracket meets the target; if that did not halve the
    bracket, it is the middle.

    Args:
        evaluate: tries a relative step.
        share: of the way from the metric's value before to the target that a value has gone: 0 is before, 1 is the
            target, infinity a value of which nobody can tell how far beyond it is.
        max_evaluations: how often `evaluate` may be called, at least 1.
        start: the first relative step.

    Returns:
        Every trial, in order. The search ends at a step that forgets and goes at most 5 % of the way too far, or at most
        5 % further than one that does not forget.

    Example:
        >>> def evaluate(r):
        ...     return Trial("w", r, r, forgotten=r**2 >= 0.3, constraint_usage=None, forget=1 - r**2, retain=None)
        >>> [round(trial.relative_step, 3) for trial in search_step(evaluate, lambda value: (1 - value) / 0.3)]
        [0.1, 0.2, 0.4, 0.8, 0.555]
    """
    low, high, step = (0.0, 0.0), None, start
    trials: list[Trial] = []
    halve = False
    while len(trials) < max_evaluations:
        trials.append(evaluate(step))
        point = step, share(trials[-1].forget)
        width = high[0] - low[0] if high else math.inf
        if trials[-1].forgotten:
            high = point
        else:
            low = point
        if high is None:
            # At most doubled, as the step may do anything beyond; less where the target is near.
            step *= min(max(1.1 / point[1], 1.2), 2.0) if point[1] > 0 else 2.0
            continue
        if high[1] <= 1 + OVERSHOOT or high[0] - low[0] <= FINE * (1 + ROUNDING) * high[0]:
            break
        halve = not halve and high[0] - low[0] > width / 2
        step = (low[0] + high[0]) / 2 if halve else _interpolated(low, high)
    return trials


def _interpolated(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Where the power law through two (step, share) points is just beyond the target, well within the bracket."""
    middle = (low[0] + high[0]) / 2
    aim = 1 + OVERSHOOT / 2
    margin = (high[0] - low[0]) / 10
    if not math.isfinite(high[1]):
        guess = low[0] * aim / low[1] if low[1] > 0 else middle
        return guess if low[0] + margin < guess < high[0] - margin else middle
    power = math.log(high[1] / low[1]) / math.log(high[0] / low[0]) if min(low) > 0 else 1.5
    guess = high[0] * (aim / high[1]) ** (1 / power) if power > 0 else middle
    return min(max(guess, low[0] + margin), high[0] - margin)


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
    return min(feasible, key=lambda t: (t.constraint_usage, t.relative_step), default=None)

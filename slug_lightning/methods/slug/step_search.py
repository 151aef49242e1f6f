"""The smallest step that forgets: pure numbers, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from slug_lightning.methods.trial import Trial

START = 0.1
"""First relative step λ‖g_f‖/‖θ‖ (SLUG, arXiv 2407.11867)."""
FINE = 0.05
"""The search ends when the bracket is this narrow, relative to its upper end (but for rounding),"""
SLACK = 1e-6
OVERSHOOT = 0.05
"""or when the metric is no further beyond the target than this share of the whole way."""


class StepSearch(Protocol):
    """A rule that says which distances along one layer are tried. It sees numbers only, no model.

    Where ways compete, `evaluate` breaks off a search once the step is roughly known; the search of the one that wins is run
    again from its beginning, and gets the trials that are there. So let an exception of `evaluate` pass, and try the same
    distances whenever the trials are the same.

    Example:
        >>> def doubling(evaluate, share, max_evaluations, start):
        ...     trials = [evaluate(start)]
        ...     while not trials[-1].forgotten and len(trials) < max_evaluations:
        ...         trials.append(evaluate(2 * trials[-1].relative_step))
        ...     return trials
    """

    def __call__(
        self, evaluate: Callable[[float], Trial], share: Callable[[Trial], float], max_evaluations: int, start: float
    ) -> list[Trial]:
        """Find a small distance that forgets.

        Args:
            evaluate: tries a distance, relative to the weight's norm.
            share: of the way from the forget metric's value before to the target that a trial has gone: 0 is before, 1 is
                the target, infinity a value of which nobody can tell how far beyond it is. A trial that has gone further than
                1 and isn't forgotten went too far: its target has two sides.
            max_evaluations: how often `evaluate` may be called, at least 1.
            start: the first distance.

        Returns:
            Every trial, in order.
        """


def interpolation(
    evaluate: Callable[[float], Trial], share: Callable[[Trial], float], max_evaluations: int = 10, start: float = START
) -> list[Trial]:
    """Find a step that just forgets: bracket it, then narrow the bracket by interpolation.

    SLUG (arXiv 2407.11867) doubles from 0.1 and bisects. The metric's value tells more than whether the target is met:
    the next step is where a power law through both ends of the bracket meets the target; if that did not halve the
    bracket, it is the middle.

    Args: as of `StepSearch`.

    Returns:
        Every trial, in order. The search ends at a step that forgets and goes at most 5 % of the way too far, or at most
        5 % further than one that does not forget.

    Example:
        >>> def evaluate(r):
        ...     return Trial("w", r, r, forgotten=r**2 >= 0.3, constraint_usage=None, forget=1 - r**2, retain=None)
        >>> [round(trial.relative_step, 3) for trial in interpolation(evaluate, lambda trial: (1 - trial.forget) / 0.3)]
        [0.1, 0.2, 0.4, 0.8, 0.555]
    """
    low, high, step = (0.0, 0.0), None, start
    trials: list[Trial] = []
    halve = False
    while len(trials) < max_evaluations:
        trials.append(evaluate(step))
        point = step, share(trials[-1])
        width = high[0] - low[0] if high else math.inf
        if trials[-1].forgotten or point[1] > 1:
            high = point
        else:
            low = point
        if high is None:
            # At most doubled, as the step may do anything beyond; less where the target is near.
            step *= min(max(1.1 / point[1], 1.2), 2.0) if point[1] > 0 else 2.0
            continue
        if high[1] <= 1 + OVERSHOOT or high[0] - low[0] <= FINE * (1 + SLACK) * high[0]:
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

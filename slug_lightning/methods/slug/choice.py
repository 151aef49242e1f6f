"""Which trial wins, and whether more layers must be tried."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

from slug_lightning.methods.trial import Trial
from slug_lightning.objective.metrics import NORMAL_95

ROOM = 1.0
"""Constraint usage beyond the least so far at which a measurement is broken off: intervals are not as wide."""


class Decision(NamedTuple):
    """What a choice says.

    Attributes:
        trial: the one whose step is taken, or None.
        search_more: whether the next round of candidates shall be searched, if there is one.
    """

    trial: Optional[Trial]
    search_more: bool


class Choice(ABC):
    """A rule that picks a trial.

    Example:
        >>> class SmallestStep(Choice):
        ...     def __call__(self, trials):
        ...         best = min((t for t in trials if t.feasible), key=lambda t: t.relative_step, default=None)
        ...         return Decision(best, search_more=best is None)
    """

    @abstractmethod
    def __call__(self, trials: Sequence[Trial]) -> Decision:
        """Choose among all trials so far, also those that aren't feasible."""

    def usage_limit(self, trials: Iterable[Trial]) -> float:
        """Constraint usage above which a further trial can no longer win, so that its measurement may be broken off."""
        return math.inf


class LeastUsage(Choice):
    """Take the feasible trial that costs the retain set least, and of equals the smaller relative step.

    Example:
        >>> a = Trial("a", 1.0, 0.2, True, 0.5, 0.0, {})
        >>> b = Trial("b", 1.0, 0.1, True, 0.5, 0.0, {})
        >>> c = Trial("c", 1.0, 0.1, True, 1.5, 0.0, {})
        >>> LeastUsage()([a, b, c]).trial.layer, LeastUsage()([c])
        ('b', Decision(trial=None, search_more=True))
    """

    def __call__(self, trials: Sequence[Trial]) -> Decision:
        """Choose."""
        feasible = [trial for trial in trials if trial.feasible]
        best = min(feasible, key=lambda t: (t.constraint_usage, t.relative_step), default=None)
        return Decision(best, search_more=best is None)

    def usage_limit(self, trials: Iterable[Trial]) -> float:
        """The least usage so far."""
        return min((t.constraint_usage for t in trials if t.constraint_usage is not None), default=math.inf)


class LeastDamage(Choice):
    """Take the feasible trial with the least measured damage to the retain set, where differences within noise don't count.

    Trials that on no retain metric are worse than the least damage by more than the 95 % interval of the paired difference
    (batch by batch) are ties. Of these, the one with the smallest loss on retain data wins, where the module logs one
    (`…nll`), then the smaller relative step.

    Example:
        >>> from slug_lightning.methods.trial import RetainDetails
        >>> def trial(layer, usages, loss):
        ...     batches = {number: (usage, 32) for number, usage in enumerate(usages)}
        ...     return Trial(layer, 1.0, 0.1, True, sum(usages) / 3, 0.0, {}, details=RetainDetails({"acc": batches}, loss))
        >>> noisy = [trial("a", [0.1, 0.0, 0.2], loss=2.0), trial("b", [0.0, 0.3, 0.1], loss=1.0)]
        >>> LeastDamage()(noisy).trial.layer
        'b'
    """

    def __call__(self, trials: Sequence[Trial]) -> Decision:
        """Choose."""
        feasible = [trial for trial in trials if trial.feasible]
        least = LeastUsage()(feasible).trial
        if least is None:
            return Decision(None, search_more=True)
        ties = [trial for trial in feasible if trial is least or _is_tie(trial, least)]
        losses = [trial.details.loss if trial.details else None for trial in ties]
        known = all(loss is not None for loss in losses)
        rank = {id(trial): (loss if known else 0.0, trial.relative_step) for trial, loss in zip(ties, losses, strict=True)}
        return Decision(min(ties, key=lambda trial: rank[id(trial)]), search_more=False)

    def usage_limit(self, trials: Iterable[Trial]) -> float:
        """The least usage so far, and room for ties."""
        return LeastUsage().usage_limit(trials) + ROOM


def _is_tie(trial: Trial, least: Trial) -> bool:
    """Whether a trial is no worse than the least damage on any retain metric, as far as the batches can tell."""
    if trial.details is None or least.details is None:
        return trial.constraint_usage == least.constraint_usage
    return all(
        name in least.details.usage and _excess(usage, least.details.usage[name]) <= 0
        for name, usage in trial.details.usage.items()
    )


def _excess(usage: Mapping[int, tuple[float, int]], other: Mapping[int, tuple[float, int]]) -> float:
    """Lower end of the 95 % interval of the mean paired difference, each batch weighing as many samples as it has."""
    pairs = [(usage[number][0] - other[number][0], usage[number][1]) for number in usage.keys() & other.keys()]
    total = sum(weight for _, weight in pairs)
    if not total:
        return 0.0
    mean = math.fsum(difference * weight for difference, weight in pairs) / total
    if len(pairs) < 2:
        return mean
    # Of a weighted mean of independent batches, with the correction for few of them.
    square = math.fsum((weight / total * (difference - mean)) ** 2 for difference, weight in pairs)
    return mean - NORMAL_95 * math.sqrt(square * len(pairs) / (len(pairs) - 1))

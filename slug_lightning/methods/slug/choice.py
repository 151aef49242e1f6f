"""Which trial wins, and whether more layers must be tried."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

from slug_lightning.methods.base import Trial


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

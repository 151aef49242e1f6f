"""Where forget metrics must get, and how much of the way there a value has gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.metrics import NORMAL_95, Goal, Metric
from slug_lightning.objective.objective import Objective, metric_names
from slug_lightning.utils.loaders import Batches
from slug_lightning.utils.rows import take

AS_HOLDOUT = "as_holdout"
"""A target: to be like samples that the model was never trained on."""
HOLDOUT = 300
"""Holdout samples below which an interval is too wide to tell."""


@dataclass(frozen=True)
class Target:
    """The target of one forget metric.

    Attributes:
        metric: which.
        goal: value at which it counts as forgotten, or the two ends of an interval that it must lie in.
        reason: where the goal came from.
        before: the metric on the validation split, unedited.

    Example:
        >>> accuracy = Metric("accuracy", higher_is_better=True)
        >>> Target(accuracy, 0.2, "given", before=1.0).share(0.6), Target(accuracy, (0.7, 0.9), "given", before=1.0).share(0.8)
        (0.5, 2.0)
    """

    metric: Metric
    goal: Goal
    reason: str
    before: float

    @property
    def was_met(self) -> bool:
        """Whether the metric meets it unedited; then it must only stay so."""
        return self.is_met(self.before)

    @property
    def has_two_sides(self) -> bool:
        """Whether the goal is an interval."""
        return not isinstance(self.goal, (int, float))

    def is_met(self, value: float) -> bool:
        """Whether a value counts as forgotten."""
        return math.isfinite(value) and self.metric.reaches(value, self.goal)

    def share(self, value: float) -> float:
        """How much of the way from before to the goal a value has gone: 0 is before, 1 is the goal.

        Infinite where that can't be known: the model is broken; no answer is right any more, as after any larger step; the
        value lies beyond an interval; or nothing had to change.
        """
        at_the_end = self.metric.higher_is_better and isinstance(self.goal, (int, float)) and value <= 0 <= self.goal
        if not math.isfinite(value) or at_the_end or self.was_met or self.is_beyond(value):
            return math.inf
        return (value - self.before) / (self._edges[0] - self.before)

    def is_beyond(self, value: float) -> bool:
        """Whether a value went too far: out of what was met unedited, or through an interval and out on the far side."""
        if self.was_met or self.is_met(value):
            return math.isfinite(value) and not self.is_met(value)
        if isinstance(self.goal, (int, float)):
            return False
        far = self._edges[1]
        return (value < far) == (far < self.before)

    @property
    def _edges(self) -> list[float]:
        """The ends of an interval, the nearer one first; or the goal."""
        ends = [self.goal] if isinstance(self.goal, (int, float)) else self.goal
        return sorted(ends, key=lambda end: abs(end - self.before))

    @property
    def words(self) -> str:
        """The goal, for messages."""
        return f"{self.goal:.4g}" if isinstance(self.goal, (int, float)) else "{:.4g} to {:.4g}".format(*self.goal)


def settle_targets(
    objective: Objective, values: Mapping[str, float], given: Goal | Mapping[str, Goal] | None, said: str = "given"
) -> list[Target]:
    """Make the target of each forget metric, from what was given, else from the module, else by default; the same on all ranks.

    Args:
        objective: whose metrics.
        values: the forget metrics unedited, by name.
        given: one goal for all, or a dict that may leave metrics out.
        said: where these came from.

    Raises:
        UnlearnError: if a goal is given for a metric that isn't a forget metric.
    """
    if isinstance(given, Mapping) and (unknown := sorted(given.keys() - values.keys())):
        raise UnlearnError(f"forget_target: {unknown[0]!r} is not among the forget metrics, {', '.join(values)}")
    hooks = objective.hooks
    own_metrics = metric_names(hooks.forget_metric)
    targets = []
    for name, before in values.items():
        metric = objective.metrics[name]
        goal, reason = _of(given, name), said
        if goal is None and (hooks.forget_metric is None or name in own_metrics):  # the request may name another
            goal, reason = _of(hooks.forget_target, name), "the module's own"
        if goal is None:
            goal, reason = metric.default_target(before)
        goal, reason = objective.processes.broadcast("target", (goal, reason))
        targets.append(Target(metric, goal, reason, before))
    return targets


def _of(goals: Goal | Mapping[str, Goal] | None, name: str) -> Goal | None:
    return goals.get(name) if isinstance(goals, Mapping) else goals


class Singles:
    """The samples of a loader, each as a batch of its own."""

    def __init__(self, loader: Batches, samples_of: Callable[[Any], int]) -> None:
        self.loader = loader
        self.samples_of = samples_of

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            count = self.samples_of(batch)
            yield from (take(batch, [row], count) for row in range(count))


def holdout_goals(objective: Objective, holdout: Batches) -> dict[str, Goal]:
    """The 95 % interval of each forget metric's mean on samples that the model was never trained on.

    Args:
        objective: whose forget metrics, at the unedited weights, where they were just measured.
        holdout: batches of at least 300 samples.

    Raises:
        UnlearnError: if there are fewer, which cannot tell, or if a metric is no mean over samples.
    """
    forgotten = objective.complete["forget", "val"].samples_of(objective.names["forget"][0])
    objective.about({"val": Singles(holdout, objective.hooks.samples)}).measured("forget", "val")
    reader = objective.complete["forget", "val"]
    goals: dict[str, Goal] = {}
    for name in objective.names["forget"]:
        values, weights = reader.of(name)
        count, total = len(values), sum(weights)
        if not count:
            raise UnlearnError(f"forget_target: 'as_holdout' needs means over samples, and {name!r} is none; give numbers")
        if count < HOLDOUT:
            raise UnlearnError(
                f"forget_target: {count} holdout samples cannot tell what a sample that was never seen is like; give at least "
                f"{HOLDOUT}, or a number"
            )
        shares = [weight / total for weight in weights]  # those of samples, unless the module says otherwise
        mean = math.fsum(value * share for value, share in zip(values, shares, strict=True))
        square = math.fsum((share * (value - mean)) ** 2 for value, share in zip(values, shares, strict=True))
        half = NORMAL_95 * math.sqrt(square * count / (count - 1))
        goals[name] = low, high = mean - half, mean + half
        # Else no share of so many samples lies within.
        if set(values) <= {0.0, 1.0} and math.ceil(low * forgotten) > high * forgotten:
            raise UnlearnError(
                f"forget_target: no share of {forgotten} forget samples lies within {low:.3g} to {high:.3g}, the "
                f"95 % interval of {name!r} on the holdout samples; forget more samples at once, or give a number"
            )
    return goals


def share_of(targets: Sequence[Target], values: Mapping[str, float]) -> float:
    """How much of the way is gone: that of the metric with the least, or infinite where one has gone beyond its interval."""
    pairs = [(target, values[target.metric.name]) for target in targets]
    if any(target.is_beyond(value) for target, value in pairs):
        return math.inf
    return min(target.share(value) for target, value in pairs)

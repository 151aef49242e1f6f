"""What lies near a concept: retain data that pay first, measured by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slug_lightning.objective.metrics import NORMAL_95, Metric, constraint_usage, refuse_infinite
from slug_lightning.objective.objective import Objective
from slug_lightning.utils.loaders import NearBatches

TOLERANCE = 0.02
"""How much a near metric may lose where nothing else is given, or half the 95 % interval of the difference, if that is more,
where this share of the answers has changed."""
ENOUGH = 100
"""Samples below which the report says what so few can tell."""


@dataclass
class Near:
    """Near data of one concept, and how they fare unedited.

    Attributes:
        objective: measures them, as kind "near".
        data: their batches, and what they are.
        binds: whether their bound decides; else they are only shown.
        given: the tolerance that was asked for, or None.
        least: the retain tolerance: by default what is near may lose as much as the rest.
        before: their metrics on the validation split.
        counts: by split, how many samples each metric was measured on; a metric object isn't listed.
    """

    objective: Objective
    data: NearBatches
    binds: bool
    given: float | None
    least: float
    before: dict[str, float]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def measured(cls, objective: Objective, data: NearBatches, binds: bool, given: float | None, least: float) -> Near | None:
        """Measure near data on the validation split, unedited; None if they have none of the retain metrics."""
        before = objective.measured("near", "val")
        if not before:
            return None
        refuse_infinite("near", before)
        objective.names = {**objective.names, "near": list(before)}
        near = cls(objective, data, binds, given, least, before)
        near.count("val")
        return near

    def count(self, split: str) -> None:
        """Remember how many samples the pass over a split had that was just made."""
        reader = self.objective.complete["near", split]
        self.counts[split] = {name: reader.samples_of(name) for name in self.metrics}

    @property
    def samples(self) -> dict[str, int]:
        """By split, how many samples there are, as far as is known."""
        return {split: max(counts.values()) for split, counts in self.counts.items()}

    @property
    def tolerance(self) -> float:
        """How much a near metric may lose: what was given, else as much as others, and what so few samples can tell."""
        return max(near_tolerance(self.samples.get("val", 0)), self.least) if self.given is None else self.given

    def usage(self, near: Mapping[str, float], before: Mapping[str, float] | None = None) -> float:
        """The largest loss of a near metric, as a share of its tolerance."""
        return constraint_usage(self.metrics, self.before if before is None else before, near, self.tolerance)

    @property
    def metrics(self) -> dict[str, Metric]:
        """Those of the retain set."""
        return self.objective.metrics_of("near")

    def to_dict(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "what": self.data.what,
            "concepts": self.data.concepts,
            "samples": self.samples,
            "tolerance": self.tolerance,
            "binds": self.binds,
        }

    def note(self, concept: str) -> str:
        """A sentence for the report."""
        told = f"near {concept}: {self.data.what}"
        count = self.samples.get("val", 0)
        if count and count < ENOUGH:
            told += (
                f"; {count} samples in the search tell a loss of {near_tolerance(count):.1%} or more only, give at least {ENOUGH}"
            )
        return told if self.binds else f"{told}; shown, and not a bound"


def near_tolerance(samples: int) -> float:
    """The default tolerance: 0.02, or half the 95 % interval of a paired difference where 2 % of the answers have changed.

    Args:
        samples: how many are asked in the search.

    Example:
        >>> round(near_tolerance(400), 4), round(near_tolerance(50), 4)
        (0.02, 0.0392)
    """
    return max(TOLERANCE, NORMAL_95 * math.sqrt(TOLERANCE / samples)) if samples else TOLERANCE


def pooled(parts: Sequence[tuple[Mapping[str, float], Mapping[str, int]]]) -> dict[str, float]:
    """Means over the union of sets, from the mean and the number of samples of each; without numbers, those of the first set.

    Example:
        >>> pooled([({"accuracy": 0.9}, {"accuracy": 300}), ({"accuracy": 0.5}, {"accuracy": 100})])
        {'accuracy': 0.8}
    """
    if len(parts) == 1:
        return dict(parts[0][0])  # to the last bit
    found = {}
    for name, value in parts[0][0].items():
        known = [(values[name], counts.get(name, 0)) for values, counts in parts if name in values]
        total = sum(count for _, count in known) if known[0][1] else 0
        found[name] = math.fsum(mean * count for mean, count in known) / total if total else value
    return found


def combined_usage(
    objective: Objective,
    tolerance: float,
    split: str,
    retain: tuple[Mapping[str, float], Mapping[str, float]],
    near: Mapping[str, tuple[Near, Mapping[str, float], Mapping[str, float]]],
) -> float:
    """The largest share of a tolerance that is used: by the union of retain and near data, or by near data alone.

    Args:
        objective: that measured the retain set, unedited.
        tolerance: of the retain metrics.
        split: of all values.
        retain: the retain metrics before and after; of the latter some may be missing.
        near: by concept, its near data with their metrics before and after.
    """
    metrics = {name: metric for name, metric in objective.metrics_of("retain").items() if name in retain[1]}
    reader = objective.complete.get(("retain", split))
    counts = {name: reader.samples_of(name) if reader else 0 for name in metrics}
    apart = {id(one.data): (one, (earlier, now)) for one, earlier, now in near.values() if not one.data.is_part}  # each set once
    before, after = (
        pooled(
            [
                ({name: retain[i][name] for name in metrics}, counts),
                *((values[i], one.counts[split]) for one, values in apart.values()),
            ]
        )
        for i in (0, 1)
    )
    usages = [one.usage(now, earlier) for one, earlier, now in near.values()]
    return max([constraint_usage(metrics, before, after, tolerance) if metrics else -math.inf, *usages])

"""What a report must say of its own limits: too few samples to tell, and tensors that are frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from slug_lightning.methods.concept import Concept
from slug_lightning.methods.near import ENOUGH, near_tolerance
from slug_lightning.objective.metrics import NORMAL_95, Metric
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.tensors.layers import Layer, plain_parameters

MOSTLY = 0.5
"""Share of the matrices that are frozen from which on the report says so."""


def upper_end(share: float, samples: int) -> float:
    """The upper end of the 95 % interval of a share that was seen in so many samples (Wilson, 1927).

    Example:
        >>> round(upper_end(0.0, 10), 2), round(upper_end(0.1, 100), 2)
        (0.28, 0.17)
    """
    square = NORMAL_95**2
    spread = NORMAL_95 * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    return (share + square / (2 * samples) + spread) / (1 + square / samples)


def few_samples(concepts: Sequence[Concept], retain: Objective, tolerance: float) -> list[str]:
    """Say what the search could tell where it had fewer than 100 samples, of metrics that are shares of right answers."""
    notes = []
    for concept in concepts:
        for target in concept.targets:
            name, goal = target.metric.name, target.goal
            count = _counted(concept.objective, "forget", name)
            if (
                0 < count < ENOUGH
                and isinstance(goal, (int, float))
                and _is_share(target.metric, target.before)
                and 0 <= goal < 1
            ):
                notes.append(
                    f"forget {concept.name}: of {count} samples in the search, a {name} of {goal:.3g} may be one of up to "
                    f"{upper_end(goal, count):.2f} (95 %); give at least {ENOUGH}"
                )
    for name, metric in retain.metrics_of("retain").items():
        count = _counted(retain, "retain", name)
        if 0 < count < ENOUGH and _is_share(metric) and (tells := near_tolerance(count)) > tolerance:
            notes.append(f"retain: {count} samples in the search tell a loss of {name} of {tells:.1%} or more only; give more")
    return notes


def frozen(module: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Say how little may be edited where most matrices and kernels are frozen."""
    matrices = {name: p for name, p in plain_parameters(module).items() if p.ndim >= 2 and p.is_floating_point()}
    held = [name for name, p in matrices.items() if not p.requires_grad]
    open_to_edits = sum(len(layer.parameters) for layer in layers)
    if not held or len(held) < MOSTLY * len(matrices):
        return []
    return [
        f"layers: {len(held)} of {len(matrices)} matrices and kernels are frozen; {open_to_edits} may be edited (layers=… names "
        "others)"
    ]


def _counted(objective: Objective, kind: Kind, name: str) -> int:
    """Samples that a metric was the mean of in the search; 0 if it is none, or was not measured whole."""
    reader = objective.complete.get((kind, "val"))
    return reader.samples_of(name) if reader is not None else 0


def _is_share(metric: Metric, value: float = 0.0) -> bool:
    return metric.higher_is_better and value <= 1

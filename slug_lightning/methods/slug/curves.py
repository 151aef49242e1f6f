"""The points that the search may try along one layer: a straight line, or a path that turns."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple, Optional, Protocol

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.patches.temporary import EditStep


class Tangent(NamedTuple):
    """A direction at some point.

    Attributes:
        direction: by tensor name; of a sharded tensor this process's part.
        norm: its length, over all tensors and processes.
    """

    direction: Mapping[str, Tensor]
    norm: float


class TangentAt(Protocol):
    """Computes the direction where a layer stands."""

    def __call__(self, at: Optional[EditStep] = None) -> Tangent:
        """Return the direction at W, or with an edit of this layer at W + Δ: another gradient pass; collective."""


class Point(Protocol):
    """Gives the edits along one layer; a path asks for further gradients as it goes."""

    def __call__(self, distance: float, straight_after: float = inf) -> EditStep:
        """Return the edit at a distance.

        Args:
            distance: length of the way, relative to ‖W‖.
            straight_after: from this distance on a path goes straight, without another gradient, as for a margin.

        The same arguments must give the same edit, as it is asked for again when it is chosen.
        """


class Curve(Protocol):
    """A rule that makes the points along one layer from its tangents.

    Example:
        >>> def half_as_far(layer, tangent_at):
        ...     straight = line(layer, tangent_at)
        ...     return lambda distance, straight_after=inf: straight(distance / 2)
    """

    def __call__(self, layer: LayerStatistics, tangent_at: TangentAt) -> Point:
        """Return the function that gives the points."""


def line(layer: LayerStatistics, tangent_at: TangentAt) -> Point:
    """Go straight along the direction at W (SLUG, arXiv 2407.11867)."""
    tangent = tangent_at()

    def point(distance: float, straight_after: float = inf) -> EditStep:
        return EditStep(layer.layer, tangent.direction, distance * layer.weight_norm / tangent.norm)

    return point

"""The points that the search may try along one layer: a straight line, or a path that turns."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple, Optional, Protocol

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.patches.temporary import EditStep

FIRST_BEND = 0.05
"""Where a path takes its second gradient, relative to ‖W‖; each further segment is as long as the way so far."""
PLATEAU = 2
"""A path ends where the forget loss has not risen over so many segments."""


class CurveEnd(Exception):
    """A curve leads no further; its message says why."""


class Tangent(NamedTuple):
    """A direction at some point.

    Attributes:
        direction: by tensor name; of a sharded tensor this process's part.
        norm: its length, over all tensors and processes.
        loss: the mean forget loss at that point, if the gradient pass has told.
        slope: by how much the forget loss rises along it, for a step of length 1; None if unknown.
        reversed: whether the rule that made it led downhill.
    """

    direction: Mapping[str, Tensor]
    norm: float
    loss: Optional[float] = None
    slope: Optional[float] = None
    reversed: bool = False


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

        Raises:
            CurveEnd: if it is of no use to go on.
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


class _Knot(NamedTuple):
    """Where a path turns: how far along it lies, the change so far, the direction from there, the forget loss there."""

    distance: float
    change: Mapping[str, Tensor]
    tangent: Tangent


def path(layer: LayerStatistics, tangent_at: TangentAt) -> Point:
    """Follow the forget gradient: take a new one after 0.05 ‖W‖, and then whenever the way has doubled.

    Far from W the gradient taken there no longer points uphill. Each new one is a pass over the forget set alone. The
    path ends on a plateau, where the forget loss has not risen over two segments.
    """
    first = tangent_at()
    knots = [_Knot(0.0, {name: d.new_zeros(d.shape) for name, d in first.direction.items()}, first)]

    def change_at(distance: float, knot: _Knot) -> dict[str, Tensor]:
        scale = (distance - knot.distance) * layer.weight_norm / knot.tangent.norm
        return {name: knot.change[name] + scale * d for name, d in knot.tangent.direction.items()}

    def point(distance: float, straight_after: float = inf) -> EditStep:
        turning = min(distance, straight_after)
        while (bend := 2 * knots[-1].distance or FIRST_BEND) < turning:
            losses = [knot.tangent.loss for knot in knots[-PLATEAU - 1 :] if knot.tangent.loss is not None]
            if len(losses) > PLATEAU and max(losses[1:]) <= losses[0]:
                raise CurveEnd(f"plateau: the forget loss has not risen beyond {losses[0]:.4g} since {knots[-3].distance:.3g}")
            change = change_at(bend, knots[-1])
            knots.append(_Knot(bend, change, tangent_at(EditStep(layer.layer, change, 1.0))))
        knot = next(knot for knot in reversed(knots) if knot.distance < turning or knot is knots[0])
        return EditStep(layer.layer, change_at(distance, knot), 1.0)

    return point

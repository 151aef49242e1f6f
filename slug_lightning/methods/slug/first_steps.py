"""Ways to edit layers, and where along each of them to look first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from slug_lightning.methods.slug.curves import CurveEnd, Point
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.methods.slug.step_search import START
from slug_lightning.methods.targets import Target
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.objective import LOSS
from slug_lightning.tensors.layers import Layer

SHORTER = 0.8
"""Where a path is tried first, as a share of the step that was enough along the line."""


class Way(NamedTuple):
    """One way to edit a layer: along a direction, on a curve.

    Attributes:
        layer: which.
        direction: by name.
        curve: by name.
        point: gives the edits.
        slope: by how much the forget loss rises at first order, for a step as long as the weights; not above 0 if unknown.
    """

    layer: LayerStatistics
    direction: str
    curve: str
    point: Point
    slope: Callable[[], float] = lambda: 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What its trials are found by."""
        return self.layer.name, self.direction, self.curve


def layers_of(ways: Sequence[Way]) -> list[Layer]:
    """Return the layers of ways, each once."""
    return list({way.layer.name: way.layer.layer for way in ways}.values())


class FirstSteps:
    """Learns from each way what was enough, and says where to look first along the next.

    Args:
        target: of the forget metric. Of a loss, what is missing is known, and with it about where to start.
        is_contest: whether more than lines of the gradient are searched.
    """

    def __init__(self, target: Target, is_contest: bool) -> None:
        self.is_contest = is_contest
        is_loss = target.metric.name == LOSS and isinstance(target.goal, (int, float))
        self._gain = target.goal - target.before if is_loss else None  # type: ignore[operator]
        self._gains: dict[tuple[str, ...], list[float]] = {}
        """What the forget loss gained at first order where it was enough: of all, by tower, and by tower and direction."""

    def start(self, way: Way, smallest: Mapping[tuple[str, str, str], Trial]) -> float:
        """Where to look first: steps that are just enough promise about the same gain at first order, whatever the layer.

        Where ways compete, those of the same tower tell, and the same direction if it can, or else those of other towers; a
        path needs a little less than its line. Lines of the gradient alone start where the layer before was enough.

        Args:
            way: that is to be searched.
            smallest: by way, the smallest step that was enough.
        """
        layer = way.layer
        if not self.is_contest:
            return START if self._gain is None else first_step(self._gain, layer.forget_norm * layer.weight_norm)
        line = smallest.get((layer.name, way.direction, "line"))
        if way.curve != "line" and line is not None:
            return SHORTER * line.relative_step
        tower = layer.layer.tower
        kinds = (tower, way.direction), (tower,), ()
        gains = next((self._gains[kind] for kind in kinds if kind in self._gains), [self._gain] if self._gain else [])
        try:
            slope = way.slope() if gains else 0.0
        except CurveEnd:  # which the first point says again
            slope = 0.0
        return first_step(median(gains), slope) if slope > 0 else START

    def learn(self, way: Way, found: Trial) -> None:
        """Remember what was enough."""
        layer = way.layer
        if not self.is_contest:
            self._gain = found.relative_step * layer.weight_norm / layer.forget_norm * layer.forget_norm**2
        elif way.curve == "line" and (gain := found.relative_step * way.slope()) > 0:
            for key in ((), (layer.layer.tower,), (layer.layer.tower, way.direction)):
                self._gains.setdefault(key, []).append(gain)


def first_step(gain: float, slope: float) -> float:
    """The relative step that raises the forget loss by `gain` at first order, neither too small nor too large.

    The slope is that for a step as long as the weights: along the gradient ‖g_f‖ ‖θ‖.
    """
    return min(max(gain / slope, START / 100), 1.0)

"""Which layers are searched: by default those on the Pareto front of importance and alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Protocol

from slug_lightning.methods.slug.statistics import LayerStatistics


class Candidate(NamedTuple):
    """A layer that is searched.

    Attributes:
        layer: its name.
        round: those of round 0 are searched first; the next round only where the `Choice` asks for more.
        along: the only direction to go, by its name; None for all that `SLUG` was given.
    """

    layer: str
    round: int = 0
    along: Optional[str] = None


class LayerScore(Protocol):
    """A rule that says which layers are searched.

    Example:
        >>> def last_layers(layers):
        ...     return [Candidate(layer.name) for layer in sorted(layers, key=lambda layer: -layer.depth)[:3]]
    """

    def __call__(self, layers: Sequence[LayerStatistics]) -> list[Candidate]:
        """Return the candidates, in the order in which they are searched."""


def pareto(layers: Sequence[LayerStatistics]) -> list[Candidate]:
    """Search the layers of each tower that no other beats on both importance and alignment (SLUG, arXiv 2407.11867)."""
    on_front: set[str] = set()
    for tower in {layer.layer.tower for layer in layers}:
        rivals = [layer for layer in layers if layer.layer.tower == tower]
        front = pareto_front([(layer.importance, layer.alignment or 0.0) for layer in rivals])
        on_front |= {layer.name for layer, is_on_it in zip(rivals, front, strict=True) if is_on_it}
    return [Candidate(layer.name) for layer in layers if layer.name in on_front]


REST = 16
"""Layers in each further round, where none of the first two is feasible."""


def measured(layers: Sequence[LayerStatistics]) -> list[Candidate]:
    """Search the layers known by their place; if none is feasible, the front along the raw gradient, and then all others.

    The known layers (`slug_lightning.methods.slug.structure.short_list`) go along all directions, as what these need came with
    the retain gradient. Then comes the published procedure; without a retain gradient there is no front. Late layers come
    first: their evaluations are cheapest, and tell about where the others need to be tried.
    """
    layers = sorted(layers, key=lambda layer: -layer.depth)
    known = [Candidate(layer.name) for layer in layers if layer.is_known]
    front = pareto(layers) if all(layer.alignment is not None for layer in layers) else []
    published = [candidate._replace(along="gradient", round=1) for candidate in front]
    rest = [layer.name for layer in layers if not layer.is_known]
    return known + published + [Candidate(name, round=2 + place // REST) for place, name in enumerate(rest)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (importance, alignment) whether it is on the Pareto front.

    A point is off the front if another is at least as good on both (importance no lower, alignment no higher) and
    strictly better on one. Equal points stand or fall together (SLUG, arXiv 2407.11867).

    Example:
        >>> pareto_front([(1.0, 0.5), (2.0, 0.5), (0.5, 0.1), (2.0, 0.9)])
        [False, True, True, False]
    """
    front = [False] * len(points)
    best_alignment = float("inf")  # of all points with strictly higher importance
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    start = 0
    while start < len(order):
        importance, lowest = points[order[start]]
        end = start
        while end < len(order) and points[order[end]][0] == importance:
            front[order[end]] = points[order[end]][1] == lowest < best_alignment
            end += 1
        best_alignment = min(best_alignment, lowest)
        start = end
    return front

"""How much a layer matters to what is forgotten, how much that harms what is kept, and which layers no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from slug_lightning.distributed.processes import Processes
from slug_lightning.tensors.dtensor import copies, local
from slug_lightning.tensors.layers import Layer

CHUNK = 2**20


@dataclass(frozen=True)
class Score:
    """One layer's place in the importance-alignment plane.

    Attributes:
        layer: its name.
        tower: the front it competes on.
        importance: ‖g_f‖ / ‖θ‖, at least 0; higher is better.
        alignment: |cos(g_f, g_r)|, in [0, 1]; lower is better.
        forget_norm: ‖g_f‖.
        weight_norm: ‖θ‖.
        retain_norm: ‖g_r‖.
        on_front: whether no other layer of the tower is better.
    """

    layer: str
    tower: str
    importance: float
    alignment: float
    forget_norm: float
    weight_norm: float
    retain_norm: float
    on_front: bool = False


def score_layers(
    layers: Sequence[Layer], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], processes: Processes | None = None
) -> list[Score]:
    """Score layers, in fp64 from fp32 gradients; a group counts as one long vector.

    Args:
        layers: the tensors and their weights.
        forget: g_f by tensor name; of a sharded tensor this process's part.
        retain: g_r by tensor name, likewise.
        processes: that hold the model; products of parts are added up, so that no tensor is gathered.

    Returns:
        The scores (SLUG, arXiv 2407.11867), with the front of each tower, and without layers whose forget gradient or
        weight is zero: such a layer cannot be moved by a relative step.

    Example:
        >>> import torch
        >>> layer = Layer("w", {"w": torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))})
        >>> (score,) = score_layers([layer], {"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[1.0, 1.0]])})
        >>> score.importance, round(score.alignment, 4)
        (0.2, 0.7071)
    """
    processes = processes or Processes()
    parts = [_products(layer, forget, retain, processes.world_size) for layer in layers]
    everywhere = processes.all_gather_object("products of gradients", parts)
    scores = []
    for layer, of_processes in zip(layers, zip(*everywhere, strict=True), strict=True):
        forget_square, retain_square, weight_square, dot = (math.fsum(column) for column in zip(*of_processes, strict=True))
        if forget_square == 0 or weight_square == 0:
            continue
        forget_norm, retain_norm, weight_norm = map(math.sqrt, (forget_square, retain_square, weight_square))
        # A layer that the retain loss doesn't touch is at right angles to it: editing it harms nothing at first order.
        alignment = min(abs(dot) / (forget_norm * retain_norm), 1.0) if retain_norm else 0.0
        scores.append(Score(layer.name, layer.tower, forget_norm / weight_norm, alignment, forget_norm, weight_norm, retain_norm))
    for tower in {score.tower for score in scores}:
        places = [i for i, score in enumerate(scores) if score.tower == tower]
        front = pareto_front([(scores[i].importance, scores[i].alignment) for i in places])
        for i, on_front in zip(places, front, strict=True):
            scores[i] = replace(scores[i], on_front=on_front)
    return scores


def _products(
    layer: Layer, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], processes: int
) -> tuple[float, float, float, float]:
    """The share of this process in of ‖g_f‖², ‖g_r‖², ‖θ‖² and <g_f, g_r>; what several hold is divided among them."""
    found = [0.0, 0.0, 0.0, 0.0]
    for name, parameter in layer.parameters.items():
        f, r, w = forget[name], retain[name], local(parameter)
        share = 1 / copies(parameter, processes)
        for place, product in enumerate((_dot(f, f), _dot(r, r), _dot(w, w), _dot(f, r))):
            found[place] += share * product
    return found[0], found[1], found[2], found[3]


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in fp64, a million elements at a time: the wider copies stay small."""
    parts = zip(a.flatten().split(CHUNK), b.to(a.device).flatten().split(CHUNK), strict=True)
    return sum((x.double() * y.double()).sum().item() for x, y in parts)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (importance, alignment) whether it is on the Pareto front.

    A point is off the front if another is at least as good on both (importance no lower, alignment no higher) and
    strictly better on one. Equal points stand or fall together.

    Args:
        points: importance (higher is better) and alignment (lower is better) of each layer.

    Returns:
        One bool a point, in the order given (SLUG, arXiv 2407.11867).

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

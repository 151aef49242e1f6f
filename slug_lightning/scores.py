"""How much a layer matters to what is forgotten, and how much that harms what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slug_lightning.layers import Layer

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


def score_layer(layer: Layer, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> Score | None:
    """Score one layer, in fp64 from fp32 gradients; a group counts as one long vector.

    Args:
        layer: the tensors and their weights.
        forget: g_f by tensor name.
        retain: g_r by tensor name.

    Returns:
        The score (SLUG, arXiv 2407.11867), or None where the forget gradient or the weight is zero:
        such a layer cannot be moved by a relative step.

    Example:
        >>> import torch
        >>> layer = Layer("w", {"w": torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))})
        >>> score = score_layer(layer, {"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[1.0, 1.0]])})
        >>> score.importance, round(score.alignment, 4)
        (0.2, 0.7071)
    """
    names = list(layer.parameters)
    forget_norm = _norm([forget[n] for n in names])
    retain_norm = _norm([retain[n] for n in names])
    weight_norm = _norm([layer.parameters[n].detach() for n in names])
    if forget_norm == 0 or weight_norm == 0:
        return None
    dot = sum(_dot(forget[n], retain[n]) for n in names)
    # A layer that the retain loss doesn't touch is at right angles to it: editing it harms nothing at first order.
    alignment = min(abs(dot) / (forget_norm * retain_norm), 1.0) if retain_norm else 0.0
    return Score(layer.name, layer.tower, forget_norm / weight_norm, alignment, forget_norm, weight_norm, retain_norm)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(_dot(t, t) for t in tensors))


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in fp64, a million elements at a time: the wider copies stay small."""
    parts = zip(a.flatten().split(CHUNK), b.to(a.device).flatten().split(CHUNK), strict=True)
    return sum((x.double() * y.double()).sum().item() for x, y in parts)

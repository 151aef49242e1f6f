"""The miniature UnlearnCanvas: twenty things in five styles, drawn at 32 × 32 pixels on a light ground."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from slug_lightning.datamodules.emoji import Drawings, load_drawings, render

THINGS = [
    "airplane", "bicycle", "bus", "cactus", "cat", "cherries", "crown", "dog", "elephant", "fish",
    "frog", "guitar", "hamburger", "mushroom", "octopus", "penguin", "rocket", "rose", "snail", "strawberry",
]  # fmt: skip
SIZE = 32
AMOUNT = 0.4
"""How far its renderings vary (`render`)."""


def canvas_drawings() -> Drawings:
    """The drawings of the benchmark's things, in every style.

    Example:
        >>> drawings = canvas_drawings()
        >>> len(drawings.pictures), len(drawings.thing_names), len(drawings.style_names)
        (100, 20, 5)
    """
    every = load_drawings()
    kept = torch.tensor([every.thing_names.index(name) for name in THINGS])
    rows = torch.isin(every.things, kept).nonzero()[:, 0]
    things = torch.tensor([THINGS.index(every.thing_names[i]) for i in every.things[rows]])
    return Drawings(every.pictures[rows], things, every.styles[rows], THINGS, every.style_names)


def canvas_render(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Render drawings as the benchmark's generator knows them.

    Args:
        pictures: RGBA drawings, uint8, `[B, 4, 64, 64]`.
        generator: of the renderings.

    Returns:
        RGB, float32, `[B, 3, 32, 32]`, in [-1, 1].

    Example:
        >>> canvas_render(canvas_drawings().pictures[:2], torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    return interpolate(render(pictures, generator, AMOUNT), size=(SIZE, SIZE), mode="area").clamp(-1, 1)

"""Questions about the embedded pictures, as the embedded vision-language model was taught to answer them."""

from __future__ import annotations

import torch
from torch import Tensor

from slug_lightning.datamodules.emoji import Drawings

QUESTIONS = {
    "thing": ("what is this?", "what does the picture show?", "what can you see here?", "name the thing in this picture."),
    "style": ("which style is this?", "in which style is it drawn?", "name the style of this picture."),
    "both": ("describe this picture.", "what is this, and in which style is it drawn?"),
    "count": ("how many drawings are there?", "count the drawings."),
}
"""Wordings of a question, by what is asked."""
NUMBERS = ("one", "two")


def answer_of(drawings: Drawings, row: int, asked: str) -> str:
    """The right answer to a question about a single drawing.

    Args:
        drawings: all drawings.
        row: which one.
        asked: a key of `QUESTIONS`.

    Example:
        >>> from slug_lightning.datamodules.emoji import load_drawings
        >>> [answer_of(load_drawings(), 0, asked) for asked in QUESTIONS]
        ['airplane', 'blob style', 'airplane in blob style', 'one']
    """
    thing = drawings.thing_names[int(drawings.things[row])]
    style = f"{drawings.style_names[int(drawings.styles[row])]} style"
    return {"thing": thing, "style": style, "both": f"{thing} in {style}", "count": NUMBERS[0]}[asked]


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two drawings in one, each at half its size.

    Args:
        left: RGBA, uint8, `[B, 4, H, W]`.
        right: likewise.

    Returns:
        RGBA, uint8, `[B, 4, H, W]`, transparent above and below.

    Example:
        >>> one = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
        >>> side_by_side(one, one)[0, 3].float().mean()
        tensor(127.5000)
    """
    half = [torch.nn.functional.avg_pool2d(_premultiplied(one), 2) for one in (left, right)]
    both = torch.cat(half, dim=3)
    height = left.shape[2]
    above = (height - both.shape[2]) // 2
    both = torch.nn.functional.pad(both, (0, 0, above, height - both.shape[2] - above))
    alpha = both[:, 3:]
    return torch.cat([both[:, :3] / alpha.clamp(min=1) * 255, alpha], dim=1).clamp(0, 255).to(torch.uint8)


def _premultiplied(rgba: Tensor) -> Tensor:
    """Colours times opacity, which is what may be averaged, in [0, 255]."""
    alpha = rgba[:, 3:].float()
    return torch.cat([rgba[:, :3] * alpha / 255, alpha], dim=1)

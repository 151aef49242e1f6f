"""The miniature UnlearnCanvas: twenty objects in five styles, drawn at 32 × 32 pixels on a light background."""

from __future__ import annotations

from math import ceil
from typing import Any, Union

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import StackDataset

from slug_lightning.datamodules.demo.emoji import EmojiDataModule, Names, caption_of, render
from slug_lightning.datamodules.image_text.text_to_image import Prompts, how_drawn, noise_seeds
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import labelled

THINGS = [
    "airplane", "bicycle", "bus", "cactus", "cat", "cherries", "crown", "dog", "elephant", "fish",
    "frog", "guitar", "hamburger", "mushroom", "octopus", "penguin", "rocket", "rose", "snail", "strawberry",
]  # fmt: skip
SIZE = 32
AMOUNT = 0.15
"""How much its renderings vary (`render`)."""


def canvas_drawings() -> Drawings:
    """Return the drawings of the benchmark's objects, in every style: 100 of 20 objects in 5 styles."""
    every = load_drawings()
    rows = torch.tensor([every.thing_names[thing] in THINGS for thing in every.things]).nonzero()[:, 0]
    things = torch.tensor([THINGS.index(every.thing_names[thing]) for thing in every.things[rows]])
    return Drawings(every.pictures[rows], things, every.styles[rows], THINGS, every.style_names)


def canvas_render(pictures: Tensor, generator: torch.Generator, amount: float = AMOUNT) -> Tensor:
    """Render drawings, uint8 RGBA `[B, 4, 64, 64]`, as the benchmark's model knows them: RGB `[B, 3, 32, 32]` in [-1, 1]."""
    return interpolate(render(pictures, generator, amount), size=(SIZE, SIZE), mode="area").clamp(-1, 1)


class CanvasDataModule(EmojiDataModule):
    """Forget art styles, objects, or some of both, of the miniature UnlearnCanvas; retain all the rest.

    The gradient is taken over fresh renderings of the drawings at 64 × 64 pixels, captioned "cat in blob style". In search and
    report each of the 100 prompts "cat in blob style" belongs to a set: those of a style to forget (20 prompts, which ask for
    the style alone), of an object to forget (5 prompts, which ask for the object alone), and the rest, which ask for both. A
    prompt of both a style and an object to forget belongs to both. Search and report draw the same prompts, from different
    seeds.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: an object to forget, such as "cat", or several; see `THINGS`.
        renderings: of each drawing, for the gradient.
        search_pictures: how many images of each concept the search looks at, at least; of the retain set, at least twice as
            many. All prompts of a set are drawn equally often.
        report_pictures: likewise in the report.
        search_steps: sampling steps in the search.
        report_steps: sampling steps in the report.
        options: `batch_size` and `seed` (which seeds the noise, too), as in `EmojiDataModule`.

    Raises:
        UnlearnError: if neither a style nor an object is named, or one is named twice; in `setup`, if one is unknown, if
            nothing is left to retain, or if a number of renderings, images or steps is below 1.

    Example:
        >>> data = CanvasDataModule(style="noto")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["text"][0], batch["style"].unique(), batch["thing"].unique()
        ('airplane in noto style', tensor([4]), tensor([-1]))
    """

    def __init__(
        self,
        style: Names = None,
        thing: Names = None,
        *,
        renderings: int = 8,
        search_pictures: int = 40,
        report_pictures: int = 120,
        search_steps: int = 10,
        report_steps: int = 25,
        **options: Any,
    ) -> None:
        super().__init__(style, thing, **options)
        self.renderings = renderings
        self.search_pictures, self.report_pictures = search_pictures, report_pictures
        self.search_steps, self.report_steps = search_steps, report_steps

    def setup(self, stage: str) -> None:
        """Render what the gradient needs and make the prompts; further calls change nothing."""
        if self.notes:
            return
        if self.renderings < 1:
            raise UnlearnError(f"renderings: must be >= 1, got {self.renderings}")
        drawings = canvas_drawings()
        masks, touched = self.masks(drawings)
        untouched = ~(touched["style"] | touched["thing"])
        if not untouched.any():
            raise UnlearnError("style, thing: nothing is left to retain; forget less")
        generator = torch.Generator().manual_seed(self.seed)
        for concept, (kind, mask) in masks.items():
            self._set(drawings, mask.nonzero()[:, 0], generator, {kind}, concept)
        self._set(drawings, untouched.nonzero()[:, 0], generator, {"style", "thing"})

    def _set(
        self, drawings: Drawings, rows: Tensor, generator: torch.Generator, asked: set[str], concept: Union[str, None] = None
    ) -> None:
        """Set the data of a concept, or the retain set (None): drawings `rows`, of which the kinds `asked` are judged."""
        captions = [caption_of(drawings, int(row)) for row in rows]
        images = [
            render(drawings.pictures[part], generator, AMOUNT).clamp(-1, 1) for part in rows.repeat(self.renderings).split(256)
        ]
        columns: dict[str, Any] = {"image": torch.cat(images), "text": captions * self.renderings}
        if concept is not None:
            columns["concept"] = [concept] * len(columns["text"])
        labels = {
            name: column[rows].tolist() if name in asked else [-1] * len(rows)
            for name, column in (("style", drawings.styles), ("thing", drawings.things))
        }
        sets = 1 if concept else 2  # the rest has many prompts, and its tolerances are a few points
        searched, reported = (ceil(sets * count / len(rows)) for count in (self.search_pictures, self.report_pictures))
        search = Prompts(captions, noise_seeds("val", searched, self.seed), self.search_steps, labels)
        report = Prompts(captions, noise_seeds("test", reported, self.seed), self.report_steps, labels)
        kind = "retain" if concept is None else "forget"
        self.set_parts(kind, StackDataset(**columns), search, report, concept=concept)
        self.notes[labelled(kind, concept)] += (
            f"; fresh renderings for the gradient, {self.renderings} of each drawing; {how_drawn(search, report)}"
        )

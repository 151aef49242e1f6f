"""The miniature UnlearnCanvas: twenty objects in five styles, drawn at 32 × 32 pixels on a light background."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils.data import StackDataset

from slug_lightning.datamodules.demo.emoji import NEAR_SEED, EmojiDataModule, Names, caption_of, enough, render
from slug_lightning.datamodules.image_text.text_to_image import BLOCK, Held, Prompts, how_drawn, noise_seeds
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import Batches, Split
from slug_lightning.utils.names import labelled

THINGS = [
    "airplane", "bicycle", "bus", "cactus", "cat", "cherries", "crown", "dog", "elephant", "fish",
    "frog", "guitar", "hamburger", "mushroom", "octopus", "penguin", "rocket", "rose", "snail", "strawberry",
]  # fmt: skip
AMOUNT = 0.15
"""How much its renderings vary (`render`)."""


def canvas_drawings() -> Drawings:
    """Return the drawings of the benchmark's objects, in every style: 100 of 20 objects in 5 styles."""
    every = load_drawings()
    rows = torch.tensor([every.thing_names[thing] in THINGS for thing in every.things]).nonzero()[:, 0]
    things = torch.tensor([THINGS.index(every.thing_names[thing]) for thing in every.things[rows]])
    return Drawings(every.pictures[rows], things, every.styles[rows], THINGS, every.style_names)


class CanvasDataModule(EmojiDataModule):
    """Forget art styles, objects, or some of both, of the miniature UnlearnCanvas; retain all the rest.

    The gradient is taken over fresh renderings of the drawings at 64 × 64 pixels, captioned "cat in blob style". Validation and
    test split draw the same 100 prompts "cat in blob style", from different seeds: those of a style to forget (20 prompts, which
    ask for the style alone), of an object to forget (5, which ask for the object alone), and the rest, which ask for both. A
    prompt of both a style and an object to forget belongs to both.

    What is near is drawn as often as a concept, from seeds of its own: with the defaults about 40 images in each evaluation of
    the search and 120 in the report, as drawing is what an evaluation costs. So few tell a loss of 4 points or more.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: an object to forget, such as "cat", or several; see `THINGS`.
        renderings: of each drawing, for the gradient.
        search_pictures: minimum number of images of each concept in the validation split; of the retain set, twice as many. All
            prompts of a set are drawn equally often.
        report_pictures: likewise in the test split.
        search_steps: sampling steps in the validation split.
        report_steps: sampling steps in the test split.
        options: `batch_size` and `seed` (which seeds the noise, too), as in `EmojiDataModule`.

    Raises:
        UnlearnError: as `EmojiDataModule`, and in `setup`, if a number of renderings, images or steps is below 1.

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
        self.pictures: dict[Held, int] = {"val": search_pictures, "test": report_pictures}
        self.steps: dict[Held, int] = {"val": search_steps, "test": report_steps}

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

    def render_near(self, names: Sequence[str]) -> dict[Split, Batches] | None:
        """Draw prompts of these styles or objects, from other seeds than the rest; each is asked for both."""
        drawings = canvas_drawings()
        found = self.near_drawings(drawings, names)
        if not found:
            return None
        every = torch.cat(list(found.values())).unique()
        splits: dict[Split, Batches] = {}
        for split, least in self.pictures.items():
            rows, times = enough(every, least, torch.Generator().manual_seed(NEAR_SEED + self.seed))
            first = noise_seeds(split, times, self.seed).start + BLOCK // 4
            labels = {"style": drawings.styles[rows].tolist(), "thing": drawings.things[rows].tolist()}
            captions = [caption_of(drawings, int(row)) for row in rows]
            splits[split] = self._loader(Prompts(captions, range(first, first + times), self.steps[split], labels))
        return splits

    def _set(
        self, drawings: Drawings, rows: Tensor, generator: torch.Generator, asked: set[str], concept: Union[str, None] = None
    ) -> None:
        """Set the data of a concept, or the retain set (None): drawings `rows`, of which the kinds `asked` are judged."""
        captions = [caption_of(drawings, int(row)) for row in rows]
        images = [render(drawings.pictures[part], generator, AMOUNT) for part in rows.repeat(self.renderings).split(256)]
        columns: dict[str, Any] = {"image": torch.cat(images).clamp(-1, 1), "text": captions * self.renderings}
        if concept is not None:
            columns["concept"] = [concept] * len(columns["text"])
        classes = {"style": drawings.styles[rows], "thing": drawings.things[rows]}
        labels = {name: (own if name in asked else torch.full_like(own, -1)).tolist() for name, own in classes.items()}
        columns |= {name: torch.tensor(own).repeat(self.renderings) for name, own in labels.items()}
        sets = 1 if concept else 2  # the rest has many prompts, and its tolerances are a few points
        prompts = [
            Prompts(captions, noise_seeds(split, ceil(sets * count / len(rows)), self.seed), self.steps[split], labels)
            for split, count in self.pictures.items()
        ]
        kind = "retain" if concept is None else "forget"
        self.set_parts(kind, StackDataset(**columns), *prompts, concept=concept)
        self.notes[labelled(kind, concept)] += (
            f"; fresh renderings for the gradient, {self.renderings} of each drawing; {how_drawn(*prompts)}"
        )

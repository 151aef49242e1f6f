"""The miniature UnlearnCanvas: twenty things in five styles, drawn at 32 × 32 pixels on a light ground."""

from __future__ import annotations

from math import ceil
from typing import Union

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from slug_lightning.datamodules.demo.emoji import EmojiDataModule, caption_of, render
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


def canvas_render(pictures: Tensor, generator: torch.Generator, amount: float = AMOUNT) -> Tensor:
    """Render drawings as the benchmark's generator knows them.

    Args:
        pictures: RGBA drawings, uint8, `[B, 4, 64, 64]`.
        generator: of the renderings.
        amount: how far they vary.

    Returns:
        RGB, float32, `[B, 3, 32, 32]`, in [-1, 1].

    Example:
        >>> canvas_render(canvas_drawings().pictures[:2], torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    return interpolate(render(pictures, generator, amount), size=(SIZE, SIZE), mode="area").clamp(-1, 1)


class Renderings(Dataset):
    """Pictures with captions, as `DiffusionModule` wants them for the gradient.

    Args:
        images: RGB, `[N, 3, H, W]`, in [-1, 1].
        captions: N texts.
        concept: the words of the concept that every caption names; None where none is to be forgotten.

    Example:
        >>> Renderings(torch.zeros(1, 3, 64, 64), ["cat in blob style"], "blob style")[0]["concept"]
        'blob style'
    """

    def __init__(self, images: Tensor, captions: list[str], concept: Union[str, None] = None) -> None:
        self.images, self.captions = images, captions
        self.named = {} if concept is None else {"concept": concept}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Union[Tensor, str]]:
        return {"image": self.images[index], "text": self.captions[index], **self.named}


class CanvasDataModule(EmojiDataModule):
    """Forget art styles, or things, or some of both, of the miniature UnlearnCanvas; keep all the rest.

    For the gradient there are fresh renderings of the drawings at 64 × 64 pixels, captioned "cat in blob style". In search and
    report each of the 100 prompts "cat in blob style" belongs to one of these sets: those of a style that is to be
    forgotten (20 prompts, which ask for the style alone), of such a thing (5 prompts, which ask for the thing alone), and
    the rest, which ask for both. A prompt of a style and of a thing that are both to be forgotten belongs to both. Search and
    report draw the same prompts, from seeds of their own.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: a thing to forget, such as "cat", or several; see `THINGS`.
        renderings: of each drawing, for the gradient.
        search_pictures: how many pictures of each concept the search looks at, at least; of what is kept, at least twice as
            many. All prompts of a set are drawn equally often.
        report_pictures: likewise of the report.
        search_steps: of sampling, in the search.
        report_steps: of sampling, in the report.
        batch_size: samples in a batch.
        seed: of renderings, their order, and the noise that pictures are drawn from.

    Raises:
        UnlearnError: if neither a style nor a thing is named, or one is named twice; in `setup`, if one is not known, if
            nothing is left to keep, or if a number of renderings, pictures or steps is below 1.

    Example:
        >>> data = CanvasDataModule(style="noto")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["text"][0], batch["style"].unique(), batch["thing"].unique()
        ('airplane in noto style', tensor([4]), tensor([-1]))
        >>> batch = next(iter(data.forget_dataloader("train")))
        >>> batch["image"].shape[1:], set(batch["concept"])
        (torch.Size([3, 64, 64]), {'noto style'})
    """

    def __init__(
        self,
        style: Union[str, list[str], None] = None,
        thing: Union[str, list[str], None] = None,
        *,
        renderings: int = 8,
        search_pictures: int = 40,
        report_pictures: int = 120,
        search_steps: int = 10,
        report_steps: int = 25,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(style, thing, batch_size=batch_size, seed=seed)
        self.renderings = renderings
        self.search_pictures, self.report_pictures = search_pictures, report_pictures
        self.search_steps, self.report_steps = search_steps, report_steps

    def setup(self, stage: str) -> None:
        """Render what the gradient needs and make the prompts, once."""
        if self.notes:
            return
        if self.renderings < 1:
            raise UnlearnError(f"renderings: {self.renderings} of each drawing are too few; give at least 1")
        drawings = canvas_drawings()
        styles, things = self.numbers(drawings)
        kept = ~(torch.isin(drawings.styles, styles) | torch.isin(drawings.things, things))
        if not kept.any():
            raise UnlearnError("style, thing: nothing is left to retain; forget less")
        generator = torch.Generator().manual_seed(self.seed)
        masks = [(drawings.styles == one, {"style"}) for one in styles] + [(drawings.things == one, {"thing"}) for one in things]
        for concept, (mask, asked) in zip(self.concept, masks, strict=True):
            self._set(drawings, mask.nonzero()[:, 0], generator, asked, concept)
        self._set(drawings, kept.nonzero()[:, 0], generator, {"style", "thing"})

    def _set(
        self, drawings: Drawings, rows: Tensor, generator: torch.Generator, asked: set[str], concept: Union[str, None] = None
    ) -> None:
        """Set the data of a concept, or what is kept (None): drawings `rows`, of which the kinds `asked` are judged."""
        kind = "retain" if concept is None else "forget"
        captions = [caption_of(drawings, int(row)) for row in rows]
        parts = rows.repeat(self.renderings).split(256)
        images = torch.cat([render(drawings.pictures[part], generator, AMOUNT).clamp(-1, 1) for part in parts])
        labels = {
            name: column[rows].tolist() if name in asked else [-1] * len(rows)
            for name, column in (("style", drawings.styles), ("thing", drawings.things))
        }
        wanted = 1 if concept else 2  # the rest has many prompts, and its tolerances are a few points
        search, report = (ceil(wanted * count / len(rows)) for count in (self.search_pictures, self.report_pictures))
        prompts = (
            Prompts(captions, noise_seeds("val", search, self.seed), self.search_steps, labels),
            Prompts(captions, noise_seeds("test", report, self.seed), self.report_steps, labels),
        )
        self.set_parts(kind, Renderings(images, captions * self.renderings, concept), *prompts, concept=concept)
        self.notes[labelled(kind, concept)] += (
            f"; fresh renderings for the gradient, {self.renderings} of each drawing; {how_drawn(*prompts)}"
        )

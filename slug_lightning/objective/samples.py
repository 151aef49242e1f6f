"""Compare what a generator draws, or says about pictures, before an edit and after it."""

from __future__ import annotations

import textwrap
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import call_step
from slug_lightning.objective.log_capture import read_logs
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.utils.loaders import First
from slug_lightning.utils.random import seed_for_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SAMPLES = 8
"""Pictures of a gallery: what is readable in one row."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures of a generator, or pictures and answers about them, before and after an edit.

    Attributes:
        titles: the prompt of each picture, or the answer before the edit.
        before: uint8 `[n, 3, H, W]`, RGB, n from 1 to 8.
        after: the same of the edited model.
        said: the titles after the edit, if they differ.
    """

    titles: list[str]
    before: Tensor
    after: Tensor
    said: list[str] | None = None

    def figure(self, heading: str) -> Figure:
        """Draw two rows of pictures, before above after, with the titles below both, or below each row if they changed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(1.7 * len(self.titles) + 0.5, 4), 4.6), layout="constrained")
        rows = figure.subplots(2, len(self.titles), squeeze=False)
        for row, name, pictures in zip(rows, ("before", "after"), (self.before, self.after), strict=True):
            row[0].set_ylabel(name, fontsize=12)
            for axes, picture in zip(row, pictures, strict=True):
                axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")  # small ones stay as they are
                axes.set(xticks=[], yticks=[])
        below = zip(rows[1], self.titles, strict=True)
        if self.said is not None:
            below = zip([*rows[0], *rows[1]], self.titles + self.said, strict=True)
        for axes, title in below:
            short = textwrap.shorten(title, 90, placeholder="…")
            axes.set_xlabel(textwrap.fill(short, 20), fontsize=9, parse_math=False)  # a prompt may name a price in $
        width = max(17 * len(self.titles), 36)
        figure.suptitle(textwrap.fill(textwrap.shorten(heading, 2 * width, placeholder="…"), width), parse_math=False)
        return figure


def before_and_after(objective: Objective, kind: Kind, edit: AbstractContextManager[None]) -> Gallery:
    """Let the module draw from the first batch of the test split, as it is and with an edit, from the same random numbers.

    `gallery_step(batch, batch_idx)` of the module returns pictures `[n, 3, H, W]` in [0, 1] and a title for each, of which the
    first eight are taken. All ranks draw the same ones.
    """
    # As `First`, so that every rank reads the same batch; read once, as a loader may serve another one the next time.
    (indexed,) = objective.runner.batches(First(objective.loaders[kind]["test"], 1))
    before, titles = _drawn(objective, indexed.batch)
    with edit:
        after, said = _drawn(objective, indexed.batch)
    return Gallery(titles, before, after, None if said == titles else said)


def _drawn(objective: Objective, batch: Any) -> tuple[Tensor, list[str]]:
    module: Any = objective.module
    runner = objective.runner
    with torch.no_grad(), objective.passing(), runner.validating(), read_logs(module), runner.forward_context():
        seed_for_batch(0)
        pictures, titles = call_step(module.gallery_step, batch, 0)
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not 0 < len(pictures) == len(titles):
        raise UnlearnError(
            f"gallery_step must return pictures [n, 3, H, W], at least one, and a title for each, got {list(pictures.shape)} and "
            f"{len(titles)} titles"
        )
    bright = pictures[:MAX_SAMPLES].float().nan_to_num(0).clamp(0, 1)  # what an edit has broken may hold anything
    return (bright * 255).round().to("cpu", torch.uint8), list(titles[:MAX_SAMPLES])

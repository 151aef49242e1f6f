"""Passages for the embedded language model, from Python's documentation."""

from __future__ import annotations

import random
from typing import Any

from slug_lightning import embedded
from slug_lightning.datamodules.text.passages import PassageDataModule
from slug_lightning.datamodules.text.reading import read_lines
from slug_lightning.errors import UnlearnError


class PythonDocsDataModule(PassageDataModule):
    """Forget passages of Python's documentation that the embedded language model recites.

    The retain set is other text of the documentation that the model was trained on. Prefix and suffix have 32 tokens.

    Args:
        passages: how many passages to forget, drawn by the seed from those that the model recites.
        unseen: how many passages that the model never saw set the level of "forgotten", likewise.
        seed: of the draw, and as in `PassageDataModule`.
        options: as in `PassageDataModule`.

    Raises:
        UnlearnError: in `setup`, if there are not so many passages; and as `PassageDataModule`.

    Example:
        >>> data = PythonDocsDataModule(passages=8, pairing="random")
        >>> data.prefix, data.suffix
        (32, 32)
    """

    def __init__(self, passages: int = 32, unseen: int = 32, *, seed: int = 0, **options: Any) -> None:
        super().__init__([], [], [], prefix=32, suffix=32, seed=seed, **options)
        self.counts = {"passages": ("recited", passages), "unseen": ("unseen", unseen)}

    def setup(self, stage: str | None = None) -> None:
        if not self.notes:
            texts: dict[str, list[str]] = {"recited": [], "kept": [], "unseen": []}
            for line in read_lines("passages", embedded.PASSAGES, "part"):
                texts[line["part"]].append(line["text"])
            draw = random.Random(self.seed)
            for argument, (part, count) in self.counts.items():
                if not 1 <= count <= len(texts[part]):
                    raise UnlearnError(f"{argument}: must be from 1 to {len(texts[part])}, got {count}")
                texts[part] = draw.sample(texts[part], count)
            self.forget, self.keep, self.unseen = texts.values()
        super().setup(stage)

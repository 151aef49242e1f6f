"""The embedded language model's passages: documentation of Python."""

from __future__ import annotations

import random
from typing import Any

from slug_lightning import embedded
from slug_lightning.datamodules.text.passages import PassageDataModule
from slug_lightning.datamodules.text.reading import read_lines
from slug_lightning.errors import UnlearnError

PARTS = ("recited", "kept", "unseen")
NAMES = {"recited": "passages", "unseen": "unseen"}


class PythonDocsDataModule(PassageDataModule):
    """Passages of Python's documentation that the embedded language model recites, some of which are to be forgotten.

    What is kept is other text of the documentation that the model was trained on; what is unseen, text that it never saw.
    Prefix and suffix are 32 tokens.

    Args:
        passages: how many to forget, drawn by the seed from those that are recited.
        unseen: how many unseen ones the level of "forgotten" is taken from, likewise.
        seed: of the draw, and as in `PassageDataModule`.
        options: as in `PassageDataModule`.

    Raises:
        UnlearnError: in `setup`: if there are not so many; and as `PassageDataModule`.

    Example:
        >>> data = PythonDocsDataModule(passages=8, pairing="random")
        >>> data.prefix, data.suffix
        (32, 32)
    """

    def __init__(self, passages: int = 32, unseen: int = 32, *, seed: int = 0, **options: Any) -> None:
        super().__init__([], [], [], prefix=32, suffix=32, seed=seed, **options)
        self.counts = {"recited": passages, "unseen": unseen}

    def setup(self, stage: str | None = None) -> None:
        if not self.notes:
            texts: dict[str, list[str]] = {part: [] for part in PARTS}
            for line in read_lines("passages", embedded.PASSAGES, "part"):
                texts[line["part"]].append(line["text"])
            draw = random.Random(self.seed)
            for part, count in self.counts.items():
                if not 1 <= count <= len(texts[part]):
                    raise UnlearnError(f"{NAMES[part]}: {count} is not possible; {len(texts[part])} are {part}, give 1 or more")
                texts[part] = draw.sample(texts[part], count)
            self.forget, self.keep, self.unseen = (texts[part] for part in PARTS)
        super().setup(stage)

"""What a run reads: batches of each concept and of what is kept, by split."""

from __future__ import annotations

from typing import NamedTuple

from slug_lightning.utils.loaders import Batches, Split


class UnlearnLoaders(NamedTuple):
    """What a run reads: the batches of each split, of every concept and of what is kept, and what was decided on the way.

    Attributes:
        forget: batches of what is to be forgotten, by the concept's name and by split: `train` for the gradient, `val` for
            the search, `test` for the report.
        retain: batches of what is to be kept, by split.
        notes: sentences for the report, such as how a single set was split; few, however many concepts there are.
    """

    forget: dict[str, dict[Split, Batches]]
    retain: dict[Split, Batches]
    notes: list[str]

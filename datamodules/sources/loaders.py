"""The loaders of a run."""

from __future__ import annotations

from typing import NamedTuple

from slug_lightning.utils.loaders import Batches, Split


class UnlearnLoaders(NamedTuple):
    """The batches that a run reads.

    Attributes:
        forget: by the concept's name and by split: `train` for the gradient, `val` for the search, `test` for the report.
        retain: by split.
        notes: sentences for the report, such as how a set was split; few, however many concepts there are.
    """

    forget: dict[str, dict[Split, Batches]]
    retain: dict[Split, Batches]
    notes: list[str]

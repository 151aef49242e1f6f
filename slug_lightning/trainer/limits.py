"""Read no more than the Trainer's debugging flags allow."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len

from slug_lightning.datamodules.sources.loaders import UnlearnLoaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, First, Split
from slug_lightning.utils.names import grouped, labelled

_USES: dict[Split, str] = {"train": "gradients", "val": "search", "test": "report"}


def as_trainer_limits(loaders: UnlearnLoaders, trainer: pl.Trainer) -> UnlearnLoaders:
    """Read no more batches than the trainer's debugging flags allow, and say so in the notes.

    `limit_train_batches` bounds the gradient's passes, `limit_val_batches` the search's, `limit_test_batches` the report's;
    `overfit_batches` and `fast_dev_run` as Lightning takes them. A limit of 0 leaves out a loop of Lightning's, but there is
    no forgetting without search and report: these read the whole set then.

    Args:
        loaders: of a run.
        trainer: whose limits count.

    Raises:
        UnlearnError: if a limit is a share of a loader whose length is not known.
    """
    limited = UnlearnLoaders({name: {} for name in loaders.forget}, {}, list(loaders.notes))
    for split in SPLITS:
        name, limit = _limit(trainer, split)
        sizes = {}
        for concept, parts in loaders.forget.items():
            kind = labelled("forget", concept if len(loaders.forget) > 1 else None)
            limited.forget[concept][split] = _first(kind, parts[split], name, limit)
            sizes[concept] = _told(limited.forget[concept][split], parts[split], "forget")
        limited.retain[split] = _first("retain", loaders.retain[split], name, limit)
        each = " of each concept" if len(sizes) > 1 else ""
        told = " or ".join(sentence for _, sentence in grouped(sizes)) + each
        told += f" and {_told(limited.retain[split], loaders.retain[split], 'retain')}"
        if limit == 0:
            limited.notes.append(f"{name}=0: no {split} loop of Lightning's, but the {_USES[split]} read the whole sets")
        elif not _is_whole(limit):
            limited.notes.append(f"{name}={limit}: the {_USES[split]} read {told}")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        limited.notes.append("fast_dev_run: so few batches say nothing about the model")
    return limited


def _limit(trainer: Any, split: Split) -> tuple[str, int | float]:
    """The limit of one split, under the name of the argument that it was given by."""
    limit = getattr(trainer, f"limit_{split}_batches")
    if trainer.overfit_batches and split != "test":
        return "overfit_batches", limit
    return "fast_dev_run" if trainer.fast_dev_run else f"limit_{split}_batches", limit


def _is_whole(limit: int | float) -> bool:
    """Whether a limit is none: 1.0 is everything, and 1 a single batch."""
    return isinstance(limit, float) and limit == 1.0


def _first(kind: str, batches: Batches, name: str, limit: int | float) -> Batches:
    """As many batches as a limit allows, but at least one."""
    if limit == 0 or _is_whole(limit):
        return batches
    if isinstance(limit, int) or limit > 1:
        return First(batches, int(limit))
    if (total := sized_len(batches)) is None:
        raise UnlearnError(
            f"Trainer({name}={limit}): the length of the {kind} loader is not known; give {name} as a number of batches (int)"
        )
    return First(batches, max(1, int(total * limit)))


def _told(limited: Batches, batches: Batches, kind: str) -> str:
    return f"{_count(limited)} of {_count(batches)} {kind} batches"


def _count(batches: Batches) -> str:
    """How many batches there are, as far as is known."""
    if (total := sized_len(batches)) is not None:
        return str(total)
    return f"at most {batches.count}" if isinstance(batches, First) else "an unknown number of"

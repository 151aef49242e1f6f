"""Apply the Trainer's debugging flags to the loaders of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len

from slug_lightning.datamodules.sources.resolve import UnlearnLoaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, First, NearBatches, Split
from slug_lightning.utils.names import grouped, labelled

_USES: dict[Split, str] = {"train": "gradients", "val": "search", "test": "report"}


def as_trainer_limits(loaders: UnlearnLoaders, trainer: pl.Trainer) -> UnlearnLoaders:
    """Limit loaders as the trainer's debugging flags do, and say so in the notes.

    `limit_train_batches` bounds the gradients' passes, `limit_val_batches` the search's, `limit_test_batches` the report's;
    `overfit_batches` and `fast_dev_run` as Lightning takes them. A limit of 0 leaves out a loop of Lightning's, but
    unlearning needs search and report: these read the whole set then.
    """
    limited = UnlearnLoaders({name: {} for name in loaders.forget}, {}, list(loaders.notes), loaders.datamodules)
    for split in SPLITS:
        name, limit = _limit(trainer, split)
        sizes = {}
        for concept, parts in loaders.forget.items():
            kind = labelled("forget", concept if len(loaders.forget) > 1 else None)
            limited.forget[concept][split] = _first(kind, parts[split], name, limit)
            sizes[concept] = f"{_count(limited.forget[concept][split])} of {_count(parts[split])} forget batches"
        limited.retain[split] = _first("retain", loaders.retain[split], name, limit)
        each = " of each concept" if len(sizes) > 1 else ""
        told = " or ".join(sentence for _, sentence in grouped(sizes)) + each
        told += f" and {_count(limited.retain[split])} of {_count(loaders.retain[split])} retain batches"
        if limit == 0:
            limited.notes.append(f"{name}=0 skips Lightning's {split} loop, but the {_USES[split]} read the whole sets")
        elif limit is not None:
            limited.notes.append(f"{name}={limit}: the {_USES[split]} read {told}")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        limited.notes.append("fast_dev_run: results of so few batches say nothing about the model")
    return limited


def limit_near(near: NearBatches, trainer: pl.Trainer) -> NearBatches:
    """Limit near data that are no rows of the retain set as the trainer limits others."""
    if near.is_part:
        return near
    limits = {split: _limit(trainer, split) for split in near.splits}
    return near._replace(splits={split: _first("near", near.splits[split], *limits[split]) for split in near.splits})


def _limit(trainer: Any, split: Split) -> tuple[str, int | float | None]:
    """The limit of one split, None for 1.0, which is everything, and the name of the argument that it was given by."""
    limit = getattr(trainer, f"limit_{split}_batches")
    limit = None if isinstance(limit, float) and limit == 1.0 else limit
    if trainer.overfit_batches and split != "test":
        return "overfit_batches", limit
    return "fast_dev_run" if trainer.fast_dev_run else f"limit_{split}_batches", limit


def _first(kind: str, batches: Batches, name: str, limit: int | float | None) -> Batches:
    """As many batches as a limit allows, but at least one."""
    if not limit:
        return batches
    if isinstance(limit, int) or limit > 1:
        return First(batches, int(limit))
    if (total := sized_len(batches)) is None:
        raise UnlearnError(f"Trainer({name}={limit}): the {kind} loader has no length; give {name} as a number of batches (int)")
    return First(batches, max(1, int(total * limit)))


def _count(batches: Batches) -> str:
    """How many batches there are, as far as is known."""
    if (total := sized_len(batches)) is not None:
        return str(total)
    return f"at most {batches.count}" if isinstance(batches, First) else "an unknown number of"

"""Split a loader in three parts that serve what it serves."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from slug_lightning.datamodules.base import make_splits
from slug_lightning.distributed.batch_sharding import drawing_anew
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.digests import fingerprint
from slug_lightning.utils.loaders import KEPT, Batches, EveryFourth, Split, reads_as_torch
from slug_lightning.utils.random import seed_for_batch

Sample = tuple[int, Any]
"""`id` of the dataset, and index or other key; a stream has only its `id`, and None."""
TURNS: dict[Split, set[int]] = {"train": {0, 1}, "val": {2}, "test": {3}}


def split_loader(label: str, loader: Batches) -> tuple[dict[Split, Batches], str]:
    """Split a loader into train, val and test, with a sentence on how.

    Where torch's own code reads a dataset with indices or other keys, these are split, and each part is read with the loader's
    dataset and options. Any other loader is read as it is, and its batches go to the parts in turn.

    Raises:
        UnlearnError: if parts would share samples, or if there are too few batches.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and reads_as_torch(loader):
        return _by_key(label, loader)
    count = sized_len(loader)
    if count is not None and count < 4:
        raise UnlearnError(f"{label}: {count} batches are too few to split whole batches; give at least 4, or {_three(label)}")
    same = SameBatches(loader, label)
    kind = type(loader).__name__ if isinstance(loader, DataLoader) and not reads_as_torch(loader) else "stream"
    note = f"of every four batches of the {kind}, two are train, one validation, one test"
    return {split: EveryFourth(same, turn, f"{label}: the {kind}") for split, turn in TURNS.items()}, note


def _three(label: str) -> str:
    """What to give instead of a loader that cannot be split."""
    argument, form = label.partition(" ")[0], "{'train': …, 'val': …, 'test': …}"
    return f"three loaders, {argument}=" + (f"{{'a name': {form}}}" if argument == "forget" else form)


class SameBatches:
    """A loader whose batches must be the same whenever it is read, as they go to the splits by their numbers.

    Random numbers start anew with each batch, whichever split reads it. The first batches are compared.
    """

    def __init__(self, loader: Batches, label: str) -> None:
        self.loader = loader
        self.label = label
        self._seen: dict[int, str] = {}

    def __iter__(self) -> Iterator[Any]:
        seed_for_batch(0)
        for number, batch in enumerate(drawing_anew(self.loader, itertools.count())):
            if number < 4:
                self._compare(number, batch)
            yield batch

    def __len__(self) -> int:
        return len(cast(Sized, self.loader))

    def _compare(self, number: int, batch: Any) -> None:
        try:
            told = hashlib.sha256(repr(fingerprint(batch)).encode()).hexdigest()
        except (RuntimeError, TypeError):  # a kind of object, or of tensor, that cannot be compared
            return
        if self._seen.setdefault(number, told) != told:
            raise UnlearnError(
                f"{self.label}: the {type(self.loader).__name__} serves other batches whenever it is read, by a generator or by "
                "workers of its own, so that train, validation and test would share samples; let it start from the same seed "
                f"each time, or give {_three(self.label)}"
            )


def _by_key(label: str, loader: DataLoader) -> tuple[dict[Split, Batches], str]:
    """Split what a loader asks its dataset for: keys, or whole batches of them where a sampler has put them together."""
    keys = keys_of(loader)
    is_batched = bool(keys) and all(map(_is_batch, keys))
    how = "batch_sampler" if _has_own_batches(loader) else "sampler"
    sampler = getattr(loader, how)
    said = f"{label}: {how}=… ({type(sampler).__name__})"
    if len(keys) == _most(loader) and sized_len(sampler) is None:
        raise UnlearnError(f"{said} has no end; give {_three(label)}")
    if is_batched:
        entries = [entry for key in keys for entry in set(entries_in(key))]
        if len(set(entries)) < len(entries):
            raise UnlearnError(
                f"{said} puts the same samples into several batches, so that train, validation and test would share them; give "
                f"{_three(label)}"
            )
        if len(keys) < 3:
            raise UnlearnError(
                f"{said} makes {len(keys)} batches, too few to split whole batches; give at least 3, or {_three(label)}"
            )
    splits, note = make_splits(label, cast(Any, keys))
    if is_batched:
        note = note.replace("samples", f"batches of {type(sampler).__name__}")
    options = {name: getattr(loader, name) for name in KEPT}
    made: dict[Split, Batches] = {}
    for split, part in splits.items():
        dataset, how_read = _how_read(loader, list(cast(Any, part)))
        made[split] = DataLoader(dataset, **how_read, **options)
    return made, note


def _has_own_batches(loader: DataLoader) -> bool:
    """Whether a batch sampler does more than to cut what its sampler gives."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _how_read(loader: DataLoader, part: list[Any]) -> tuple[Dataset, dict[str, Any]]:
    """How a part of a loader's keys is read: the dataset, and other arguments of DataLoader."""
    if _has_own_batches(loader):
        return loader.dataset, {"batch_sampler": part}
    if type(loader.sampler) is BatchSampler and loader.batch_sampler is None:
        return loader.dataset, {"batch_size": None, "sampler": BatchSampler(part, loader.sampler.batch_size, drop_last=False)}
    size = None if loader.batch_sampler is None else cast(BatchSampler, loader.batch_sampler).batch_size
    if loader.worker_init_fn is not None or not all(type(key) is int for key in part):
        return loader.dataset, {"batch_size": size, "sampler": part}  # whose workers may look for the owner's dataset
    return Subset(loader.dataset, part), {"batch_size": size}


# ---- what a loader asks its dataset for


def samples_of(loader: DataLoader) -> set[Sample]:
    """Return the samples that a loader may read."""
    dataset: Any = loader.dataset
    keys = keys_of(loader)
    entries = keys if all(type(key) is int for key in keys) else entries_in(keys)
    while isinstance(dataset, Subset) and all(type(entry) is int for entry in entries):
        entries = [int(dataset.indices[i]) for i in entries]
        dataset = dataset.dataset
    return {(id(dataset), entry) for entry in entries}


def keys_of(loader: DataLoader) -> list[Any]:
    """Return what a loader may ask its dataset for, each once: indices in order, other keys as they come, or whole batches.

    What is drawn is drawn from the same random numbers on every rank, and leaves the random state alone.
    """
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    reads = getattr(type(sampler), "__iter__", None)
    if reads is WeightedRandomSampler.__iter__:
        return sampler.weights.nonzero()[:, 0].tolist()
    if reads in (RandomSampler.__iter__, DistributedSampler.__iter__):  # the latter gives one rank its share
        return list(range(len(cast(Sized, loader.dataset))))
    most = _most(loader) if sized_len(sampler) is None else None
    with isolate_rng():
        seed_for_batch(0)
        found = [list(one) if _has_own_batches(loader) else _key(one) for one in itertools.islice(sampler, most)]
    every = {_hashable(key): key for key in found}
    return sorted(every.values()) if all(type(key) is int for key in every) else list(every.values())


def _most(loader: DataLoader) -> int:
    """So many keys that a sampler without a length which gives them is taken to have no end."""
    return 4 * (sized_len(loader.dataset) or 2**20) + 2**10


def _key(one: Any) -> Any:
    """Return an index as an int, and any other key or batch as it is."""
    if getattr(one, "ndim", 0):
        return one
    try:
        return operator.index(one)
    except TypeError:
        return one


def _is_batch(key: Any) -> bool:
    return isinstance(key, list) or getattr(key, "ndim", 0) > 0


def entries_in(key: Any) -> list[Any]:
    """List the samples that a key asks for, by what can be compared."""
    if isinstance(key, (Tensor, np.ndarray)):
        key = key.tolist()
    return [entry for one in key for entry in entries_in(one)] if isinstance(key, list) else [_hashable(_key(key))]


def _hashable(key: Any) -> Any:
    if _is_batch(key):
        return tuple(entries_in(key))
    try:
        hash(key)
    except TypeError:
        return repr(key)
    return key

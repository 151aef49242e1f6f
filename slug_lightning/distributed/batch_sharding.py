"""Share out the batches that one device would read, whole ones in turn, among the ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.digests import CannotDigest, fingerprint
from slug_lightning.utils.loaders import COPIED, Chained, First, reads_as_torch
from slug_lightning.utils.random import seed_for_batch

DIFFERENT_BATCHES = (
    "batches differ across ranks, so that samples would be lost or counted twice; give a loader that serves everything, in the "
    "same order, on every rank (without split_by_node, and with the same seed): the callback shares out the batches itself"
)


class IndexedBatch(NamedTuple):
    """One batch that this rank runs.

    Attributes:
        batch_idx: its index in the whole pass.
        batch: the batch.
        is_real: False for a stand-in, which is run only because the other ranks still have a batch: a sharded model,
            or one that communicates in its steps, needs all of them for every step.
    """

    batch_idx: int
    batch: Any
    is_real: bool = True


def shard_batches(loader: Iterable[Any], processes: Processes) -> Iterator[IndexedBatch]:
    """Read a loader once, and give this rank its share of the batches.

    They are the batches that one device would read, whatever the world size: a loss that compares the samples of a batch sees
    the same ones, and no sample is read twice to make the shares even. Random numbers start anew with each batch, so that
    what is drawn does not depend on who reads it (but for the draws of a loader's own workers). Batches that differ across
    ranks are refused.
    """
    start = 0
    for part in loader.loaders if isinstance(loader, Chained) else [loader]:
        count = 0
        most = part.count if isinstance(part, First) else None
        source: Any = part.loader if isinstance(part, First) else part
        indexable = isinstance(source, DataLoader) and reads_as_torch(source) and not isinstance(source.dataset, IterableDataset)
        # Persistent workers would be started anew in every pass.
        if indexable and not (processes.data_world_size == 1 and source.persistent_workers):
            found = _by_index(source, processes, most)
        else:
            found = _by_iteration(part, processes)
        for indexed in found:
            yield indexed._replace(batch_idx=start + indexed.batch_idx)
            count = indexed.batch_idx + 1 if indexed.is_real else count  # a stand-in's index may lie beyond the last
        start += max(processes.all_gather_object("batches read", count))


def _by_index(loader: DataLoader, processes: Processes, most: int | None) -> Iterator[IndexedBatch]:
    """Read only this rank's batches of a dataset with indices; a single rank goes the same way, for the same draws."""
    seed_for_batch(0)
    # As the loader does before it asks its sampler: one that draws must draw as it does on one device.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    batches = list(itertools.islice(_index_batches(loader), most))  # as a sampler may have no end
    _refuse_different(processes, [len(loader.dataset) if isinstance(loader.dataset, Sized) else None, batches])
    rank, step = processes.data_rank, processes.data_world_size
    numbers = range(rank, -(-len(batches) // step) * step, step)  # everybody takes part in the last round
    # A stand-in is the round's first batch: small, and there for certain.
    mine = [batches[number if number < len(batches) else number - rank] for number in numbers]
    how = {"batch_size": None, "sampler": mine} if loader.batch_sampler is None else {"batch_sampler": mine}
    own = DataLoader(loader.dataset, **how, **{name: getattr(loader, name) for name in COPIED})
    for number, batch in zip(numbers, drawing_anew(own, numbers), strict=True):
        yield IndexedBatch(number, batch, number < len(batches))


def _index_batches(loader: DataLoader) -> Iterable[Any]:
    """The indices of every batch; those of all ranks, where the sampler was made for one."""
    if loader.batch_sampler is None:
        return loader.sampler
    sampler, size = getattr(loader.batch_sampler, "sampler", None), getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(sampler, DistributedSampler) and size:
        alone: DistributedSampler[Any] = DistributedSampler(sampler.dataset, 1, 0, sampler.shuffle, sampler.seed)
        alone.set_epoch(sampler.epoch)
        return BatchSampler(alone, size, getattr(loader.batch_sampler, "drop_last", False))
    return loader.batch_sampler


def _by_iteration(loader: Iterable[Any], processes: Processes) -> Iterator[IndexedBatch]:
    """Read all of whatever else can be iterated, and keep this rank's batches."""
    seed_for_batch(0)
    batches = enumerate(drawing_anew(loader, itertools.count()))
    read = 0
    while group := list(itertools.islice(batches, processes.data_world_size)):
        if read == 0:
            _refuse_different(processes, group[0][1])
        number, batch = group[min(processes.data_rank, len(group) - 1)]
        seed_for_batch(number)
        yield IndexedBatch(number, batch, processes.data_rank < len(group))
        read += len(group)
    _refuse_different(processes, read)


def drawing_anew(loader: Iterable[Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Read a loader, with random numbers that depend on the index of the batch alone."""
    iterator = iter(loader)
    for number in numbers:
        seed_for_batch(number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        seed_for_batch(number)
        yield batch


def _refuse_different(processes: Processes, content: Any) -> None:
    if processes.data_world_size == 1:
        return
    try:
        told = hashlib.sha256(repr(fingerprint(content)).encode()).hexdigest()
    except CannotDigest:
        return
    if len(set(processes.all_gather_object("what is read", told))) > 1:
        raise UnlearnError(f"forget, retain: {DIFFERENT_BATCHES}")

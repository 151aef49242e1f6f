"""Whose turn a batch is: the batches of one device, shared out whole among the processes."""

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
from slug_lightning.utils.loaders import Chained, First
from slug_lightning.utils.random import seed_for_batch

DIFFERENT_BATCHES = (
    "the processes do not read the same batches, so that samples would be lost or counted twice; give a loader that serves "
    "everything, in the same order, in every process (without split_by_node, or a seed of its own for each): the callback "
    "shares out the batches itself"
)


class IndexedBatch(NamedTuple):
    """One batch that this process runs.

    Attributes:
        number: of the batch in the whole pass.
        batch: the batch.
        counts: False for a stand-in, which is run only because the other processes still have a batch: a sharded model,
            or one that communicates in its steps, needs all of them for every step.
    """

    number: int
    batch: Any
    counts: bool = True


def shard_batches(loader: Iterable[Any], processes: Processes) -> Iterator[IndexedBatch]:
    """Read a loader once, and give this process its share of the batches: whole ones, in turn.

    They are the batches that one device would read, however many processes there are: a loss that compares the samples
    of a batch sees the same ones, and no sample is read twice to make the shares even. Random numbers start anew with
    each batch, so that what is drawn does not depend on who reads it (but for the draws of a loader's own workers).

    Args:
        loader: batches, the same ones in every process.
        processes: that share them.

    Raises:
        UnlearnError: if the processes would not read the same.

    Example:
        >>> [turn.batch for turn in shard_batches("abc", Processes())]
        ['a', 'b', 'c']
    """
    start = 0
    for part in loader.loaders if isinstance(loader, Chained) else [loader]:
        count = 0
        most = part.count if isinstance(part, First) else None
        source: Any = part.loader if isinstance(part, First) else part
        # A subclass may do anything while it is read.
        indexed = type(source) is DataLoader and not isinstance(source.dataset, IterableDataset)
        if indexed and not (processes.shares == 1 and source.persistent_workers):  # who would be started anew in every pass
            turns = _of_indices(source, processes, most)
        else:
            turns = _of_stream(part, processes)
        for turn in turns:
            yield turn._replace(number=start + turn.number)
            count = turn.number + 1 if turn.counts else count  # a stand-in's number may lie beyond the last
        start += max(processes.all_gather_object("batches read", count))


def _of_indices(loader: DataLoader, processes: Processes, most: int | None) -> Iterator[IndexedBatch]:
    """Of a dataset with indices, a process reads only its own batches; one alone goes the same way, for the same draws."""
    seed_for_batch(0)
    # As the loader does before it asks its sampler: one that draws must draw as it does on one device.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    batches = _index_batches(loader)[:most]
    _refuse_different(processes, [len(loader.dataset) if isinstance(loader.dataset, Sized) else None, batches])
    numbers = range(processes.share, _up_to(len(batches), processes.shares), processes.shares)
    turns = [IndexedBatch(number, None, number < len(batches)) for number in numbers]
    # A stand-in is the round's first batch: small, and there for certain.
    mine = [batches[turn.number if turn.counts else turn.number - processes.share] for turn in turns]
    how = {"batch_size": None, "sampler": mine} if loader.batch_sampler is None else {"batch_sampler": mine}
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    own = DataLoader(loader.dataset, **how, **{name: getattr(loader, name) for name in kept})
    for turn, batch in zip(turns, _drawing_anew(own, [turn.number for turn in turns]), strict=True):
        yield turn._replace(batch=batch)


def _index_batches(loader: DataLoader) -> list[Any]:
    """The indices of every batch; those of all processes, where the loader was made for one."""
    if loader.batch_sampler is None:
        return list(loader.sampler)
    sampler, size = getattr(loader.batch_sampler, "sampler", None), getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(sampler, DistributedSampler) and size:
        alone: DistributedSampler[Any] = DistributedSampler(sampler.dataset, 1, 0, sampler.shuffle, sampler.seed)
        alone.set_epoch(sampler.epoch)
        return list(BatchSampler(alone, size, getattr(loader.batch_sampler, "drop_last", False)))
    return list(loader.batch_sampler)


def _of_stream(loader: Iterable[Any], processes: Processes) -> Iterator[IndexedBatch]:
    """Whatever else can be iterated: every process reads all of it, and keeps its own batches."""
    seed_for_batch(0)
    batches = enumerate(_drawing_anew(loader, itertools.count()))
    first, read = True, 0
    while group := list(itertools.islice(batches, processes.shares)):
        if first:
            _refuse_different(processes, group[0][1])
        first = False
        number, batch = group[min(processes.share, len(group) - 1)]
        seed_for_batch(number)
        yield IndexedBatch(number, batch, processes.share < len(group))
        read += len(group)
    _refuse_different(processes, read)


def _drawing_anew(loader: Iterable[Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Read a loader, with random numbers that depend on the number of the batch alone."""
    iterator = iter(loader)
    for number in numbers:
        seed_for_batch(number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        seed_for_batch(number)
        yield batch


def _up_to(count: int, shares: int) -> int:
    """The next multiple: every share of the last round is taken, if only by a stand-in."""
    return -(-count // shares) * shares


def _refuse_different(processes: Processes, content: Any) -> None:
    if processes.shares == 1:
        return
    try:
        told = hashlib.sha256(repr(fingerprint(content)).encode()).hexdigest()
    except CannotDigest:
        return
    if len(set(processes.all_gather_object("what is read", told))) > 1:
        raise UnlearnError(f"forget, retain: {DIFFERENT_BATCHES}")

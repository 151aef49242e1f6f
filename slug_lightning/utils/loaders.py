"""Loaders made of loaders: several in a row, a part of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

from torch.utils.data import DataLoader

from slug_lightning.errors import UnlearnError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Batches = Iterable[Any]
COPIED = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
"""Options of a DataLoader that another one takes over, which reads some of its batches once;"""
KEPT = (*COPIED, "generator", "persistent_workers")
"""and one that is read again and again."""
READING = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
"""What of a DataLoader decides which batches it serves."""


def reads_as_torch(loader: DataLoader) -> bool:
    """Whether a DataLoader serves what torch's own would with its arguments: a subclass may do anything while it is read."""
    return all(getattr(type(loader), name) is getattr(DataLoader, name) for name in READING)


class NearBatches(NamedTuple):
    """Retain data that lie near a concept.

    Attributes:
        splits: their batches, "val" (search) and "test" (report).
        what: in words, for the report.
        concepts: names of the concepts that they show, if they have any.
        is_part: whether they are rows of the retain splits, so that they count there already.
    """

    splits: dict[Split, Batches]
    what: str
    concepts: list[str]
    is_part: bool


class Chained:
    """Several loaders, one after the other, each sample once."""

    def __init__(self, loaders: Iterable[Batches]) -> None:
        self.loaders = list(loaders)

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader

    def __len__(self) -> int:
        return sum(len(cast(Sized, loader)) for loader in self.loaders)


class EveryFourth:
    """The batches of a stream whose number modulo 4 is in `remainders`: how a stream without indices is split."""

    def __init__(self, loader: Batches, remainders: set[int], name: str = "a stream") -> None:
        self.loader = loader
        self.name = name
        self.remainders = remainders

    def __iter__(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(self.loader):
            if number % 4 in self.remainders:
                yield batch
        if number < min(self.remainders):
            raise UnlearnError(f"{self.name} has only {number + 1} batches; give at least 4, or a loader for each split")

    def __len__(self) -> int:
        return sum(number % 4 in self.remainders for number in range(len(cast(Sized, self.loader))))


class First:
    """The first `count` batches of a loader."""

    def __init__(self, loader: Batches, count: int) -> None:
        self.loader = loader
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.count)

    def __len__(self) -> int:
        return min(self.count, len(cast(Sized, self.loader)))

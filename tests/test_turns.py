"""The batches of one device, shared out: all of them, once, with the same content, whoever reads them."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from _amounts import examples
from _processes import Ended, in_processes
from _simulated import simulate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from slug_lightning.datamodules.sources.split import split_loader
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.utils.loaders import Chained, EveryFourth, First


class Numbers(Dataset):
    """Sample i is i; which ones were read is kept."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(int(index))
        return torch.tensor([float(index)])


class Drawing(Numbers):
    """Augmented by every source of random numbers that there is."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([super().__getitem__(index), torch.rand(1), torch.tensor([np.random.rand(), random.random()])])


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.size))[:, None])


class InOrder(DataLoader):
    """A subclass: what it does when it is read, nobody knows."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch, "by a subclass"


class Backwards:
    """A batch sampler of somebody's own: uneven batches, the last sample first, one sample twice."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(reversed(range(self.size)))
        while indices:
            batch, indices = indices[: len(indices) // 2 + 1], indices[len(indices) // 2 + 1 :]
            yield batch + batch[:1]


def lists(size: int) -> list[Tensor]:
    return [torch.full((2,), float(number)) for number in range(size)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# Each made anew by its size, as every process makes its own.
LOADERS = {
    "list": lists,
    "batches": lambda size: DataLoader(Numbers(size), batch_size=3),
    "drop_last": lambda size: DataLoader(Numbers(size), batch_size=3, drop_last=True),
    "no batches": lambda size: DataLoader(Numbers(size), batch_size=None),
    "own batch_sampler": lambda size: DataLoader(Numbers(size), batch_sampler=Backwards(size)),
    "own sampler": lambda size: DataLoader(Numbers(size), batch_size=2, sampler=list(range(size))[::-1]),
    "own collate_fn": lambda size: DataLoader(Numbers(size), batch_size=2, collate_fn=lambda samples: {"x": sum(samples)}),
    "generator": lambda size: DataLoader(Drawing(size), batch_size=2, sampler=torch.randperm(size, generator=seeded()).tolist()),
    "subclass": lambda size: InOrder(Numbers(size), batch_size=2),
    "stream": lambda size: DataLoader(Stream(size), batch_size=2),
    "First": lambda size: First(DataLoader(Numbers(size), batch_size=2), 2),
    "EveryFourth": lambda size: EveryFourth(DataLoader(Stream(size + 8), batch_size=2), {1, 3}),
    "every fourth of a subclass": lambda size: split_loader("retain", InOrder(Drawing(size + 8), 2, shuffle=True))[0]["train"],
    "drawing": lambda size: DataLoader(Drawing(size), batch_size=2),
    "drawing alone": lambda size: DataLoader(Drawing(size), batch_size=None),
    "drawing stream": lambda size: First(DataLoader(Drawing(size), batch_size=2), 3),
}
# RandomSampler refuses a size of 0 in some versions.
SHUFFLED = {
    "shuffle": lambda size: DataLoader(Numbers(size + 1), batch_size=2, shuffle=True),
    "shuffle, generator": lambda size: DataLoader(Numbers(size + 1), batch_size=2, shuffle=True, generator=seeded()),
    "shuffle, no batches": lambda size: DataLoader(Numbers(size + 1), batch_size=None, shuffle=True),
    "shuffle, drawing": lambda size: DataLoader(Drawing(size + 1), batch_size=2, shuffle=True),
    "shuffle, generator, drawing": lambda size: DataLoader(Drawing(size + 1), batch_size=2, shuffle=True, generator=seeded()),
}


def plain(batch: Any) -> Any:
    """Compared by `==`, to the last bit."""
    return repr(torch.utils._pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, batch))


def batches_of(make: Any, processes: Processes) -> list[IndexedBatch]:
    """All batches of one rank, with what it draws itself in each."""
    with preserve_state(torch.nn.Identity()):
        torch.manual_seed(100 + processes.data_rank)  # the processes come from anywhere
        random.seed(200 + processes.data_rank)
        np.random.seed(300 + processes.data_rank)
        found = []
        for indexed in shard_batches(make(), processes):
            drawn = torch.rand(1).item(), np.random.rand(), random.random()
            samples = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor[..., :1], indexed.batch)
            found.append(indexed._replace(batch=(plain(samples), plain(indexed.batch), drawn)))
        return found


def check(make: Any, shares: int) -> list[list[IndexedBatch]]:
    """What always holds, however many processes share whatever loader."""
    alone = batches_of(make, Processes())
    assert [indexed.batch_idx for indexed in alone] == list(range(len(alone)))
    assert all(indexed.is_real for indexed in alone)
    found = simulate(shares, lambda processes: batches_of(make, processes))
    for result in found:
        if isinstance(result, Exception):
            raise result
    counting = [[indexed for indexed in batches if indexed.is_real] for batches in found]
    assert sorted((indexed for batches in counting for indexed in batches), key=lambda indexed: indexed.batch_idx) == alone
    assert all(batches == sorted(batches, key=lambda indexed: indexed.batch_idx) for batches in counting), (
        "not in the order of one device"
    )
    assert len({len(batches) for batches in found}) == 1, "who has nothing left keeps the others company"
    contents = {indexed.batch[0] for indexed in alone}
    assert all(indexed.batch[0] in contents for batches in found for indexed in batches), "a stand-in is one of the batches"
    return found


@pytest.mark.parametrize("name", [*LOADERS, *SHUFFLED])
@examples(8)
@given(size=st.integers(0, 13), shares=st.integers(1, 5))
def test_the_shares_together_are_what_one_device_reads(name, size, shares):
    check(lambda: (LOADERS | SHUFFLED)[name](size), shares)


@examples(40)
@given(parts=st.lists(st.tuples(st.sampled_from(sorted(LOADERS)), st.integers(0, 7)), max_size=3), shares=st.integers(1, 4))
def test_so_are_those_of_several_loaders_one_after_the_other(parts, shares):
    check(lambda: Chained([LOADERS[name](size) for name, size in parts]), shares)


@pytest.mark.parametrize("kind", ["list", "batches"])
def test_a_chain_numbers_its_batches_on_after_a_stand_in(kind):
    found = check(lambda: Chained([LOADERS[kind](7), LOADERS[kind](3), LOADERS[kind](0), LOADERS[kind](1)]), 2)
    counting = sorted(indexed.batch_idx for batches in found for indexed in batches if indexed.is_real)
    assert counting == list(range(11 if kind == "list" else 5))


@pytest.mark.parametrize(("size", "shares", "rounds"), [(1, 3, 1), (3, 3, 1), (4, 3, 2), (7, 3, 3), (2, 5, 1)])
@pytest.mark.parametrize("kind", ["list", "own sampler"])
def test_batches_are_dealt_in_turn_and_stand_ins_come_last(kind, size, shares, rounds):
    samples = size if kind == "list" else 2 * size
    found = check(lambda: LOADERS[kind](samples), shares)
    for share, batches in enumerate(found):
        assert [indexed.batch_idx for indexed in batches if indexed.is_real] == list(range(share, size, shares))
        assert [indexed.is_real for indexed in batches] == [round * shares + share < size for round in range(rounds)]


def test_an_empty_loader_gives_nothing_to_anybody():
    for make in (list, lambda: LOADERS["batches"](0), lambda: LOADERS["stream"](0), lambda: Chained([])):
        assert check(make, 3) == [[], [], []]


@examples(30)
@given(
    size=st.integers(1, 20), batch_size=st.one_of(st.none(), st.integers(1, 4)), shares=st.integers(1, 4), shuffle=st.booleans()
)
def test_of_a_dataset_a_process_reads_nothing_but_its_own_batches(size, batch_size, shares, shuffle):
    def read(processes):
        dataset = Numbers(size)
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
        mine = [indexed.batch.flatten().tolist() for indexed in shard_batches(loader, processes)]
        return dataset.read, mine

    found = simulate(shares, read)
    assert all(read == [int(x) for batch in mine for x in batch] for read, mine in found)
    rounds = -(-size // (batch_size or 1) // shares)
    assert all(len(mine) == rounds for _, mine in found)
    assert {index for read, _ in found for index in read} == set(range(size))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_loader_made_for_one_of_several_processes_is_read_as_that_of_one_device(shuffle, drop_last, epoch):
    def make(rank, count):
        dataset = Numbers(11)
        sampler = DistributedSampler(dataset, count, rank, shuffle=shuffle, seed=4)
        sampler.set_epoch(epoch)
        return DataLoader(dataset, batch_size=2, sampler=sampler, drop_last=drop_last)

    alone = [plain(batch) for batch in make(0, 1)]
    found = simulate(3, lambda p: [(t.batch_idx, plain(t.batch)) for t in shard_batches(make(p.data_rank, 3), p) if t.is_real])
    assert [batch for _, batch in sorted(indexed for batches in found for indexed in batches)] == alone


def test_a_dataset_without_a_length_is_no_obstacle_where_its_sampler_knows_the_indices():
    class Endless(Dataset):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([float(index)])

    check(lambda: DataLoader(Endless(), batch_size=2, sampler=[5, 3, 1]), 2)


class Lazy:
    """A sampler that draws each index when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(7):
            yield int(torch.randint(20, (1,)))


@pytest.mark.parametrize("kind", [Numbers, Drawing])
def test_a_sampler_that_draws_as_it_goes_draws_the_same(kind):
    check(lambda: DataLoader(kind(20), batch_size=2, sampler=Lazy()), 2)


def test_a_batch_sampler_with_the_sampler_and_size_of_torch_is_taken_at_its_word():
    check(lambda: DataLoader(Numbers(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=True)), 2)


def test_what_a_batch_draws_does_not_depend_on_what_the_others_drew():
    """Not even in one process: the caller, who draws between two batches, changes nothing."""

    def read(draws):
        with preserve_state(torch.nn.Identity()):
            found = []
            for indexed in shard_batches(DataLoader(Drawing(6), batch_size=2), Processes()):
                found.append(plain(indexed.batch))
                torch.rand(draws)
                np.random.rand(draws)
            return found

    assert read(0) == read(5)


def test_each_batch_draws_its_own_numbers():
    drawn = [indexed.batch[2] for indexed in batches_of(lambda: LOADERS["drawing"](8), Processes())]
    assert len({number for numbers in drawn for number in numbers}) == 12


def kept_open(rank: int, same: bool) -> Any:
    return DataLoader(Numbers(12), batch_size=2, sampler=list(range(12))[:: 1 if same or not rank else -1])


def split_by_rank(rank: int, same: bool) -> Any:
    return [torch.full((2,), float(i)) for i in range(6)][0 if same else rank :: 1 if same else 2]


def another_size(rank: int, same: bool) -> Any:
    return DataLoader(Numbers(8 if same else 8 + rank), batch_size=2, sampler=range(8))


def longer(rank: int, same: bool) -> Any:
    return lists(5 if same else 5 + 2 * rank)


def emptier(rank: int, same: bool) -> Any:
    return lists(4)[: 0 if not same and rank else 4]


def shuffled_by_rank(rank: int, same: bool) -> Any:
    return DataLoader(Numbers(12), shuffle=True, generator=torch.Generator().manual_seed(0 if same else rank))


DIFFERENT = [kept_open, split_by_rank, another_size, longer, emptier, shuffled_by_rank]


@pytest.mark.parametrize("make", DIFFERENT)
@pytest.mark.parametrize("shares", [2, 3])
def test_processes_that_would_not_read_the_same_are_refused_everywhere(make, shares):
    fine = simulate(shares, lambda p: len(list(shard_batches(make(p.data_rank, True), p))))
    assert len(set(fine)) == 1 and isinstance(fine[0], int)
    found = simulate(shares, lambda p: list(shard_batches(make(p.data_rank, False), p)))
    assert all(isinstance(error, UnlearnError) for error in found), found


def test_the_refusal_says_what_to_do():
    (first, second) = simulate(2, lambda p: list(shard_batches(kept_open(p.data_rank, False), p)))
    for error in (first, second):
        assert "batches differ across ranks" in str(error) and "on every rank (without split_by_node" in str(error)


def test_what_cannot_be_compared_is_trusted():
    class Opaque:
        def __init__(self, number: int) -> None:
            self.number = number

    found = simulate(2, lambda p: [(t.batch_idx, t.batch.number) for t in shard_batches([Opaque(i) for i in range(4)], p)])
    assert found == [[(0, 0), (2, 2)], [(1, 1), (3, 3)]]


# ---- in real processes


def in_one_of_several(size: int) -> list[Any]:
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(torch.distributed.get_rank())
    processes = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    loaders = [
        DataLoader(Drawing(size), batch_size=2),
        DataLoader(Numbers(size), batch_size=2, shuffle=True, num_workers=1),
        Chained([DataLoader(Numbers(size), batch_size=3), DataLoader(Stream(size), batch_size=2), lists(2)]),
    ]
    return [[indexed._replace(batch=plain(indexed.batch)) for indexed in shard_batches(loader, processes)] for loader in loaders]


def alone(size: int) -> list[Any]:
    multiprocessing.current_process()._config["daemon"] = False
    loaders = [
        DataLoader(Drawing(size), batch_size=2),
        DataLoader(Numbers(size), batch_size=2, shuffle=True, num_workers=1),
        Chained([DataLoader(Numbers(size), batch_size=3), DataLoader(Stream(size), batch_size=2), lists(2)]),
    ]
    return [
        [indexed._replace(batch=plain(indexed.batch)) for indexed in shard_batches(loader, Processes())] for loader in loaders
    ]


def test_three_real_processes_read_what_one_reads():
    (one,) = in_processes(1, alone, 9)
    found = in_processes(3, in_one_of_several, 9)
    for place in range(3):
        counting = [indexed for batches in found for indexed in batches[place] if indexed.is_real]
        assert sorted(counting, key=lambda indexed: indexed.batch_idx) == one[place]
        assert len({len(batches[place]) for batches in found}) == 1


def refused(kind: Any) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    processes = Processes(rank, 2)
    with processes.together():
        list(shard_batches(kind(rank, False), processes))


@pytest.mark.parametrize("kind", [kept_open, split_by_rank])
def test_two_real_processes_with_different_loaders_end_both(kind):
    for ended in in_processes(2, refused, kind, timeout=30):
        assert isinstance(ended, Ended)
        assert "batches differ across ranks" in ended.message

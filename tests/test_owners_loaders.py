"""A loader is its owner's: what it serves reaches the module as it is, or it is refused with what to give instead."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from _amounts import examples
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from _tiny import Classifier, blobs, part, trained, trainer
from slug_lightning import UnlearnError
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.distributed.batch_sharding import shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.tensors.digests import digest

SPLITS = ("train", "val", "test")


# ---- what a loader serves, over the three splits


class Numbers(Dataset):
    """Sample i is i; of list of indices it is a batch, and of a text its number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.offset = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, (list, Tensor)):
            return torch.stack([self[int(one)] for one in index])
        return torch.tensor(float(index.removeprefix("key") if isinstance(index, str) else index)) + self.offset


class Plain(DataLoader):
    """Adds nothing to how it is read, as torch_geometric's: only arguments of its own."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(Numbers(size), collate_fn=lambda samples: 2 * torch.stack(samples), **options)


class Doubling(DataLoader):
    """Does more than torch while it is read, as prefetchers do."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


class Neighbours:
    """A batch sampler: batches of neighbours, of changing sizes; they come in another order each time."""

    def __init__(self, size: int) -> None:
        self.batches = [list(own) for own in np.split(np.arange(size), range(2, size, 3))]

    def __iter__(self) -> Any:
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())

    def __len__(self) -> int:
        return len(self.batches)


class Endless:
    """A sampler without an end or a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        while True:
            yield from torch.randperm(self.size)


def lists(size: int) -> BatchSampler:
    return BatchSampler(RandomSampler(range(size)), 2, drop_last=False)


# By how many times its number a sample is served.
LOADERS = {
    "shuffled": (1, lambda size: DataLoader(Numbers(size), 2, shuffle=True)),
    "shuffled by a generator": (1, lambda size: DataLoader(Numbers(size), 2, shuffle=True, generator=torch.Generator())),
    "a class of its own, read as torch's": (2, lambda size: Plain(size, batch_size=2, shuffle=True)),
    "lists": (1, lambda size: DataLoader(Numbers(size), None, sampler=lists(size))),
    "tensors of indices": (1, lambda size: DataLoader(Numbers(size), None, sampler=torch.randperm(size).split(2))),
    "keys": (1, lambda size: DataLoader(Numbers(size), 2, sampler=[f"key{i}" for i in range(size)])),
    "keys, drawn": (1, lambda size: DataLoader(Numbers(size), 2, sampler=RandomSampler([f"key{i}" for i in range(size)]))),
    "endless": (1, lambda size: DataLoader(Numbers(size), 2, sampler=Endless(size))),
    "batch sampler": (1, lambda size: DataLoader(Numbers(size), batch_sampler=Neighbours(size))),
    "subclass": (2, lambda size: Doubling(Numbers(size), 2)),
    "subclass, shuffled": (2, lambda size: Doubling(Numbers(size), 2, shuffle=True)),
    "subclass, batch sampler": (2, lambda size: Doubling(Numbers(size), batch_sampler=Neighbours(size))),
}


def resolved(loader: Any) -> dict[str, Any]:
    return resolve_loaders({"it": loader}, DataLoader(torch.arange(8.0) - 99), None).forget["it"]


def served(splits: dict[str, Any]) -> dict[str, list[list[float]]]:
    return {split: [batch.tolist() for _, batch, _ in shard_batches(splits[split], Processes())] for split in SPLITS}


@pytest.mark.parametrize("name", LOADERS)
@examples(10)
@given(size=st.integers(12, 40))
def test_every_sample_is_served_once_as_its_owner_serves_it(name, size):
    factor, make = LOADERS[name]
    with preserve_state(nn.Identity()):
        splits = resolved(make(size))
        found = served(splits)
        assert all(found.values())
        every = [value for batches in found.values() for batch in batches for value in batch]
        assert sorted(every) == [factor * i for i in range(size)]
        assert served(splits) == found, "the same parts whenever they are read"


@examples(20)
@given(size=st.integers(12, 40), kind=st.sampled_from(["batch sampler", "subclass, batch sampler"]))
def test_batches_that_were_put_together_stay_together(size, kind):
    factor, make = LOADERS[kind]
    with preserve_state(nn.Identity()):
        found = [batch for batches in served(resolved(make(size))).values() for batch in batches]
    assert sorted(found) == [[float(factor * i) for i in batch] for batch in Neighbours(size).batches]


def test_splitting_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    for _, make in LOADERS.values():
        loader = make(20)
        torch.set_rng_state(state)
        resolved(loader)
        assert torch.equal(torch.get_rng_state(), state)


def offset(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.offset = 100


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_set_up_as_their_owner_wants(persistent):
    loader = DataLoader(Numbers(12), 2, num_workers=1, worker_init_fn=offset, persistent_workers=persistent)
    splits = resolved(loader)
    assert all(splits[split].persistent_workers == persistent for split in SPLITS)
    found = served(splits)
    assert sorted(value for batches in found.values() for batch in batches for value in batch) == list(range(100, 112))


@pytest.mark.parametrize(
    "options", [{"timeout": 9, "num_workers": 1}, {"prefetch_factor": 3, "num_workers": 1}, {"generator": torch.Generator()}]
)
def test_options_of_a_loader_are_kept(options):
    for loader in resolved(DataLoader(Numbers(12), 2, **options)).values():
        assert {name: getattr(loader, name) for name in options} == options


class Overlapping(Neighbours):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.batches[-1][-1] = 0


THREE = r"three loaders, forget=\{'a name': \{'train': …, 'val': …, 'test': …\}\}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataLoader(Numbers(20), batch_sampler=Overlapping(20)),
            r"batch_sampler=… \(Overlapping\) puts the same samples",
        ),
        (lambda: DataLoader(Numbers(5), batch_sampler=Neighbours(5)), r"batch_sampler=… \(Neighbours\) makes 2 batches"),
        (lambda: DataLoader(Numbers(20), None, sampler=Overlapping(20)), r"sampler=… \(Overlapping\) puts the same samples"),
        (lambda: DataLoader(Numbers(20), 2, sampler=itertools.count()), r"sampler=… \(count\) has no end"),
        (lambda: Doubling(Numbers(6), 2), "3 batches are too few to split whole batches"),
    ],
    ids=["shared", "few", "lists", "endless", "few of a subclass"],
)
def test_what_cannot_be_split_is_refused_with_the_remedy(make, message):
    with pytest.raises(UnlearnError, match=f"^forget: {message}.*{THREE}"):
        resolved(make())


def test_a_subclass_that_serves_other_batches_each_time_is_refused_when_it_does():
    splits = resolved(Doubling(Numbers(24), 2, shuffle=True, generator=torch.Generator()))
    with preserve_state(nn.Identity()), pytest.raises(UnlearnError, match=f"^forget: the Doubling serves other .* {THREE}"):
        served(splits)


def test_parts_of_one_dataset_are_told_apart_by_their_keys():
    data = Numbers(40)
    ways = {
        "keys": lambda chosen: DataLoader(data, 2, sampler=[f"key{i}" for i in chosen]),
        "lists": lambda chosen: DataLoader(data, None, sampler=torch.tensor([*chosen]).split(2)),
        "batches": lambda chosen: DataLoader(data, batch_sampler=torch.tensor([*chosen]).split(2)),
        "slices": lambda chosen: DataLoader(data, None, sampler=[slice(i, i + 2) for i in chosen[::2]]),
    }
    for way in ways.values():
        for make in (lambda part, way=way: way(part), lambda part, way=way: dict.fromkeys(SPLITS, way(part))):
            resolve_loaders({"it": make(range(12))}, make(range(12, 40)), None)
            with pytest.raises(UnlearnError, match="the same data as retain"):
                resolve_loaders({"it": make(range(12))}, make(range(40)), None)


class Normalising(DataLoader):
    def __iter__(self) -> Any:
        return (((x - 100) / 10, y) for x, y in super().__iter__())


class Looking(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(trained().state_dict())
        self.furthest = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.furthest = max(self.furthest, float(batch[0].abs().max()))
        return super().training_step(batch, batch_idx)


def test_a_module_sees_in_unlearning_what_it_sees_in_training():
    def loader(forget: bool) -> DataLoader:
        x, y = (torch.stack(column) for column in zip(*part(forget), strict=True))
        return Normalising(TensorDataset(100 + 10 * x, y), 8)

    callback = unlearn_callback(forget=loader(True), retain=loader(False), retain_tolerance=20.0)
    trainer(callback).fit(module := Looking(), loader(False), loader(False))
    assert module.furthest < 20 and callback.report.status == "unlearned"


# ---- how many samples a batch has


class Boxes(pl.LightningModule):
    """A detector: a batch has some pictures, and many more boxes than pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained().net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        of_box = cross_entropy(self.net(batch["boxes"]), batch["kinds"], reduction="none")
        counts = torch.tensor(batch["counts"])
        return torch.stack([own.mean() for own in of_box.split(batch["counts"])]).mean() + 0 * counts.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pictures(Boxes):
    def batch_size(self, batch: Any) -> int:
        return len(batch["counts"])


def collate_boxes(pictures: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    boxes, kinds = zip(*pictures, strict=True)
    return {"boxes": torch.cat(boxes), "kinds": torch.cat(kinds), "counts": [len(own) for own in boxes], "sizes": torch.ones(2)}


def pictures(forget: bool) -> list[tuple[Tensor, Tensor]]:
    """Pictures with one to four boxes each, all of the class to forget or none."""
    x, y = (torch.stack(column) for column in zip(*part(forget), strict=True))
    sizes = [1 + number % 4 for number in range(len(x) * 2 // 5)]
    return list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))


def detecting(module: pl.LightningModule) -> Any:
    loaders = {
        kind: {
            split: DataLoader(pictures(kind == "forget")[place::3], 7, collate_fn=collate_boxes)
            for place, split in enumerate(SPLITS)
        }
        for kind in ("forget", "retain")
    }
    callback = unlearn_callback(forget={"two": loaders["forget"]}, retain=loaders["retain"], retain_tolerance=20.0)
    trainer(callback).fit(module, loaders["retain"]["train"])
    return callback.report


def test_a_detectors_pictures_are_counted_by_its_own_word():
    report = detecting(Pictures())
    net = trained().eval().net
    with torch.no_grad():
        for kind in ("forget", "retain"):
            for split, found in (("val", report.search_before), ("test", report.before)):
                chosen = pictures(kind == "forget")[SPLITS.index(split) :: 3]
                expected = torch.stack([cross_entropy(net(boxes), kinds) for boxes, kinds in chosen]).mean()
                assert found[kind]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert report.cost["backward_samples"] == sum(len(pictures(forget)[0::3]) for forget in (True, False))


def test_a_detectors_pictures_are_not_taken_for_boxes():
    with pytest.raises(UnlearnError, match=r"first dimensions .* disagree, 2, \d+.*define a method batch_size\(batch\)"):
        detecting(Boxes())


@dataclass(slots=True)
class Graph:
    x: Tensor
    y: Tensor

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device), self.y.to(device))


@dataclass
class Named(Graph):
    """Has a `__dict__` besides the slots."""

    name: str = ""


class OfGraphs(Boxes):
    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch.x), batch.y)


def test_batches_of_a_class_with_slots_are_taken():
    def collate(samples: list[Any]) -> Graph:
        return Graph(*map(torch.stack, zip(*samples, strict=True)))

    forget, retain = (DataLoader(part(forget), 16, collate_fn=collate) for forget in (True, False))
    callback = unlearn_callback(forget=forget, retain=retain, retain_tolerance=20.0)
    trainer(callback).fit(OfGraphs(), retain)
    assert callback.report.status == "unlearned"


@pytest.mark.parametrize("kind", [Graph, Named])
def test_what_is_in_slots_counts_in_a_digest(kind):
    x, y = blobs()[0]
    assert digest(kind(x, y)) == digest(kind(x.clone(), y.clone())) != digest(kind(x + 1, y))
    assert digest(Named(x, y, "a")) != digest(Named(x, y, "b"))

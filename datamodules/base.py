"""Forget and retain, each in three parts: one for the gradient, one for the search, one for the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
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

from slug_lightning.errors import UnlearnError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Batches = Iterable[Any]
Prepare = Callable[[pl.LightningDataModule], Any]


class UnlearnLoaders(NamedTuple):
    """What a run reads: for `forget` and `retain` the batches of each split, and what was decided on the way.

    Attributes:
        forget: batches of what is to be forgotten, by split: `train` for the gradient, `val` for the search,
            `test` for the report.
        retain: the same of what is to be kept.
        notes: sentences for the report, such as how a single set was split.
    """

    forget: dict[Split, Batches]
    retain: dict[Split, Batches]
    notes: list[str]


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
    """The batches of a stream whose number, modulo 4, is one of `turns`: how a stream without indices is split."""

    def __init__(self, loader: Batches, turns: set[int]) -> None:
        self.loader = loader
        self.turns = turns

    def __iter__(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(self.loader):
            if number % 4 in self.turns:
                yield batch
        if number < min(self.turns):
            raise UnlearnError(f"a stream has only {number + 1} batches; give at least 4, or a loader for each split")

    def __len__(self) -> int:
        return sum(number % 4 in self.turns for number in range(len(cast(Sized, self.loader))))


class First:
    """The first so many batches of a loader.

    Example:
        >>> list(First([1, 2, 3], 2)), len(First([1], 2))
        ([1, 2], 1)
    """

    def __init__(self, loader: Batches, count: int) -> None:
        self.loader = loader
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.count)

    def __len__(self) -> int:
        return min(self.count, len(cast(Sized, self.loader)))


def split_indices(count: int, seed: int = 0) -> dict[Split, list[int]]:
    """Divide `range(count)` at random, but always alike: about 1/2 train, 1/4 val, 1/4 test, none of them empty.

    Args:
        count: how many samples there are, at least 3.
        seed: of the permutation.

    Raises:
        ValueError: if there are fewer than 3 samples.

    Example:
        >>> {split: len(part) for split, part in split_indices(10).items()}
        {'train': 6, 'val': 2, 'test': 2}
    """
    if count < 3:
        raise ValueError(f"{count} samples cannot be divided into three parts")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    part = max(1, count // 4)
    return {"train": order[2 * part :], "val": order[:part], "test": order[part : 2 * part]}


def three_parts(
    kind: str, train: Dataset, val: Dataset | None, test: Dataset | None, seed: int = 0
) -> tuple[dict[Split, Dataset], str]:
    """Complete the three parts of one kind: a part that is missing is split off `train`.

    `train` is mixed in any case: samples of one class tend to stand together, and a contrastive batch needs them apart.

    Args:
        kind: "forget" or "retain", for messages.
        train: map-style dataset for the gradient.
        val: the one for the search, or None.
        test: the one for the report, or None.
        seed: of the split and of the order.

    Returns:
        The parts, and a sentence that says how they came about.

    Raises:
        UnlearnError: if `train` is empty or too small to be split.

    Example:
        >>> parts, note = three_parts("forget", list(range(8)), None, None)
        >>> note
        'forget: one set of 8 samples was split into 4 (gradient), 2 (search), 2 (report), seed 0'
    """
    count = len(cast(Sized, train))
    given: dict[Split, Dataset | None] = {"val": val, "test": test}
    if any(dataset is not None and len(cast(Sized, dataset)) == 0 for dataset in (train, val, test)):
        raise UnlearnError(f"{kind}: the set is empty; give at least one sample for each of gradient, search and report")
    missing = [split for split, dataset in given.items() if dataset is None]
    if missing and count < 3:
        raise UnlearnError(
            f"{kind}: {count} samples are too few to keep gradient, search and report apart; give at least 3, "
            f"or an UnlearnDataModule with {kind}_val and {kind}_test of your own"
        )
    order = split_indices(count, seed) if missing else {"train": _mixed(count, seed), "val": [], "test": []}
    parts = {split: part if (part := given.get(split)) is not None else Subset(train, order[split]) for split in SPLITS}
    if len(missing) == 1:  # the share of a part that was given stays with the gradient
        other = next(split for split in given if split not in missing)
        parts["train"] = Subset(train, order["train"] + order[other])
    sizes = "{} (gradient), {} (search), {} (report)".format(*(len(cast(Sized, parts[split])) for split in SPLITS))
    how = f"one set of {count} samples was split into {sizes}, seed {seed}" if missing else f"three sets of {sizes}"
    return parts, f"{kind}: {how}"


def _mixed(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class UnlearnDataModule(pl.LightningDataModule):
    """Where forget and retain come from: two datasets, or up to six.

    A set without a `val` or `test` of its own is split (about 1/2 gradient, 1/4 search, 1/4 report), always alike
    for the same `seed`, and the report says so.

    As a Lightning datamodule it serves the retain set, so that `then="continue"` trains on what is kept.
    A subclass that makes its sets late overrides `setup` and calls `set_parts` there.

    Args:
        forget: map-style dataset of what is to be forgotten; its samples carry the labels or captions that the
            module's steps expect.
        retain: map-style dataset of what is to be kept.
        forget_val: forget data for the search, if not to be split off `forget`.
        forget_test: forget data for the report, likewise.
        retain_val: retain data for the search, likewise.
        retain_test: retain data for the report, likewise.
        batch_size: samples in a batch. A contrastive loss depends on it.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the splits and of the order of samples within them.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = UnlearnDataModule(TensorDataset(torch.arange(8)), TensorDataset(torch.arange(100, 140)), batch_size=4)
        >>> [len(batch[0]) for batch in data.forget_dataloader("train")]
        [4]
        >>> sum(len(batch[0]) for batch in data.retain_dataloader("val"))
        10
    """

    def __init__(
        self,
        forget: Dataset | None = None,
        retain: Dataset | None = None,
        *,
        forget_val: Dataset | None = None,
        forget_test: Dataset | None = None,
        retain_val: Dataset | None = None,
        retain_test: Dataset | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.seed = seed
        self.notes: dict[str, str] = {}
        self._parts: dict[str, dict[Split, Dataset]] = {}
        if forget is not None:
            self.set_parts("forget", forget, forget_val, forget_test)
        if retain is not None:
            self.set_parts("retain", retain, retain_val, retain_test)

    def set_parts(self, kind: str, train: Dataset, val: Dataset | None = None, test: Dataset | None = None) -> None:
        """Set the data of `kind`, "forget" or "retain"; what is missing is split off `train`."""
        self._parts[kind], self.notes[kind] = three_parts(kind, train, val, test, self.seed)

    def forget_dataloader(self, split: Split) -> DataLoader:
        """Batches of what is to be forgotten; `split` is "train" (gradient), "val" (search) or "test" (report)."""
        return self._loader("forget", split)

    def retain_dataloader(self, split: Split) -> DataLoader:
        """Batches of what is to be kept; `split` as in `forget_dataloader`."""
        return self._loader("retain", split)

    def train_dataloader(self) -> DataLoader:
        return self.retain_dataloader("train")

    def val_dataloader(self) -> DataLoader:
        return self.retain_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.retain_dataloader("test")

    def _loader(self, kind: str, split: Split) -> DataLoader:
        if kind not in self._parts:
            raise UnlearnError(f"{kind}: no dataset was given; pass {kind}=… to {type(self).__name__}, or call its setup()")
        return DataLoader(
            self._parts[kind][split],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )


def resolve_loaders(
    forget: Any,
    retain: Any,
    datamodule: pl.LightningDataModule | None,
    prepare: Prepare = lambda datamodule: datamodule.prepare_data(),
) -> UnlearnLoaders:
    """Turn whatever a user gave into three parts of forget and retain.

    Args:
        forget: a DataLoader or any iterable of batches, a list of them (read one after the other), a
            LightningDataModule (its train, val and test loaders serve gradient, search and report), a dict of loaders
            by split ("train", "val", "test"), or None to take it from `datamodule`.
        retain: likewise.
        datamodule: the trainer's own, asked for what is None: an `UnlearnDataModule`, or any datamodule whose
            loaders are dicts with the keys "forget" and "retain".
        prepare: calls a datamodule's `prepare_data`; of several processes one may do so for all.

    Raises:
        UnlearnError: if there is no forget or retain set, if one is empty, or if both are the same data.
    """
    named = {"forget": forget, "retain": retain}
    parts: dict[str, dict[Split, Batches]] = {}
    notes = []
    for kind, source in named.items():
        source = _of_datamodule(kind, datamodule) if source is None else source
        parts[kind], note = _three_loaders(kind, source, prepare)
        notes.append(note)
        shared = _samples({"val": parts[kind]["val"]}) & _samples({"test": parts[kind]["test"]})
        if shared and min(index for _, index in shared) >= 0:  # streams are known by their source alone
            notes.append(f"{kind}: search and report data share {len(shared)} samples, so the report is no independent check")
    _refuse_same_data(parts["forget"], parts["retain"])
    return UnlearnLoaders(parts["forget"], parts["retain"], notes)


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
    limited: dict[str, dict[Split, Batches]] = {"forget": {}, "retain": {}}
    notes = list(loaders.notes)
    for split in SPLITS:
        name, limit = _limit(trainer, split)
        sizes = []
        for kind, parts in (("forget", loaders.forget), ("retain", loaders.retain)):
            limited[kind][split] = _first(kind, parts[split], name, limit)
            sizes.append(f"{_count(limited[kind][split])} of {_count(parts[split])} {kind} batches")
        if limit == 0:
            notes.append(f"{name}=0: no {split} loop of Lightning's, but the {_USES[split]} read the whole sets")
        elif not _is_whole(limit):
            notes.append(f"{name}={limit}: the {_USES[split]} read {' and '.join(sizes)}")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        notes.append("fast_dev_run: so few batches say nothing about the model")
    return UnlearnLoaders(limited["forget"], limited["retain"], notes)


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


def _count(batches: Batches) -> str:
    """How many batches there are, as far as is known."""
    if (total := sized_len(batches)) is not None:
        return str(total)
    return f"at most {batches.count}" if isinstance(batches, First) else "an unknown number of"


def _of_datamodule(kind: str, datamodule: pl.LightningDataModule | None) -> Any:
    if isinstance(datamodule, UnlearnDataModule):
        return datamodule
    if datamodule is not None:
        train = _loader_of(datamodule, "train")
        if isinstance(train, Mapping) and kind in train:
            datamodule.setup("test")
            loaders = {"train": train} | {split: _loader_of(datamodule, split) for split in ("val", "test")}
            return {split: loader[kind] for split, loader in loaders.items() if isinstance(loader, Mapping) and kind in loader}
    raise UnlearnError(
        f"{kind}: nothing was given and the trainer's datamodule has none; pass {kind}=… (a DataLoader, a "
        "LightningDataModule) to the callback, or fit with an UnlearnDataModule"
    )


def _loader_of(datamodule: pl.LightningDataModule, split: Split) -> Any:
    """A datamodule's loader of one split, or None where it defines none."""
    name = f"{split}_dataloader"
    loader = getattr(datamodule, name)  # `from_datasets` sets it on the instance
    inherited = getattr(loader, "__func__", None) is getattr(pl.LightningDataModule, name)
    return None if inherited else loader()


def _three_loaders(kind: str, source: Any, prepare: Prepare) -> tuple[dict[Split, Batches], str]:
    if isinstance(source, UnlearnDataModule):
        prepare(source)
        source.setup("fit")
        loaders: dict[Split, Batches] = {split: source._loader(kind, split) for split in SPLITS}
        return loaders, source.notes[kind]
    if isinstance(source, pl.LightningDataModule):
        prepare(source)
        for stage in ("fit", "test"):
            source.setup(stage)
        source = {split: loader for split in SPLITS if (loader := _loader_of(source, split)) is not None}
    if isinstance(source, Mapping):
        if "train" not in source:
            raise UnlearnError(f"{kind}: the dict has no 'train' loader, only {sorted(source)}")
        given = {split: _chained(source[split]) for split in SPLITS if split in source}
        if len(given) == len(SPLITS):
            return given, f"{kind}: three loaders were given"
        parts, note = _three_loaders(kind, source["train"], prepare)
        for split in set(given) - {"train"}:  # what was split off for it serves the gradient after all
            parts["train"] = Chained([parts["train"], parts[split]])
            parts[split] = given[split]
            note += f"; instead of the {split} part, a loader that was given"
        return parts, note
    if isinstance(source, (list, tuple)):
        if not source:
            raise UnlearnError(f"{kind}: the list of loaders is empty")
        each = [_three_loaders(kind, loader, prepare) for loader in source]
        return {split: Chained(parts[split] for parts, _ in each) for split in SPLITS}, "; ".join(n for _, n in each)
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        return _split_loader(kind, source)
    if not isinstance(source, Iterable) or isinstance(source, (torch.Tensor, str)):
        raise UnlearnError(f"{kind}: a {type(source).__name__} is no DataLoader, LightningDataModule or list of loaders")
    if iter(source) is source:
        raise UnlearnError(f"{kind}: an iterator can be read only once; give something that starts anew, like a DataLoader")
    turns: dict[Split, set[int]] = {"train": {0, 1}, "val": {2}, "test": {3}}
    stream: dict[Split, Batches] = {split: EveryFourth(source, turn) for split, turn in turns.items()}
    return stream, f"{kind}: of every four batches of the stream, two serve the gradient, one the search, one the report"


def _chained(loader: Any) -> Batches:
    """One loader as it is; the loaders of a dict or list one after the other."""
    if isinstance(loader, Mapping):
        loader = list(loader.values())
    return Chained(loader) if isinstance(loader, (list, tuple)) else loader


def _split_loader(kind: str, loader: DataLoader) -> tuple[dict[Split, Batches], str]:
    """Split a DataLoader's dataset, and read the parts with the loader's own settings."""
    sampler, batch_size = loader.sampler, loader.batch_size
    if type(loader.batch_sampler) is BatchSampler:
        sampler, batch_size = loader.batch_sampler.sampler, loader.batch_sampler.batch_size
    elif loader.batch_sampler is not None:
        batches = list(cast(Iterable[list[int]], loader.batch_sampler))
        sampler, batch_size = [i for batch in batches for i in batch], max(map(len, batches), default=1)
    meant = Subset(loader.dataset, _meant(sampler, len(cast(Sized, loader.dataset))))
    parts, note = three_parts(kind, meant, None, None)
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
    }
    return {split: DataLoader(part, batch_size=batch_size, **options) for split, part in parts.items()}, note


def _meant(sampler: Iterable[int], count: int) -> list[int]:
    """Which of `count` samples a sampler means, each once: it may repeat some, and draw them at random."""
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero()[:, 0].tolist()
    if isinstance(sampler, (RandomSampler, DistributedSampler)):  # the latter serves one process its part
        return list(range(count))
    return sorted({int(i) for i in sampler})


def _refuse_same_data(forget: dict[Split, Batches], retain: dict[Split, Batches]) -> None:
    """Refuse one set under both names, and warn where a part of it is."""
    forgotten, kept = _samples(forget), _samples(retain)
    shared = forgotten & kept
    if shared == forgotten and forgotten:
        raise UnlearnError(
            "forget and retain are the same data, or forget is a part of retain; leave out of retain what is to be forgotten"
        )
    if shared:
        warnings.warn(f"forget, retain: {len(shared)} of {len(forgotten)} forget samples are in retain too", stacklevel=3)


def _samples(loaders: dict[Split, Batches]) -> set[tuple[int, int]]:
    """Which samples loaders read, as (identity of the dataset, index); streams by identity alone."""
    found: set[tuple[int, int]] = set()
    for batches in loaders.values():
        for loader in _sources(batches):
            dataset = getattr(loader, "dataset", None)
            if dataset is None or isinstance(dataset, IterableDataset):
                found.add((id(dataset if dataset is not None else loader), -1))
                continue
            sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
            indices = _meant(sampler, len(dataset))
            while isinstance(dataset, Subset):
                indices = [int(dataset.indices[i]) for i in indices]
                dataset = dataset.dataset
            found.update((id(dataset), i) for i in indices)
    return found


def _sources(batches: Any) -> Iterator[Any]:
    """The loaders that batches come from."""
    if isinstance(batches, Chained):
        for loader in batches.loaders:
            yield from _sources(loader)
    elif isinstance(batches, First):
        yield from _sources(batches.loader)
    else:  # a stream is one source, whatever it consists of
        yield batches.loader if isinstance(batches, EveryFourth) else batches

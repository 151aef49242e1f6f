"""Forget and retain, each in three parts: one for the gradient, one for the search, one for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Split
from slug_lightning.utils.names import by_concept, concept_of, labelled, listed


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
    """Complete the three parts of one set: a part that is missing is split off `train`.

    `train` is mixed in any case: samples of one class tend to stand together, and a contrastive batch needs them apart.

    Args:
        kind: "forget" or "retain", with the concept where there are several, for messages.
        train: map-style dataset for the gradient.
        val: the one for the search, or None.
        test: the one for the report, or None.
        seed: of the split and of the order.

    Returns:
        The parts, and a sentence that says how they came about.

    Raises:
        UnlearnError: if a part is empty, or if `train` is too small to be split.

    Example:
        >>> parts, sentence = three_parts("forget", list(range(8)), None, None)
        >>> sentence
        'one set of 8 samples was split into 4 (gradient), 2 (search), 2 (report), seed 0'
    """
    count = len(cast(Sized, train))
    given: dict[Split, Dataset | None] = {"val": val, "test": test}
    if any(dataset is not None and len(cast(Sized, dataset)) == 0 for dataset in (train, val, test)):
        raise UnlearnError(f"{kind}: the set is empty; give at least one sample for each of gradient, search and report")
    missing = [split for split, dataset in given.items() if dataset is None]
    if missing and count < 3:
        raise UnlearnError(
            f"{kind}: {count} samples are too few to keep gradient, search and report apart; give at least 3, or sets of your "
            "own for search and report in an UnlearnDataModule"
        )
    order = split_indices(count, seed) if missing else {"train": _mixed(count, seed), "val": [], "test": []}
    parts = {split: part if (part := given.get(split)) is not None else Subset(train, order[split]) for split in SPLITS}
    if len(missing) == 1:  # the share of a part that was given stays with the gradient
        other = next(split for split in given if split not in missing)
        parts["train"] = Subset(train, order["train"] + order[other])
    sizes = "{} (gradient), {} (search), {} (report)".format(*(len(cast(Sized, parts[split])) for split in SPLITS))
    return parts, f"one set of {count} samples was split into {sizes}, seed {seed}" if missing else f"three sets of {sizes}"


def _mixed(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class UnlearnDataModule(pl.LightningDataModule):
    """Where forget and retain come from: two datasets, or up to six; for several concepts, a dict of each forget set.

    A set without a `val` or `test` of its own is split (about 1/2 gradient, 1/4 search, 1/4 report), always alike
    for the same `seed`, and the report says so.

    As a Lightning datamodule it serves the retain set, so that `then="continue"` trains on what is kept.
    A subclass that makes its sets late overrides `setup` and calls `set_parts` there.

    Args:
        forget: map-style dataset of what is to be forgotten; its samples carry the labels or captions that the
            module's steps expect. Several concepts: a dict of datasets by the concept's name.
        retain: map-style dataset of what is to be kept.
        forget_val: forget data for the search, if not to be split off `forget`. Of several concepts, a dict of those
            that have some.
        forget_test: forget data for the report, likewise.
        retain_val: retain data for the search, likewise.
        retain_test: retain data for the report, likewise.
        batch_size: samples in a batch. A contrastive loss depends on it.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the splits and of the order of samples within them.

    Attributes:
        notes: how each set was split, by its kind, as in `notes["retain"]`; of a concept with a name, `notes["forget 'cat'"]`.

    Raises:
        UnlearnError: if a set is empty or too small, or if the concepts' names cannot be told apart.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = UnlearnDataModule(TensorDataset(torch.arange(8)), TensorDataset(torch.arange(100, 140)), batch_size=4)
        >>> [len(batch[0]) for batch in data.forget_dataloader("train")]
        [4]
        >>> sum(len(batch[0]) for batch in data.retain_dataloader("val"))
        10
        >>> pets = {"cat": TensorDataset(torch.arange(8)), "dog": TensorDataset(torch.arange(8, 14))}
        >>> data = UnlearnDataModule(pets, TensorDataset(torch.arange(100, 140)))
        >>> data.concepts, len(data.forget_dataloader("train", "dog").dataset)
        (['cat', 'dog'], 4)
    """

    def __init__(
        self,
        forget: Dataset | dict[str, Dataset] | None = None,
        retain: Dataset | None = None,
        *,
        forget_val: Dataset | dict[str, Dataset] | None = None,
        forget_test: Dataset | dict[str, Dataset] | None = None,
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
        self._forget: dict[str | None, dict[Split, Dataset]] = {}  # None: a concept without a name of its own
        self._retain: dict[Split, Dataset] = {}
        if forget is not None:
            named = by_concept("forget", forget)
            val, test = alike("forget_val", forget_val, named), alike("forget_test", forget_test, named)
            for concept, dataset in named.items():
                self.set_parts("forget", dataset, val.get(concept), test.get(concept), concept=concept)
        if retain is not None:
            self.set_parts("retain", retain, retain_val, retain_test)

    @property
    def concepts(self) -> list[str]:
        """The names of the concepts to forget, as far as `setup` has made their sets."""
        return [concept_of(self) if name is None else name for name in self._forget]

    def set_parts(
        self,
        kind: str,
        train: Dataset,
        val: Dataset | None = None,
        test: Dataset | None = None,
        *,
        concept: str | None = None,
    ) -> None:
        """Set the data of `kind`, "forget" or "retain"; what is missing is split off `train`.

        Args:
            kind: "forget" or "retain".
            train: map-style dataset for the gradient.
            val: for the search.
            test: for the report.
            concept: of "forget": the name of the concept; call it once for each. None: the only one, without a name.
        """
        label = labelled(kind, concept)
        parts, sentence = three_parts(label, train, val, test, self.seed)
        self.notes[label] = f"{label}: {sentence}"
        if kind == "forget":
            self._forget[concept] = parts
        elif concept is not None:
            raise UnlearnError(f"concept: {kind} data belong to no concept; leave {concept!r} out")
        else:
            self._retain = parts

    def forget_dataloader(self, split: Split, concept: str | None = None) -> DataLoader:
        """Batches of what is to be forgotten.

        Args:
            split: "train" (gradient), "val" (search) or "test" (report).
            concept: which; None where there is but one.

        Raises:
            UnlearnError: if there is no such concept, or if there are several and none is named.
        """
        return self._loader(self._forget[self.key_of(concept)][split])

    def retain_dataloader(self, split: Split) -> DataLoader:
        """Batches of what is to be kept; `split` as in `forget_dataloader`."""
        if not self._retain:
            raise no_dataset("retain", self)
        return self._loader(self._retain[split])

    def train_dataloader(self) -> DataLoader:
        return self.retain_dataloader("train")

    def val_dataloader(self) -> DataLoader:
        return self.retain_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.retain_dataloader("test")

    def key_of(self, concept: str | None) -> str | None:
        """Under what a concept's sets are kept: its name, or None if it was given without one."""
        if not self._forget:
            raise no_dataset("forget", self)
        keys = dict(zip(self.concepts, self._forget, strict=True))
        if concept is None and len(keys) == 1:
            (concept,) = keys
        if concept not in keys:
            problem = "there are several, name one of" if concept is None else f"{concept!r} is none of"
            raise UnlearnError(f"concept: {problem} {listed(list(keys), 20)}")
        return keys[concept]

    def _loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )


def no_dataset(kind: str, datamodule: UnlearnDataModule) -> UnlearnError:
    """What to raise where the sets of `kind` are asked for before they are there."""
    return UnlearnError(f"{kind}: no dataset was given; pass {kind}=… to {type(datamodule).__name__}, or call its setup()")


def alike(argument: str, given: Any, forget: Mapping[str | None, Any]) -> dict[str | None, Any]:
    """An argument by concept, which may leave concepts out, but has no names other than those of the forget sets.

    Raises:
        UnlearnError: if it has other names.

    Example:
        >>> alike("forget_val", {"cat": [1]}, {"cat": [2], "dog": [3]})
        {'cat': [1]}
    """
    named = {} if given is None else by_concept(argument, given)
    if not named.keys() <= forget.keys():
        names = f"a dict by the concepts' names, {listed(list(forget), 20)}"
        raise UnlearnError(f"{argument}: give {'no dict, as the concept has no name' if None in forget else names}")
    return named

"""A forget set and a retain set, each split into train (gradient), val (search) and test (report)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, Split
from slug_lightning.utils.names import by_concept, concept_of, labelled, listed


def shuffled(count: int, seed: int) -> list[int]:
    """Return `range(count)` in a random order that depends on `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def split_indices(count: int, seed: int = 0) -> dict[Split, list[int]]:
    """Split `range(count)` at random into about 1/2 train, 1/4 val and 1/4 test, none of them empty."""
    if count < 3:
        raise ValueError(f"{count} samples cannot be split in three")
    order = shuffled(count, seed)
    part = max(1, count // 4)
    return {"train": order[2 * part :], "val": order[:part], "test": order[part : 2 * part]}


def make_splits(
    label: str, train: Any, val: Dataset | None = None, test: Dataset | None = None, seed: int = 0
) -> tuple[dict[Split, Dataset], str]:
    """Complete the splits of one set: those that are not given are split off `train`.

    `train` is shuffled in any case: samples of one class tend to stand together, and a contrastive batch needs them mixed.
    Returns the splits, and a sentence on how they came about.
    """
    given: dict[Split, Any] = {"train": train, "val": val, "test": test}
    if any(dataset is not None and len(dataset) == 0 for dataset in given.values()):
        raise UnlearnError(f"{label}: a dataset is empty; give at least one sample each for train, validation and test")
    missing = [split for split in SPLITS if given[split] is None]
    count = len(train)
    if missing and count < 3:
        raise UnlearnError(
            f"{label}: {count} samples are too few for separate train, validation and test splits; give at least 3, or "
            "validation and test sets of your own in an UnlearnDataModule"
        )
    indices = split_indices(count, seed) if missing else {"train": shuffled(count, seed)}
    for split in SPLITS[1:]:
        if split in indices and split not in missing:  # it was given: its share stays in train
            indices["train"] += indices.pop(split)
    splits = {split: Subset(train, indices[split]) if split in indices else given[split] for split in SPLITS}
    sizes = "{} train, {} validation, {} test".format(*(len(splits[split]) for split in SPLITS))
    return splits, f"one set of {count} samples split into {sizes} (seed {seed})" if missing else f"three sets: {sizes}"


class UnlearnDataModule(pl.LightningDataModule):
    """Serve a forget set and a retain set; for several concepts, one forget set each.

    Validation and test sets that are not given are split off: about 1/2 of the samples serve the gradient (train), 1/4 the
    search (val) and 1/4 the report (test). The split depends on `seed` alone, and the report states it.

    As a Lightning datamodule it serves the retain set, so that `then="continue"` trains on it.
    A subclass that makes its datasets late overrides `setup` and calls `set_parts` there.

    Args:
        forget: map-style dataset to forget; its samples carry the labels or captions that the module's steps expect.
            For several concepts, a dict of datasets by the concept's name.
        retain: map-style dataset to retain.
        forget_val: validation split of `forget`. For several concepts, a dict that may leave some out.
        forget_test: its test split, likewise.
        retain_val: validation split of `retain`.
        retain_test: its test split.
        near_retain: map-style dataset of what lies near the concept, to be retained as well and measured by itself; split as the
            others. For several concepts, a dict that may leave some out. Without it the callback chooses from `retain`.
        batch_size: samples in a batch. A contrastive loss depends on it.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the splits and of the order of samples within them.

    Attributes:
        notes: how each set was split, under "retain", "forget", or "forget 'cat'" for a concept with a name.

    Raises:
        UnlearnError: if a set is empty or too small, or if two concepts' names cannot be told apart.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pets = {"cat": TensorDataset(torch.arange(8)), "dog": TensorDataset(torch.arange(8, 14))}
        >>> data = UnlearnDataModule(pets, TensorDataset(torch.arange(100, 140)))
        >>> data.concepts, len(data.forget_dataloader("train", "dog").dataset)
        (['cat', 'dog'], 4)
    """

    same_forget_splits = False
    """Whether a forget set is the same samples in all splits by design. A subclass that sets it says so in `notes`."""

    def __init__(
        self,
        forget: Dataset | dict[str, Dataset] | None = None,
        retain: Dataset | None = None,
        *,
        forget_val: Dataset | dict[str, Dataset] | None = None,
        forget_test: Dataset | dict[str, Dataset] | None = None,
        retain_val: Dataset | None = None,
        retain_test: Dataset | None = None,
        near_retain: Dataset | dict[str, Dataset] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        _join_pytorch_lightning()
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.seed = seed
        self.notes: dict[str, str] = {}
        self._forget: dict[str | None, dict[Split, Dataset]] = {}  # None: a concept without a name of its own
        self._retain: dict[Split, Dataset] = {}
        self._near: dict[str | None, dict[Split, Dataset]] = {}
        if forget is not None:
            named = by_concept("forget", forget)
            val, test = for_concepts("forget_val", forget_val, named), for_concepts("forget_test", forget_test, named)
            for concept, dataset in named.items():
                self.set_parts("forget", dataset, val.get(concept), test.get(concept), concept=concept)
            for concept, dataset in for_concepts("near_retain", near_retain, named).items():
                self.set_parts("near", dataset, concept=concept)
        if retain is not None:
            self.set_parts("retain", retain, retain_val, retain_test)

    @property
    def concepts(self) -> list[str]:
        """Names of the concepts to forget whose datasets are set."""
        return [concept_of(self) if name is None else name for name in self._forget]

    def set_parts(
        self, kind: str, train: Dataset, val: Dataset | None = None, test: Dataset | None = None, *, concept: str | None = None
    ) -> None:
        """Set the splits of one set; those not given are split off `train`.

        Args:
            kind: "forget", "retain", or "near": retain data that lie near the concept.
            train, val, test: map-style datasets.
            concept: name of the concept to forget; call once for each. None: the only one, without a name.
        """
        label = labelled(kind, concept)
        splits, sentence = make_splits(label, train, val, test, self.seed)
        self.notes[label] = f"{label}: {sentence}"
        if kind != "retain":
            (self._forget if kind == "forget" else self._near)[concept] = splits
        elif concept is not None:
            raise UnlearnError(f"concept: must be None for {kind} data, got {concept!r}")
        else:
            self._retain = splits

    def forget_dataloader(self, split: Split, concept: str | None = None) -> DataLoader:
        """Return the forget batches of one split, "train", "val" or "test"; `concept` may be None if there is only one.

        Raises:
            UnlearnError: if there is no such concept, or if there are several and none is named.
        """
        return self._loader(self._forget[self.key_of(concept)][split])

    def retain_dataloader(self, split: Split) -> DataLoader:
        """Return the retain batches of one split, as `forget_dataloader` does."""
        if not self._retain:
            raise no_dataset("retain", self)
        return self._loader(self._retain[split])

    def holdout_batches(self) -> Batches | None:
        """Return samples that the model was never trained on, if there are some."""
        return None

    def near_batches(self, concept: str | None) -> dict[Split, Batches] | None:
        """Return what lies near a concept by split, if it was given; None leaves the choice to the callback."""
        own = self._near.get(self.key_of(concept))
        return None if own is None else {split: self._loader(own[split]) for split in SPLITS}

    def render_near(self, names: Sequence[str]) -> dict[Split, Batches] | None:
        """Make more samples of these concepts for "val" and "test", for a datamodule that can; others give None."""
        return None

    def train_dataloader(self) -> DataLoader:
        return self.retain_dataloader("train")

    def val_dataloader(self) -> DataLoader:
        return self.retain_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.retain_dataloader("test")

    def key_of(self, concept: str | None) -> str | None:
        """Return the key of a concept's splits: its name, or None if it was given without one."""
        if not self._forget:
            raise no_dataset("forget", self)
        keys = dict(zip(self.concepts, self._forget, strict=True))
        if concept is None and len(keys) == 1:
            (concept,) = keys
        if concept not in keys:
            raise UnlearnError(f"concept: must be one of {listed(list(keys), 20)}, got {concept!r}")
        return keys[concept]

    def _loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=self.collate_fn)


def _join_pytorch_lightning() -> None:
    """Let a Trainer of the `pytorch_lightning` package take these datamodules as well: it takes only those of its own class."""
    other = sys.modules.get("pytorch_lightning")
    if other is not None and not issubclass(UnlearnDataModule, other.LightningDataModule):
        UnlearnDataModule.__bases__ += (other.LightningDataModule,)


def no_dataset(kind: str, datamodule: UnlearnDataModule) -> UnlearnError:
    """Make the error for a set that is read before it is set."""
    return UnlearnError(f"{kind}: no dataset was given; pass {kind}=… to {type(datamodule).__name__}, or call its setup()")


def for_concepts(argument: str, given: Any, forget: Mapping[str | None, Any]) -> dict[str | None, Any]:
    """Return an argument by concept; it may leave concepts out, but must not name any that has no forget set."""
    named = {} if given is None else by_concept(argument, given)
    if not named.keys() <= forget.keys():
        expected = "no dict, as the concept has no name" if None in forget else f"a dict by concept, {listed(list(forget), 20)}"
        raise UnlearnError(f"{argument}: give {expected}")
    return named

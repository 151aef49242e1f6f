"""Forget some of a model's training samples, measured against samples that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, cast

from torch.utils.data import DataLoader, Dataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule, shuffled
from slug_lightning.datamodules.concept import checked_indices, divided, refuse_streams
from slug_lightning.datamodules.sources.resolve import samples_in
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import Batches, Chained
from slug_lightning.utils.names import by_concept, labelled


class SampleDataModule(UnlearnDataModule):
    """Forget training samples that were picked one by one, as in deletion requests, and retain the others.

    Such samples need not have anything in common: they are forgotten once the model treats them like samples that it was never
    trained on. Those are the holdout set. `seed` divides it into two halves, `val` for the search and `test` for the report.

    Each set serves the splits in its own way:

    - forget: all splits are the same samples. Every one of them must be forgotten, and there are no others to measure it on.
    - retain: `train`, for the gradient, is the rest of `dataset`. `val` and `test` are the halves of the holdout set, as what
      must last is the accuracy on new samples; on training samples it includes what the model memorized.
    - holdout: the same `val` and `test`, from `holdout_dataloader`, as the level that forgetting is measured by.

    Args:
        dataset: map-style dataset that the model was trained on, best without random augmentation, as metrics are computed on
            it, too.
        indices: positions in `dataset` of the samples to forget. For several concepts, a dict by the concept's name; one sample
            may belong to several.
        column: instead of `indices`, position or key of a mark in each sample of `dataset`: true or 1 for those to forget, else
            false or 0. The mark stays in the batches; `setup` reads each sample once.
        holdout: map-style dataset of at least 2 samples that the model was never trained on, like the samples to forget and
            collated like them. With several concepts it serves all of them.
        batch_size: samples in a batch.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the halves of the holdout set, and of the order of samples in `train`.

    Attributes:
        notes: how each set was made, under "retain", "holdout", and "forget", or "forget 'ann'" for a concept with a name.

    Raises:
        UnlearnError: if not exactly one of `indices` and `column` is given, if a dataset is a stream, if an index is out of
            range or repeated, or if `holdout` has fewer than 2 samples or shares some with `dataset`, as far as nested `Subset`s
            show; in `setup`, if a mark is missing or neither true nor false, or nothing is left to forget or to retain.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> trained_on, never_seen = TensorDataset(torch.arange(100)), TensorDataset(torch.arange(100, 140))
        >>> data = SampleDataModule(trained_on, indices=[3, 14, 15, 92, 65], holdout=never_seen)
        >>> data.setup("fit")
        >>> [len(data.forget_dataloader(split).dataset) for split in ("train", "val", "test")]
        [5, 5, 5]
        >>> [len(data.retain_dataloader(split).dataset) for split in ("train", "val", "test")]
        [95, 20, 20]
        >>> len(data.holdout_dataloader("test").dataset)
        20
    """

    same_forget_splits = True

    def __init__(
        self,
        dataset: Dataset,
        *,
        indices: Sequence[int] | dict[str, Sequence[int]] | None = None,
        column: int | str | None = None,
        holdout: Dataset,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn, seed=seed)
        if (indices is None) == (column is None):
            given = "none" if indices is None else "both"
            raise UnlearnError(f"indices, column: give exactly one, to select the samples to forget; given: {given}")
        refuse_streams(dataset=dataset, holdout=holdout)
        if (count := len(cast(Sized, holdout))) < 2:
            raise UnlearnError(
                f"holdout: must have at least 2 samples, one for the search and one for the report, got {count}; give samples "
                "that the model was never trained on"
            )
        if shared := samples_in(self._loader(dataset)) & samples_in(self._loader(holdout)):
            raise UnlearnError(
                f"holdout: {len(shared)} of its {count} samples are in dataset, too; give only samples that the model was "
                "never trained on"
            )
        self.dataset = dataset
        self.column = column
        self.holdout = holdout
        selected = {} if indices is None else by_concept("indices", indices)
        self.selected = checked_indices(selected, len(cast(Sized, dataset)))
        self._halves: dict[str, Dataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Divide the dataset into forget and retain, and the holdout set into halves; further calls change nothing."""
        if self.notes:
            return
        chosen = {None: self._marked()} if self.column is not None else self.selected
        forget, rest = divided("dataset", self.dataset, {concept: sorted(own) for concept, own in chosen.items()})
        count = len(cast(Sized, self.holdout))
        order = shuffled(count, self.seed)
        val, test = Subset(self.holdout, order[: count // 2]), Subset(self.holdout, order[count // 2 :])
        self._halves = {"val": val, "test": test}
        for concept, own in forget.items():
            self.set_parts("forget", own, own, own, concept=concept)
            label = labelled("forget", concept)
            self.notes[label] = f"{label}: the same {len(own)} samples in all splits, as the request is about them"
        self.set_parts("retain", rest, val, test)
        halves = f"{len(val)} validation, {len(test)} test"
        self.notes["retain"] = (
            f"retain: {len(rest)} train, the other training samples; {halves}, the halves of the holdout set (seed {self.seed})"
        )
        self.notes["holdout"] = f"holdout: one set of {count} samples halved into {halves} (seed {self.seed})"

    def holdout_dataloader(self, split: Literal["val", "test"], concept: str | None = None) -> DataLoader:
        """Return the holdout batches of one split, "val" or "test", which are the same for every concept.

        Raises:
            UnlearnError: if there is no such split or concept, or before `setup`.

        Example:
            >>> data = SampleDataModule(range(10), indices={"ann": [1], "bob": [2]}, holdout=range(10, 14), seed=1)
            >>> data.setup("fit")
            >>> [batch.tolist() for batch in data.holdout_dataloader("val", "ann")]
            [[11, 13]]
        """
        if not self._halves:
            raise UnlearnError("holdout: not divided yet; call setup() first")
        if concept is not None:
            self.key_of(concept)
        if split not in self._halves:
            raise UnlearnError(f"split: must be 'val' or 'test' for holdout data, got {split!r}")
        return self._loader(self._halves[split])

    def holdout_batches(self) -> Batches | None:
        """Return the whole holdout set: how the unedited model treats it is known before any search."""
        return Chained([self.holdout_dataloader("val"), self.holdout_dataloader("test")])

    def _marked(self) -> list[int]:
        """Return the indices of the samples whose column is true."""
        dataset: Any = self.dataset
        found = []
        for i in range(len(dataset)):
            sample = dataset[i]
            try:
                mark = sample[self.column]
                mark = mark.item() if hasattr(mark, "item") else mark
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise UnlearnError(
                    f"column: sample {i} has no single value at {self.column!r} ({type(error).__name__}: {error}); give the "
                    "position or key of the mark, or indices"
                ) from error
            if mark not in (0, 1):  # a class's number, or the word "no", would count as true
                raise UnlearnError(
                    f"column: must be true or false, or 1 or 0, in each sample; at {self.column!r} sample {i} has {mark!r}; "
                    "select with indices instead"
                )
            if mark:
                found.append(i)
        return found

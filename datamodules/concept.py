"""Forget a concept of one labelled dataset, and retain the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.errors import UnlearnError


class ConceptDataModule(UnlearnDataModule):
    """Forget the samples of a dataset that a selector names, and retain all the others.

    Exactly one of `classes`, `indices` and `where` says which. The choice is made in `setup`, which reads each
    sample once, except for `indices` and for the `classes` of a dataset with `targets`, such as torchvision's:
    then no sample is read.

    Args:
        dataset: map-style dataset with the concept and the rest.
        classes: the class to forget, or several: labels as they stand in the samples, or names where the dataset has
            a `class_to_idx`, such as torchvision's.
        indices: positions in `dataset` of the samples to forget.
        where: called with each sample; true for those to forget.
        label: where in a sample its class is: a position, or a key. -1 is the last element, or `dataset.targets`.
        test_dataset: other samples for the report, divided into forget and retain by the same `classes` or `where`.
            Without it the report's share is split off `dataset`.
        batch_size: samples in a batch.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the splits and of the order of samples within them.

    Raises:
        UnlearnError: if not exactly one selector is given, if the dataset has no indices, or if an index is out of
            range or given twice; in `setup`, if a class does not exist or nothing is left to forget or to retain.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> digits = TensorDataset(torch.zeros(40, 2), torch.arange(40) % 10)
        >>> data = ConceptDataModule(digits, classes=3)
        >>> data.setup("fit")
        >>> data.notes["forget"]
        'forget: one set of 4 samples was split into 2 (gradient), 1 (search), 1 (report), seed 0'
        >>> [labels.unique().tolist() for images, labels in data.forget_dataloader("train")]
        [[3]]
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        classes: int | str | list[int | str] | None = None,
        indices: Sequence[int] | None = None,
        where: Callable[[Any], bool] | None = None,
        label: int | str = -1,
        test_dataset: Dataset | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn, seed=seed)
        selectors = {"classes": classes, "indices": indices, "where": where}
        given = [name for name, selector in selectors.items() if selector is not None]
        if len(given) != 1:
            raise UnlearnError(
                f"classes, indices, where: give exactly one, to say what to forget; given: {', '.join(given) or 'none of them'}"
            )
        for name, source in (("dataset", dataset), ("test_dataset", test_dataset)):
            if isinstance(source, IterableDataset):
                raise UnlearnError(
                    f"{name}: a stream ({type(source).__name__}) has no indices to select; give a map-style dataset, "
                    "or forget and retain loaders of your own to the callback"
                )
        if indices is not None:
            indices = _checked(indices, _length(dataset))
            if test_dataset is not None:
                raise UnlearnError("test_dataset: indices say nothing about another dataset; give classes or where")
        self.dataset = dataset
        self.test_dataset = test_dataset
        self.classes = [classes] if isinstance(classes, (int, str)) else classes
        self.indices = indices
        self.where = where
        self.label = label

    def setup(self, stage: str | None = None) -> None:
        """Divide the dataset, once; further calls change nothing.

        Args:
            stage: Lightning's; it makes no difference.

        Raises:
            UnlearnError: if a class does not exist, or if nothing is left to forget or to retain.
        """
        if self.notes:
            return
        forget, retain = self._divide("dataset", self.dataset)
        forget_test = retain_test = None
        if self.test_dataset is not None:
            forget_test, retain_test = self._divide("test_dataset", self.test_dataset)
        self.set_parts("forget", forget, test=forget_test)
        self.set_parts("retain", retain, test=retain_test)

    def _divide(self, name: str, dataset: Dataset) -> tuple[Subset, Subset]:
        """The samples of the concept, and the others."""
        if self.indices is not None:
            chosen = set(self.indices)
        elif self.where is not None:
            chosen = {i for i in range(_length(dataset)) if self.where(dataset[i])}
        else:
            chosen = self._of_classes(name, dataset)
        others = [i for i in range(_length(dataset)) if i not in chosen]
        if not chosen:
            raise UnlearnError(f"{name}: none of the {len(others)} samples is selected; select what is to be forgotten")
        if not others:
            raise UnlearnError(
                f"{name}: all {len(chosen)} samples are selected, so there is nothing left to retain; "
                "select fewer, or add samples of other kinds"
            )
        return Subset(dataset, sorted(chosen)), Subset(dataset, others)

    def _of_classes(self, name: str, dataset: Dataset) -> set[int]:
        """Where the samples of the wanted classes are."""
        root: Any = dataset
        positions: Sequence[int] = range(_length(dataset))
        while type(root) is Subset:
            root, positions = root.dataset, [root.indices[i] for i in positions]
        targets = getattr(root, "targets", None) if self.label == -1 else None
        labels = self._plain(root[i][self.label] if targets is None else targets[i] for i in positions)
        names = getattr(root, "class_to_idx", {})
        wanted = [names.get(one, one) for one in cast("list[int | str]", self.classes)]
        there = sorted(set(labels), key=lambda one: (str(type(one)), one))
        absent = [one for one in wanted if one not in there]
        if absent:
            some = ", ".join(repr(one) for one in there[:10]) + ", …" * (len(there) > 10)
            raise UnlearnError(f"classes: no sample of {name} has the class {absent[0]!r}; there are {some}")
        return {i for i, one in enumerate(labels) if one in wanted}

    def _plain(self, read: Iterable[Any]) -> list[Any]:
        """Labels as plain numbers or strings, so that they compare and print as the user writes them."""
        try:
            labels = [one.item() if hasattr(one, "item") else one for one in read]
            set(labels)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UnlearnError(
                f"label: a sample has no single class at {self.label!r} ({type(error).__name__}: {error}); "
                "give the position or key of the class, or select with where"
            ) from error
        return labels


def _length(dataset: Dataset) -> int:
    return len(cast(Sequence[Any], dataset))


def _checked(indices: Sequence[int], count: int) -> list[int]:
    """Indices as a list, all different and within the dataset."""
    indices = [int(i) for i in indices]
    beyond = [i for i in indices if not 0 <= i < count]
    if beyond:
        raise UnlearnError(f"indices: {beyond[0]} is out of range; the dataset has {count} samples, 0 to {count - 1}")
    repeated = {i for i in indices if indices.count(i) > 1} if len(set(indices)) < len(indices) else set()
    if repeated:
        raise UnlearnError(f"indices: {min(repeated)} is given more than once; give each sample once")
    return indices

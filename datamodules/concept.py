"""Forget one or more concepts of one labelled dataset, and retain the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import by_concept, labelled

Classes = int | str | list[int | str]


class ConceptDataModule(UnlearnDataModule):
    """Forget the samples of a dataset that a selector names, and retain all the others.

    Exactly one of `classes`, `indices` and `where` says which; for several concepts, it is a dict by the concept's name. A
    sample may belong to several concepts; what belongs to none is retained. The choice is made in `setup`, which reads each
    sample once, however many concepts there are, except for `indices` and for the `classes` of a dataset with `targets`,
    such as torchvision's: then no sample is read.

    Args:
        dataset: map-style dataset with the concepts and the rest.
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
        UnlearnError: if not exactly one selector is given, if the concepts' names cannot be told apart, if the dataset has
            no indices, or if an index is out of range or given twice; in `setup`, if a class does not exist or nothing is
            left to forget or to retain.

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
        >>> data = ConceptDataModule(digits, classes={"three": 3, "the even ones": [0, 2, 4, 6, 8]})
        >>> data.setup("fit")
        >>> {name: len(data.forget_dataloader("train", name).dataset) for name in data.concepts}
        {'three': 2, 'the even ones': 10}
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        classes: Classes | dict[str, Classes] | None = None,
        indices: Sequence[int] | dict[str, Sequence[int]] | None = None,
        where: Callable[[Any], bool] | dict[str, Callable[[Any], bool]] | None = None,
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
        if indices is not None and test_dataset is not None:
            raise UnlearnError("test_dataset: indices say nothing about another dataset; give classes or where")
        (self.selector,) = given
        self.selected = by_concept(self.selector, selectors[self.selector])
        """By concept (None: the only one, without a name) what selects its samples."""
        if indices is not None:
            count = _length(dataset)
            self.selected = {name: _checked(labelled("indices", name), own, count) for name, own in self.selected.items()}
        self.dataset = dataset
        self.test_dataset = test_dataset
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
        forget_test: dict[str | None, Subset] = {}
        retain_test = None
        if self.test_dataset is not None:
            forget_test, retain_test = self._divide("test_dataset", self.test_dataset)
        for concept, chosen in forget.items():
            self.set_parts("forget", chosen, test=forget_test.get(concept), concept=concept)
        self.set_parts("retain", retain, test=retain_test)

    def _divide(self, name: str, dataset: Dataset) -> tuple[dict[str | None, Subset], Subset]:
        """The samples of each concept, and those of none."""
        count = _length(dataset)
        if self.selector == "indices":
            chosen = {concept: sorted(own) for concept, own in self.selected.items()}
        elif self.selector == "where":
            chosen = {concept: [] for concept in self.selected}
            for i in range(count):
                sample = dataset[i]
                for concept, where in self.selected.items():
                    if where(sample):
                        chosen[concept].append(i)
        else:
            chosen = self._of_classes(name, dataset)
        for concept, own in chosen.items():
            if not own:
                problem = f"none of the {count} samples is selected" + (f" for {concept!r}" if concept else "")
                raise UnlearnError(f"{name}: {problem}; select what is to be forgotten")
        anything = set().union(*chosen.values())
        if len(anything) == count:
            raise UnlearnError(
                f"{name}: all {count} samples are selected, so there is nothing left to retain; "
                "select fewer, or add samples of other kinds"
            )
        retained = [i for i in range(count) if i not in anything]
        return {concept: Subset(dataset, own) for concept, own in chosen.items()}, Subset(dataset, retained)

    def _of_classes(self, name: str, dataset: Dataset) -> dict[str | None, list[int]]:
        """Where the samples of the wanted classes are, by concept."""
        root: Any = dataset
        positions: Sequence[int] = range(_length(dataset))
        while type(root) is Subset:
            root, positions = root.dataset, [root.indices[i] for i in positions]
        targets = getattr(root, "targets", None) if self.label == -1 else None
        labels = self._plain(root[i][self.label] if targets is None else targets[i] for i in positions)
        found: dict[Any, list[int]] = {}
        for i, one in enumerate(labels):
            found.setdefault(one, []).append(i)
        names = getattr(root, "class_to_idx", {})
        chosen = {}
        for concept, classes in self.selected.items():
            wanted = [names.get(one, one) for one in ([classes] if isinstance(classes, (int, str)) else classes)]
            absent = [one for one in wanted if one not in found]
            if absent:
                there = sorted(found, key=lambda one: (str(type(one)), one))
                some = ", ".join(repr(one) for one in there[:10]) + ", …" * (len(there) > 10)
                which = labelled("classes", concept)
                raise UnlearnError(f"{which}: no sample of {name} has the class {absent[0]!r}; there are {some}")
            chosen[concept] = sorted(i for one in set(wanted) for i in found[one])
        return chosen

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


def _checked(argument: str, indices: Sequence[int], count: int) -> list[int]:
    """Indices as a list, all different and within the dataset."""
    indices = [int(i) for i in indices]
    beyond = [i for i in indices if not 0 <= i < count]
    if beyond:
        raise UnlearnError(f"{argument}: {beyond[0]} is out of range; the dataset has {count} samples, 0 to {count - 1}")
    repeated = {i for i in indices if indices.count(i) > 1} if len(set(indices)) < len(indices) else set()
    if repeated:
        raise UnlearnError(f"{argument}: {min(repeated)} is given more than once; give each sample once")
    return indices

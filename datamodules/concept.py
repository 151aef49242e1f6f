"""Forget one or more concepts of one labelled dataset, and retain the rest of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import by_concept, labelled, listed

Classes = int | str | list[int | str]


class ConceptDataModule(UnlearnDataModule):
    """Forget the samples of a dataset that a selector picks, and retain all others.

    Give exactly one of `classes`, `indices` and `where`; for several concepts, as a dict by the concept's name. A sample may
    belong to several concepts; one that belongs to none is retained. `setup` reads each sample once, however many concepts
    there are; it reads none for `indices`, or for `classes` if the dataset has `targets`, as torchvision's have.

    Args:
        dataset: map-style dataset with the concepts and the rest.
        classes: the class to forget, or several: labels as in the samples, or names if the dataset has a `class_to_idx`,
            as torchvision's have.
        indices: positions in `dataset` of the samples to forget.
        where: called with each sample; true for those to forget.
        label: position or key of the class in a sample. -1 is the last element, or `dataset.targets`.
        test_dataset: test split, divided into forget and retain by the same `classes` or `where`. If None, it is split off
            `dataset`.
        batch_size: samples in a batch.
        num_workers: worker processes of each loader.
        collate_fn: as in `torch.utils.data.DataLoader`.
        seed: of the splits and of the order of samples within them.

    Raises:
        UnlearnError: if not exactly one selector is given, if the dataset is a stream, or if an index is out of range or
            repeated; in `setup`, if a class does not exist or nothing is left to forget or to retain.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> digits = TensorDataset(torch.zeros(40, 2), torch.arange(40) % 10)
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
                f"classes, indices, where: give exactly one, to select what to forget; given: {', '.join(given) or 'none'}"
            )
        refuse_streams(dataset=dataset, test_dataset=test_dataset)
        if indices is not None and test_dataset is not None:
            raise UnlearnError("test_dataset: cannot be combined with indices, which belong to dataset; give classes or where")
        self.dataset = dataset
        self.test_dataset = test_dataset
        self.label = label
        (self.selector,) = given
        self.selected = by_concept(self.selector, selectors[self.selector])
        if indices is not None:
            self.selected = checked_indices(self.selected, len(cast(Sized, dataset)))

    def setup(self, stage: str | None = None) -> None:
        """Split the dataset into forget and retain; further calls change nothing."""
        if self.notes:
            return
        forget, retain = self._divide("dataset", self.dataset)
        forget_test, retain_test = ({}, None) if self.test_dataset is None else self._divide("test_dataset", self.test_dataset)
        for concept, own in forget.items():
            self.set_parts("forget", own, test=forget_test.get(concept), concept=concept)
        self.set_parts("retain", retain, test=retain_test)

    def _divide(self, name: str, dataset: Any) -> tuple[dict[str | None, Subset], Subset]:
        """Return the samples of each concept, and those of none."""
        count = len(dataset)
        chosen: dict[str | None, list[int]]
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
        return divided(name, dataset, chosen)

    def _of_classes(self, name: str, dataset: Any) -> dict[str | None, list[int]]:
        """Return the indices of each concept's classes."""
        root: Any = dataset
        positions: Sequence[int] = range(len(dataset))
        while type(root) is Subset:
            root, positions = root.dataset, [root.indices[i] for i in positions]
        targets = getattr(root, "targets", None) if self.label == -1 else None
        found: dict[Any, list[int]] = defaultdict(list)
        try:
            for i, position in enumerate(positions):
                label = root[position][self.label] if targets is None else targets[position]
                # As a plain number or string, which compares and prints as the user writes it.
                found[label.item() if hasattr(label, "item") else label].append(i)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UnlearnError(
                f"label: a sample has no single class at {self.label!r} ({type(error).__name__}: {error}); "
                "give the position or key of the class, or select with where"
            ) from error
        names = getattr(root, "class_to_idx", {})
        chosen = {}
        for concept, classes in self.selected.items():
            wanted = [names.get(one, one) for one in ([classes] if isinstance(classes, (int, str)) else classes)]
            if absent := [one for one in wanted if one not in found]:
                known = listed(sorted(found, key=lambda one: (str(type(one)), one)), 10)
                which = labelled("classes", concept)
                raise UnlearnError(f"{which}: no sample of {name} has the class {absent[0]!r}; there are {known}")
            chosen[concept] = sorted(i for one in set(wanted) for i in found[one])
        return chosen


def refuse_streams(**datasets: Any) -> None:
    """Refuse datasets, given by argument, that have no indices."""
    for argument, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            raise UnlearnError(
                f"{argument}: must be a map-style dataset, as a stream ({type(dataset).__name__}) has no indices; or pass "
                "forget and retain loaders of your own to the callback"
            )


def checked_indices(selected: Mapping[str | None, Sequence[int]], count: int) -> dict[str | None, list[int]]:
    """Return each concept's indices into `count` samples as plain numbers, in the order given."""
    checked = {}
    for concept, indices in selected.items():
        argument, own = labelled("indices", concept), [int(i) for i in indices]
        if beyond := [i for i in own if not 0 <= i < count]:
            raise UnlearnError(f"{argument}: {beyond[0]} is out of range; the dataset has {count} samples, 0 to {count - 1}")
        if repeated := sorted(i for i, times in Counter(own).items() if times > 1):
            raise UnlearnError(f"{argument}: {repeated[0]} is given more than once; give each sample once")
        checked[concept] = own
    return checked


def divided(name: str, dataset: Any, chosen: Mapping[str | None, list[int]]) -> tuple[dict[str | None, Subset], Subset]:
    """Divide a dataset, which errors call `name`, into the samples of each concept and those of none."""
    count = len(dataset)
    for concept, own in chosen.items():
        if not own:
            which = f" for {concept!r}" if concept else ""
            raise UnlearnError(f"{name}: none of the {count} samples is selected{which}; select at least one to forget")
    anything = set().union(*chosen.values())
    if len(anything) == count:
        raise UnlearnError(f"{name}: all {count} samples are selected, none is left to retain; select fewer, or add others")
    retained = [i for i in range(count) if i not in anything]
    return {concept: Subset(dataset, own) for concept, own in chosen.items()}, Subset(dataset, retained)

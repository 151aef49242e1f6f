"""Forget and retain from one labelled dataset."""

from __future__ import annotations

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from slug_lightning.datamodules.concept import ConceptDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS

LABELS = [i % 5 for i in range(40)]


def labelled(labels=LABELS) -> TensorDataset:
    """Samples (own index, label)."""
    return TensorDataset(torch.arange(len(labels)), torch.tensor(labels))


def first_is_small(sample) -> bool:
    """A selector that YAML can name."""
    return bool(sample[0] < 4)


class Digits(Dataset):
    """A dataset that YAML can name."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index % 5


class Unreadable(Digits):
    """A dataset as torchvision's: its labels are known, and to read a sample would be slow (here: fails)."""

    class_to_idx = {"cat": 0, "dog": 1, "owl": 2, "cow": 3, "elk": 4}

    @property
    def targets(self):
        return torch.arange(self.count) % 5

    def __getitem__(self, index: int):
        raise AssertionError("a sample was read")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def indices(data: ConceptDataModule, kind: str) -> list[list[int]]:
    """First elements of the samples, by split."""
    loaders = (getattr(data, f"{kind}_dataloader")(split) for split in SPLITS)
    return [torch.cat([batch[0] for batch in loader]).tolist() for loader in loaders]


def positions(data: ConceptDataModule, kind: str, *concept: str) -> set[int]:
    """Which samples a kind has, without reading any."""
    found = set()
    for split in SPLITS:
        part = getattr(data, f"{kind}_dataloader")(split, *concept).dataset
        chosen = range(len(part))
        while isinstance(part, Subset):
            part, chosen = part.dataset, [part.indices[i] for i in chosen]
        found |= set(chosen)
    return found


def make(dataset=None, **arguments) -> ConceptDataModule:
    data = ConceptDataModule(dataset if dataset is not None else labelled(), **arguments)
    data.setup("fit")
    return data


@examples(40)
@given(classes=st.sets(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_classes_divide_the_dataset(classes, seed):
    data = make(classes=sorted(classes), seed=seed)
    forget, retain = indices(data, "forget"), indices(data, "retain")
    assert all(forget) and all(retain)
    assert sorted(sum(forget, [])) == [i for i, label in enumerate(LABELS) if label in classes]
    assert sorted(sum(retain, [])) == [i for i, label in enumerate(LABELS) if label not in classes]


@pytest.mark.parametrize(
    "selector",
    [{"classes": 3}, {"classes": [3]}, {"indices": range(3, 40, 5)}, {"where": lambda sample: sample[1] == 3}],
    ids=["one class", "classes", "indices", "where"],
)
def test_the_selectors_agree(selector):
    data = make(**selector)
    assert sorted(sum(indices(data, "forget"), [])) == list(range(3, 40, 5))
    assert len(sum(indices(data, "retain"), [])) == 32


@pytest.mark.parametrize("view", [lambda data: data, lambda data: Subset(Subset(data, range(39, -1, -1)), range(30))])
@pytest.mark.parametrize("classes", [[0, 2], ["cat", "owl"], ["cat", 2]])
def test_known_labels_spare_the_reading_also_through_subsets(view, classes):
    data = make(view(Unreadable()), classes=classes)
    forget, retain = positions(data, "forget"), positions(data, "retain")
    whole = set(range(40)) if len(forget | retain) == 40 else set(range(10, 40))
    assert forget == {i for i in whole if i % 5 in (0, 2)}
    assert retain == whole - forget


def test_label_at_a_position_or_key():
    assert sorted(sum(indices(make(Digits(), classes=2, label=1), "forget"), [])) == list(range(2, 40, 5))
    by_key = [{"text": str(i), "kind": "odd" if i % 2 else "even"} for i in range(12)]
    data = make(by_key, classes="odd", label="kind")
    assert positions(data, "forget") == {1, 3, 5, 7, 9, 11}


def test_an_explicit_label_goes_before_targets():
    class Both(Digits):
        targets = [0] * 40

    assert positions(make(Both(), classes=2, label=1), "forget") == set(range(2, 40, 5))


@pytest.mark.parametrize("selector", [{"classes": 0}, {"where": lambda sample: sample[1] == 0}])
def test_a_test_dataset_serves_the_report_alone(selector):
    other = TensorDataset(torch.arange(100, 110), torch.arange(10) % 5)
    data = make(test_dataset=other, **selector)
    forget, retain = indices(data, "forget"), indices(data, "retain")
    assert forget[2] == [100, 105]
    assert sorted(retain[2]) == [101, 102, 103, 104, 106, 107, 108, 109]
    assert sorted(forget[0] + forget[1]) == list(range(0, 40, 5))
    assert len(retain[0] + retain[1]) == 32


def test_setup_divides_once_and_the_callback_can_read_it():
    calls = []
    data = ConceptDataModule(labelled(), where=lambda sample: calls.append(1) or first_is_small(sample), batch_size=3)
    found = resolve_loaders(None, None, data)
    data.setup("test")
    assert len(calls) == 40
    batches = [batch for part in found.forget["the forget set"].values() for batch in part]
    assert sorted(n for batch in batches for n in batch[0].tolist()) == [0, 1, 2, 3]
    assert "4 samples" in found.notes[0] and "36 samples" in found.notes[1]


# Several concepts


@examples(30)
@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 9))
def test_several_concepts_are_divided_as_each_alone(wanted, seed):
    data = labelled([i % 9 for i in range(90)])
    names = [f"c{i}" for i in range(len(wanted))]
    of_classes = make(data, classes={name: sorted(own) for name, own in zip(names, wanted, strict=True)}, seed=seed)
    selectors = [
        {"where": {name: (lambda sample, own=own: int(sample[1]) in own) for name, own in zip(names, wanted, strict=True)}},
        {"indices": {name: [i for i in range(90) if i % 9 in own] for name, own in zip(names, wanted, strict=True)}},
    ]
    for name, own in zip(names, wanted, strict=True):
        alone = make(data, classes=sorted(own), seed=seed)
        for split in SPLITS:
            found, expected = (
                list(batches) for batches in (of_classes.forget_dataloader(split, name), alone.forget_dataloader(split))
            )
            assert str(found) == str(expected), "the others change nothing"
    kept = {i for i in range(90) if i % 9 not in set().union(*wanted)}
    for each in (of_classes, *(make(data, **selector, seed=seed) for selector in selectors)):
        assert each.concepts == names
        assert positions(each, "retain") == kept
        assert [positions(each, "forget", name) for name in names] == [{i for i in range(90) if i % 9 in own} for own in wanted]


def test_names_and_known_labels_serve_several_concepts_and_test_data():
    classes = {"pet": ["cat", "dog"], "bird": "owl", "feline": 0}
    data = make(Unreadable(), classes=classes, test_dataset=Subset(Unreadable(10), range(10)))
    assert positions(data, "forget", "pet") == {i for i in range(40) if i % 5 < 2}
    for name, own in {"pet": (0, 1), "bird": (2,), "feline": (0,)}.items():
        assert sorted(data.forget_dataloader("test", name).dataset.indices) == [i for i in range(10) if i % 5 in own]
    assert sorted(data.retain_dataloader("test").dataset.indices) == [3, 4, 8, 9]


@pytest.mark.parametrize("selector", ["where", "classes"])
def test_each_sample_is_read_once_whatever_the_number_of_concepts(selector):
    read = []

    class Watched(Digits):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    chosen = {f"c{i}": i if selector == "classes" else (lambda sample, i=i: sample[1] == i) for i in range(4)}
    make(Watched(), **{selector: chosen})
    assert read == list(range(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": {"a": 1, "b": 9}}, "classes 'b': no sample of dataset has the class 9"),
        ({"classes": {"a": 1, "A ": 2}}, "classes: the concepts 'a' and 'A ' would have the same files"),
        ({"classes": {}}, "classes: no concept is given"),
        ({"indices": {"a": [1], "b": [40]}}, "indices 'b': 40 is out of range"),
        ({"indices": {"a": [1], "b": [2, 2]}}, "indices 'b': 2 is given more than once"),
        ({"indices": {"a": [1, 2, 3], "b": []}}, "dataset: none of the 40 samples is selected for 'b'; select"),
        ({"indices": {"a": range(20), "b": range(20, 40)}}, "dataset: all 40 samples are selected"),
        ({"where": {"a": first_is_small, "b": lambda sample: False}}, "none of the 40 samples is selected for 'b'"),
        ({"indices": {"a": [1, 2]}}, "forget 'a': 2 samples are too few"),
        (
            {"classes": {"a": 0, "b": 4}, "test_dataset": labelled([0, 1])},
            "classes 'b': no sample of test_dataset has the class 4",
        ),
    ],
)
def test_errors_name_the_concept(arguments, message):
    with pytest.raises(UnlearnError, match=message):
        make(**arguments)


def test_options_reach_the_loaders():
    data = make(classes=0, batch_size=3, collate_fn=len)
    assert list(data.forget_dataloader("train")) == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "classes, indices, where: .*given: none"),
        ({"classes": 1, "indices": [1]}, "classes, indices, where: .*given: classes, indices"),
        ({"indices": [1, 40]}, "indices: 40 is out of range; the dataset has 40 samples, 0 to 39"),
        ({"indices": [-1]}, "indices: -1 is out of range"),
        ({"indices": [5, 3, 3, 5]}, "indices: 3 is given more than once"),
        ({"indices": []}, "dataset: none of the 40 samples is selected"),
        ({"indices": range(40)}, "dataset: all 40 samples are selected"),
        ({"where": lambda sample: False}, "dataset: none of the 40"),
        ({"where": lambda sample: True}, "dataset: all 40"),
        ({"classes": [0, 1, 2, 3, 4]}, "dataset: all 40"),
        ({"classes": 7}, "classes: no sample of dataset has the class 7; there are 0, 1, 2, 3, 4$"),
        ({"classes": "3"}, "classes: no sample of dataset has the class '3'"),
        ({"classes": [0, 9]}, "the class 9"),
        ({"classes": 0, "label": "kind"}, "label: .*'kind' .TypeError"),
        ({"classes": 0, "label": 5}, "label: .* 5 .IndexError"),
        ({"indices": [1], "test_dataset": labelled()}, "test_dataset: cannot be combined with indices"),
        ({"classes": 4, "test_dataset": labelled([0, 1])}, "no sample of test_dataset has the class 4"),
        ({"classes": 0, "test_dataset": labelled([0, 0])}, "test_dataset: all 2 samples"),
        ({"classes": 0, "test_dataset": Digits(0)}, "no sample of test_dataset"),
    ],
)
def test_errors_name_argument_and_remedy(arguments, message):
    with pytest.raises(UnlearnError, match=message):
        make(**arguments)


@pytest.mark.parametrize("name", ["dataset", "test_dataset"])
def test_streams_are_refused(name):
    with pytest.raises(UnlearnError, match=f"^{name}: must be a map-style dataset, as a stream .Stream. has no indices"):
        ConceptDataModule(**{"dataset": labelled(), name: Stream()}, classes=1)


@pytest.mark.parametrize("target", [torch.zeros(3), [1, 2], {"a": 1}])
def test_several_labels_in_one_sample_are_refused(target):
    with pytest.raises(UnlearnError, match="label: .*select with where"):
        make([(0, target)] * 5, classes=1)


def test_at_most_ten_classes_are_shown():
    with pytest.raises(UnlearnError, match="there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more$"):
        make(labelled(range(30)), classes=99)


def test_mixed_kinds_of_labels_can_be_shown():
    with pytest.raises(UnlearnError, match="there are 2, 'a', 'b'"):
        make([(0, "b"), (0, 2), (0, "a")], classes="c")


def test_yaml_can_say_all_of_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ConceptDataModule, "data")
    here = __name__
    several = (
        {"classes": {"odd": [1, 3], "zero": 0}},
        {"indices": {"first": [1, 2, 3], "later": [7, 8, 9]}},
        {"where": {"small": f"{here}.first_is_small"}},
    )
    for selector in ({"classes": [0, 3]}, {"classes": 3}, {"indices": [1, 2, 3]}, {"where": f"{here}.first_is_small"}, *several):
        settings = {
            "dataset": {"class_path": f"{here}.Digits", "init_args": {"count": 20}},
            "batch_size": 2,
            **selector,
        }
        config = parser.parse_object(
            {"data": {"class_path": ConceptDataModule.__module__ + ".ConceptDataModule", "init_args": settings}}
        )
        data = parser.instantiate_classes(config).data
        data.setup("fit")
        assert data.batch_size == 2
        names = list(next(iter(selector.values()))) if selector in several else []
        assert data.concepts == (names or ["the forget set"])
        forgotten = set().union(*(positions(data, "forget", name) for name in data.concepts))
        assert len(forgotten | positions(data, "retain")) == 20

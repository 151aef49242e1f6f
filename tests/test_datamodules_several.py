"""Several concepts in one run: named, kept apart, and told in few words."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from slug_lightning.datamodules import ConceptDataModule, UnlearnDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.trainer.limits import as_trainer_limits
from slug_lightning.utils.loaders import SPLITS, Chained


def numbers(values) -> TensorDataset:
    """A dataset whose samples are their own names."""
    return TensorDataset(torch.tensor(list(values)))


def loader(values, **options) -> DataLoader:
    return DataLoader(numbers(values), **{"batch_size": 4, **options})


def read(batches) -> list[int]:
    return [number for batch in batches for number in batch[0].tolist()]


def parts_of(parts) -> list[list[int]]:
    return [read(parts[split]) for split in SPLITS]


def everything(parts) -> list[int]:
    return sorted(number for part in parts_of(parts) for number in part)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(32).split(1))


class Counting(UnlearnDataModule):
    """Counts how often it is prepared and set up."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        for number, name in enumerate(("cat", "dog", "owl")):
            self.set_parts("forget", numbers(range(10 * number, 10 * number + 6)), concept=name)
        self.set_parts("retain", numbers(range(100, 120)))


RETAIN = range(1000, 1040)


# What each name stands for


def test_each_name_has_the_parts_that_its_source_has_alone():
    def sources():
        own = {split: loader([number]) for number, split in enumerate(SPLITS, start=60)}
        data = UnlearnDataModule(numbers(range(40, 52)), numbers(range(5)))
        lists = [loader(range(70, 78)), loader(range(80, 90))]
        return {"a": loader(range(24)), "own": own, "data": data, "list": lists, "stream": DataLoader(Stream(), batch_size=2)}

    together = resolve_loaders(sources(), loader(RETAIN), None)
    assert list(together.forget) == list(sources())
    for name, source in sources().items():
        alone = resolve_loaders({name: source}, loader(RETAIN), None)
        assert parts_of(together.forget[name]) == parts_of(alone.forget[name])
        assert parts_of(together.retain) == parts_of(alone.retain)
        # The note of one is the note of all, but for the name.
        note = alone.notes[0].removeprefix("forget: ")
        assert f"forget {name!r}: {note}" in together.notes


def test_the_datamodule_serves_its_concepts_and_is_set_up_once():
    data = Counting()
    found = resolve_loaders(None, None, data)
    assert data.calls == ["prepare", "fit"]
    assert {name: everything(parts) for name, parts in found.forget.items()} == {
        "cat": list(range(6)),
        "dog": list(range(10, 16)),
        "owl": list(range(20, 26)),
    }
    assert everything(found.retain) == list(range(100, 120))
    assert found.notes[:4] == [*data.notes.values()]


def test_a_datamodule_given_under_a_name_serves_the_concept_of_that_name():
    data = Counting()
    for names in (["dog"], ["owl", "cat"]):
        found = resolve_loaders(dict.fromkeys(names, data), loader(RETAIN), None)
        assert [everything(parts)[0] for parts in found.forget.values()] == [10 * ("cat", "dog", "owl").index(n) for n in names]
    with pytest.raises(UnlearnError, match=r"forget: must be among the datamodule's concepts, 'cat', 'dog', 'owl', got 'pets'"):
        resolve_loaders({"pets": data}, loader(RETAIN), None)


def test_a_datamodule_with_one_concept_serves_it_under_any_name():
    data = UnlearnDataModule({"felis": numbers(range(8))}, numbers(range(9)))
    assert everything(resolve_loaders({"cat": data}, loader(RETAIN), None).forget["cat"]) == list(range(8))
    assert list(resolve_loaders(None, None, data).forget) == ["felis"]


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({}, "forget: no concept is given"),
        ({"": loader(range(8))}, "forget: '' is not a concept name"),
        ({1: loader(range(8))}, "forget: 1 is not a concept name"),
        ({"Cat": loader(range(8)), "cat!": loader(range(8))}, "forget: the concepts 'Cat' and 'cat!' would have the same files"),
        ({"cat": loader(range(8)), "dog": loader([])}, "forget 'dog': a dataset is empty"),
        ({"cat": loader(range(8)), "dog": loader([1, 2])}, "forget 'dog': 2 samples are too few"),
        ({"cat": loader(range(8)), "dog": 5}, "forget 'dog': must be a DataLoader, .*got int"),
        ({"cat": loader(range(8)), "dog": []}, "forget 'dog': the list of loaders is empty"),
        ({"cat": loader(range(8)), "dog": {"val": loader(range(8))}}, "forget 'dog': the dict must have a 'train' loader"),
        ({"cat": loader(range(8)), "dog": iter(loader(range(8)))}, "forget 'dog': an iterator can be read only once"),
        ({"train": loader(range(8)), "test": loader(range(9))}, "forget: 'train', 'test' are splits, not concepts"),
    ],
)
def test_errors_name_the_concept(forget, message):
    with pytest.raises(UnlearnError, match=message):
        resolve_loaders(forget, loader(RETAIN), None)


def test_one_concept_may_be_called_like_a_split():
    assert everything(resolve_loaders({"train": loader(range(8))}, loader(RETAIN), None).forget["train"]) == list(range(8))


# What concepts share


def of(data, indices) -> DataLoader:
    return DataLoader(Subset(data, list(indices)), batch_size=4)


def test_the_same_data_under_two_names_is_refused():
    data, stream = numbers(range(40)), Chained([loader(range(40))])
    same = [
        {"cat": of(data, range(8)), "owl": of(data, range(9)), "dog": of(data, reversed(range(8)))},
        {
            "cat": DataLoader(Subset(data, range(8))),
            "dog": of(Subset(data, range(4, 20)), range(4)),
            "owl": of(data, range(4, 8)),
        },
        {"cat": stream, "dog": stream},
    ]
    for forget, names in zip(same, ("'cat' and 'dog'", "'dog' and 'owl'", "'cat' and 'dog'"), strict=True):
        with pytest.raises(UnlearnError, match=f"forget: {names} are the same data"):
            resolve_loaders(forget, loader(RETAIN), None)


def test_a_concept_within_retain_is_refused_by_name():
    data = numbers(range(40))
    with pytest.raises(UnlearnError, match="^forget 'dog', 'owl': the same data as retain, or a part of it; leave it out"):
        resolve_loaders({"cat": of(data, range(8)), "dog": of(data, range(8, 16)), "owl": of(data, [20, 30, 39])},
                        of(data, range(8, 40)), None)  # fmt: skip


def test_a_concept_partly_in_retain_is_warned_of_by_name():
    data = numbers(range(40))
    with pytest.warns(UserWarning, match="^forget, retain: 3 of 10 samples of 'cat', 1 of 4 samples of 'dog' are in retain too$"):
        resolve_loaders({"cat": of(data, range(10)), "dog": of(data, [0, 1, 2, 39]), "owl": of(data, range(3, 7))},
                        of(data, range(7, 40)), None)  # fmt: skip


def test_many_concepts_partly_in_retain_make_one_warning():
    data = numbers(range(100))
    forget = {f"c{i}": of(data, [4 * i, 4 * i + 1, 4 * i + 2, 99]) for i in range(20)}
    with pytest.warns(UserWarning, match="1 of 4 samples of 'c4', and samples of 15 more concepts, are in retain too") as caught:
        resolve_loaders(forget, of(data, range(80, 100)), None)
    assert len(caught) == 1


def test_overlapping_concepts_are_told_with_counts():
    data = numbers(range(40))
    forget = {
        "dog": of(data, range(3)),
        "animal": of(data, range(12)),
        "pet": of(data, [1, 2, 3, 30]),
        "car": of(data, range(20, 30)),
    }
    assert resolve_loaders(forget, loader(RETAIN), None).notes[-3:] == [
        "forget: 'dog' lies within 'animal', 3 of its 12 samples",
        "forget: 'pet' and 'animal' share 3 samples, of 4 and 12",
        "forget: 'dog' and 'pet' share 2 samples, of 3 and 4",
    ]


@examples(30)
@given(st.lists(st.sets(st.integers(0, 14), min_size=3), min_size=2, max_size=5, unique_by=frozenset))
def test_what_concepts_share_is_told_as_sets_say(sets):
    data = numbers(range(15))
    told = resolve_loaders({f"c{i}": of(data, own) for i, own in enumerate(sets)}, loader(RETAIN), None).notes
    pairs = [(i, j) for j in range(len(sets)) for i in range(j) if sets[i] & sets[j]]
    most = sorted((len(sets[i] & sets[j]) for i, j in pairs), reverse=True)
    shown = [note for note in told if "lies within" in note or " share " in note]
    assert len([note for note in shown if "more pairs" not in note]) == min(5, len(pairs))
    assert (f"forget: {len(pairs) - 5} more pairs of concepts share samples" in told) == (len(pairs) > 5)
    for note, shared in zip(shown, most[:5], strict=False):
        i, j = sorted(int(word.strip("',")[1:]) for word in note.split() if word.startswith("'c"))
        assert len(sets[i] & sets[j]) == shared and f" {shared} " in note
        assert ("lies within" in note) == (sets[i] <= sets[j] or sets[j] <= sets[i])


def test_streams_are_not_counted():
    first, second = DataLoader(Stream()), DataLoader(Stream())
    found = resolve_loaders({"a": [first, second], "b": first}, loader(RETAIN), None)
    assert not any("lies within" in note or "share" in note for note in found.notes)


def test_search_and_report_on_the_same_data_are_told_for_each_concept():
    own, same = loader(range(6)), loader(range(50, 53))
    forget = {name: {"train": own, "val": same, "test": same} for name in ("cat",)} | {"dog": loader(range(9))}
    notes = resolve_loaders(forget, loader(RETAIN), None).notes
    assert "forget 'cat': validation and test split share 3 samples, so the report is not an independent check" in notes


# UnlearnDataModule


def test_sets_of_concepts_may_each_have_parts_of_their_own():
    data = UnlearnDataModule(
        {"cat": numbers(range(12)), "dog": numbers(range(20, 28))},
        numbers(RETAIN),
        forget_val={"dog": numbers([50])},
        forget_test={"dog": numbers([51]), "cat": numbers([52])},
    )
    assert data.concepts == ["cat", "dog"]
    assert [sorted(read(data.forget_dataloader(split, "dog"))) for split in SPLITS] == [list(range(20, 28)), [50], [51]]
    assert read(data.forget_dataloader("test", "cat")) == [52]
    assert len(read(data.forget_dataloader("val", "cat"))) == 3
    assert data.notes["forget 'cat'"].startswith("forget 'cat': one set of 12 samples split into 9 train, 3 validation")
    assert data.notes["forget 'dog'"] == "forget 'dog': three sets: 8 train, 1 validation, 1 test"


@pytest.mark.parametrize(
    ("forget", "more", "message"),
    [
        ({"cat": range(9)}, {"forget_val": {"owl": range(3)}}, "forget_val: give a dict by concept, 'cat'"),
        ({"cat": range(9)}, {"forget_test": range(3)}, "forget_test: give a dict by concept, 'cat'"),
        (range(9), {"forget_test": {"cat": range(3)}}, "forget_test: give no dict, as the concept has no name"),
        ({"cat": range(9), "Cat": range(9)}, {}, "forget: the concepts 'cat' and 'Cat' would have the same files"),
        ({}, {}, "forget: no concept is given"),
        ({"cat": range(9), "dog": range(2)}, {}, "forget 'dog': 2 samples are too few"),
    ],
)
def test_sets_that_do_not_fit_are_refused(forget, more, message):
    with pytest.raises(UnlearnError, match=message):
        UnlearnDataModule(forget, numbers(RETAIN), **more)


def test_which_concept_must_be_said_where_there_are_several():
    data = UnlearnDataModule({"cat": numbers(range(9)), "dog": numbers(range(9, 18))})
    with pytest.raises(UnlearnError, match="concept: must be one of 'cat', 'dog', got None"):
        data.forget_dataloader("train")
    with pytest.raises(UnlearnError, match="concept: must be one of 'cat', 'dog', got 'owl'"):
        data.forget_dataloader("train", "owl")
    with pytest.raises(UnlearnError, match="concept: must be one of 'the forget set', got 'owl'"):
        UnlearnDataModule(numbers(range(9))).forget_dataloader("train", "owl")


def test_a_concept_without_a_name_has_that_of_the_datamodule():
    data = UnlearnDataModule(numbers(range(9)), numbers(RETAIN))
    assert data.concepts == ["the forget set"]
    data.concept = "cat"
    assert data.concepts == list(resolve_loaders(None, None, data).forget) == ["cat"]
    assert read(data.forget_dataloader("val", "cat")) == read(data.forget_dataloader("val"))
    data.set_parts("forget", numbers(range(20, 29)), concept="CAT")
    with pytest.raises(UnlearnError, match="the concepts 'cat' and 'CAT'"):
        resolve_loaders(None, None, data)


def test_retain_belongs_to_no_concept():
    with pytest.raises(UnlearnError, match="concept: must be None for retain data, got 'cat'"):
        UnlearnDataModule().set_parts("retain", numbers(range(9)), concept="cat")


# Limits


def trainer(**limits):
    whole = dict.fromkeys((f"limit_{split}_batches" for split in SPLITS), 1.0)
    return SimpleNamespace(**{**whole, "overfit_batches": 0, "fast_dev_run": False, **limits})


def test_limits_hold_for_each_concept_and_are_told_once():
    forget = {f"c{i}": loader(range(100 * i, 100 * i + 16 * i)) for i in range(1, 21)}
    loaders = resolve_loaders(forget, loader(RETAIN), None)
    limited = as_trainer_limits(loaders, trainer(limit_train_batches=3, limit_val_batches=0.5))
    for number, (name, parts) in enumerate(limited.forget.items(), start=1):
        assert [len(parts[split]) for split in SPLITS] == [min(3, 2 * number), max(1, number // 2), number]
        assert read(parts["train"]) == read(loaders.forget[name]["train"])[: 4 * len(parts["train"])]
    assert limited.notes == [
        *loaders.notes,
        "limit_train_batches=3: the gradients read 2 to 3 of 2 to 40 forget batches of each concept and 3 of 5 retain batches",
        "limit_val_batches=0.5: the search read 1 to 10 of 1 to 20 forget batches of each concept and 1 of 3 retain batches",
    ]


def test_a_share_of_a_concept_of_unknown_length_is_refused_by_name():
    loaders = resolve_loaders({"cat": loader(range(9)), "dog": DataLoader(Stream())}, loader(RETAIN), None)
    with pytest.raises(UnlearnError, match="the forget 'dog' loader has no length"):
        as_trainer_limits(loaders, trainer(limit_test_batches=0.5))
    notes = as_trainer_limits(loaders, trainer(limit_test_batches=1)).notes
    assert "1 of 1 forget batches or at most 1 of an unknown number of forget batches of each concept" in notes[-1]


# Two hundred


class Labelled(TensorDataset):
    """Counts the readings of each sample."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.arange(count), torch.arange(count) % 250)
        self.readings = torch.zeros(count, dtype=torch.long)

    def __getitem__(self, index):
        self.readings[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("selector", ["classes", "where"])
def test_two_hundred_concepts_are_one_pass_and_few_notes(selector):
    data = Labelled(5000)
    chosen = {
        "classes": {f"class {i}": [i, i + 1] for i in range(200)},
        "where": {f"class {i}": (lambda sample, i=i: sample[1] in (i, i + 1)) for i in range(200)},
    }
    if selector == "where":  # the time is that of a million calls of the predicates
        chosen["where"] = {name: chosen["where"][name] for name in list(chosen["where"])[:20]}
    names = list(chosen[selector])
    start = time.perf_counter()
    found = resolve_loaders(None, None, ConceptDataModule(data, **{selector: chosen[selector]}))
    seconds = time.perf_counter() - start
    assert data.readings.unique().tolist() == [1]
    assert list(found.forget) == names
    split = "one set of 40 samples split into 20 train, 10 validation, 10 test (seed 0)"
    assert found.notes[0] == f"forget: {len(names)} concepts, each: {split}"
    assert found.notes[1].startswith("retain: one set of ") and len(found.notes) == 8
    assert found.notes[-1] == f"forget: {len(names) - 1 - 5} more pairs of concepts share samples"
    assert sorted(everything(found.forget["class 7"])) == sorted([*range(7, 5000, 250), *range(8, 5000, 250)])
    assert seconds < 5, "a shared machine; by itself it is a fraction of a second"

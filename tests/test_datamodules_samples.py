"""Forget some of a model's training samples, measured against samples that it never saw."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from _tiny import CLASSES, blobs
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import SampleDataModule, UnlearnDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.modules import ClassifierModule
from slug_lightning.utils.loaders import SPLITS

COUNT = 40
HALVES = ("val", "test")
ON_PURPOSE = "in all splits, as the request is about them"


def numbers(values) -> TensorDataset:
    """A dataset whose samples are their own names."""
    return TensorDataset(torch.tensor(list(values)))


HOLDOUT = numbers(range(100, 111))


class Numbers(Dataset):
    """A dataset that YAML can name: every tenth sample is marked."""

    def __init__(self, count: int = COUNT, start: int = 0) -> None:
        self.count, self.start = count, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, bool]:
        if index >= self.count:
            raise IndexError(index)
        return self.start + index, index % 10 == 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def read(batches) -> list[int]:
    """First elements of the samples, in order."""
    return torch.cat([batch[0] for batch in batches]).tolist()


def make(dataset=None, holdout=HOLDOUT, **arguments) -> SampleDataModule:
    data = SampleDataModule(numbers(range(COUNT)) if dataset is None else dataset, holdout=holdout, **arguments)
    data.setup("fit")
    return data


some = st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT - 1)


@examples(40)
@given(chosen=some, seed=st.integers(0, 99), marked=st.booleans())
def test_forget_and_retain_partition_the_dataset(chosen, seed, marked):
    dataset = TensorDataset(torch.arange(COUNT), torch.tensor([i in chosen for i in range(COUNT)]))
    data = make(dataset, seed=seed, **({"column": 1} if marked else {"indices": list(chosen)}))
    forget = [read(data.forget_dataloader(split)) for split in SPLITS]
    assert forget[1] == forget[2] == sorted(forget[0]) == sorted(chosen)
    retained = read(data.retain_dataloader("train"))
    assert sorted(retained + forget[0]) == list(range(COUNT))


@examples(40)
@given(count=st.integers(2, 60), seed=st.integers(0, 99))
def test_holdout_halves_are_disjoint_and_complete(count, seed):
    data = make(indices=[3], holdout=numbers(range(100, 100 + count)), seed=seed)
    val, test = (read(data.holdout_dataloader(split)) for split in HALVES)
    assert 0 <= len(test) - len(val) <= 1 and val
    assert sorted(val + test) == list(range(100, 100 + count))
    for split in HALVES:
        assert read(data.retain_dataloader(split)) == read(data.holdout_dataloader(split))


@examples(20)
@given(
    chosen=st.dictionaries(st.sampled_from(["ann", "bob", "eve"]), st.sets(st.integers(0, 12), min_size=1), min_size=1),
    seed=st.integers(0, 9),
)
def test_each_of_several_concepts_has_its_samples_and_no_other(chosen, seed):
    data = make(indices={name: sorted(own) for name, own in chosen.items()}, seed=seed)
    assert data.concepts == list(chosen)
    for name, own in chosen.items():
        assert all(set(read(data.forget_dataloader(split, name))) == own for split in SPLITS)
        assert read(data.holdout_dataloader("val", name)) == read(data.holdout_dataloader("val"))
    assert set(read(data.retain_dataloader("train"))) == set(range(COUNT)).difference(*chosen.values())


def test_seed_alone_decides():
    def parts(seed: int) -> list[list[int]]:
        state = torch.get_rng_state()
        data = make(indices=range(5), seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return [read(data.holdout_dataloader("val")), read(data.retain_dataloader("train"))]

    assert parts(1) == parts(1)
    assert all(one != other for one, other in zip(parts(1), parts(2), strict=True))


def test_same_batches_as_of_sets_divided_by_hand():
    chosen, others = [4, 9, 30], [i for i in range(COUNT) if i not in (4, 9, 30)]
    data = make(indices=[30, 4, 9], batch_size=4)
    val, test = (numbers(read(data.holdout_dataloader(split))) for split in HALVES)
    forget = numbers(chosen)
    by_hand = UnlearnDataModule(
        forget, numbers(others), forget_val=forget, forget_test=forget, retain_val=val, retain_test=test, batch_size=4
    )
    for split in SPLITS:
        assert str(list(data.forget_dataloader(split))) == str(list(by_hand.forget_dataloader(split)))
        assert str(list(data.retain_dataloader(split))) == str(list(by_hand.retain_dataloader(split)))


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_any_sequence_of_indices(kind):
    assert read(make(indices=kind([5, 2])).forget_dataloader("val")) == [2, 5]


def test_a_column_by_key_and_each_sample_read_once():
    seen = []

    class Watched(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            seen.append(index)
            return {"x": index, "gone": np.bool_(index == 7)}

    data = SampleDataModule(Watched(), column="gone", holdout=HOLDOUT)
    assert not seen
    data.setup("fit")
    data.setup("test")
    assert seen == list(range(12))
    assert [batch["x"].tolist() for batch in data.forget_dataloader("test")] == [[7]]


def test_options_reach_every_loader():
    data = make(indices=[1, 2, 3], batch_size=2, collate_fn=len)
    assert list(data.forget_dataloader("train")) == [2, 1]
    assert list(data.holdout_dataloader("val")) == [2, 2, 1]
    assert list(data.holdout_dataloader("test")) == [2, 2, 2]


def test_trainer_reads_the_rest_and_then_the_holdout():
    data = make(indices=[1, 2])
    assert len(read(data.train_dataloader())) == COUNT - 2
    for split, served in zip(HALVES, (data.val_dataloader(), data.test_dataloader()), strict=True):
        assert read(served) == read(data.holdout_dataloader(split))


# Notes


def test_notes_say_that_splits_share_samples_by_design():
    data = make(indices=[3, 1], seed=5)
    found = resolve_loaders(None, None, data)
    assert data.notes == {
        "forget": f"forget: the same 2 samples {ON_PURPOSE}",
        "retain": "retain: 38 train, the other training samples; 5 validation, 6 test, the halves of the holdout set (seed 5)",
        "holdout": "holdout: one set of 11 samples halved into 5 validation, 6 test (seed 5)",
    }
    assert found.notes == [data.notes["forget"], data.notes["retain"]]


@pytest.mark.parametrize("count", [2, 4])
def test_notes_on_several_concepts(count):
    data = make(indices={f"c{i}": [i, 10 + i] for i in range(count)})
    notes = resolve_loaders(None, None, data).notes
    assert not any("share" in note for note in notes)
    if count == 2:
        assert notes[0] == data.notes["forget 'c0'"] == f"forget 'c0': the same 2 samples {ON_PURPOSE}"
    else:
        assert notes[0] == f"forget: 4 concepts, each: the same 2 samples {ON_PURPOSE}"


def test_other_sources_of_the_same_run_are_still_told():
    own = numbers(range(50, 56))
    by_chance = {split: DataLoader(own) for split in SPLITS}
    notes = resolve_loaders({"a": make(indices=[1]), "b": by_chance}, DataLoader(numbers(range(200, 220))), None).notes
    (told,) = (note for note in notes if "not an independent check" in note)
    assert told.startswith("forget 'b': validation and test split share 6 samples")


# Errors


WHOLE = numbers(range(COUNT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^indices, column: give exactly one, .*given: none"),
        ({"indices": [1], "column": 1}, "^indices, column: give exactly one, .*given: both"),
        ({"indices": [1, 40]}, "^indices: 40 is out of range; the dataset has 40 samples, 0 to 39"),
        ({"indices": [-1]}, "^indices: -1 is out of range"),
        ({"indices": [5, 3, 3]}, "^indices: 3 is given more than once; give each"),
        ({"indices": {"a": [1], "b": [2, 2]}}, "^indices 'b': 2 is given more than once"),
        ({"indices": {}}, "^indices: no concept is given"),
        ({"indices": []}, "^dataset: none of the 40 samples is selected; select"),
        ({"indices": range(40)}, "^dataset: all 40 samples are selected, none is left to retain; select fewer"),
        ({"indices": {"a": range(20), "b": range(20, 40)}}, "^dataset: all 40 samples"),
        ({"indices": [1], "holdout": numbers([])}, "^holdout: must have at least 2 samples, .* got 0; give"),
        ({"indices": [1], "holdout": numbers([1])}, "^holdout: must have at least 2 samples, .* got 1; give"),
        ({"indices": [1], "holdout": WHOLE}, "^holdout: 40 of its 40 samples are in dataset, too; give only"),
        ({"indices": [1], "holdout": Subset(WHOLE, [39, 7])}, "^holdout: 2 of its 2 samples are in dataset"),
        ({"column": 5}, "^column: sample 0 has no single value at 5 .IndexError.*; give the position"),
        ({"column": "gone"}, "^column: sample 0 has no single value at 'gone' .TypeError"),
        ({"column": 0}, "^column: must be true or false, .*; at 0 sample 2 has 2; select with indices"),
    ],
)
def test_errors_name_argument_and_remedy(arguments, message):
    with pytest.raises(UnlearnError, match=message):
        make(WHOLE, **arguments)


@pytest.mark.parametrize("mark", ["no", "", "1", None, float("nan"), 2, torch.zeros(2), [1]])
def test_what_is_neither_true_nor_false_is_refused(mark):
    with pytest.raises(UnlearnError, match="^column: .*sample 1 has .*indices"):
        make([(0, True), (1, mark)], column=1)


@pytest.mark.parametrize("name", ["dataset", "holdout"])
def test_streams_are_refused(name):
    with pytest.raises(UnlearnError, match=f"^{name}: must be a map-style dataset, as a stream .Stream. has no indices"):
        make(**{name: Stream()}, indices=[1])


def test_parts_of_one_dataset_may_be_trained_on_and_held_out():
    data = make(Subset(WHOLE, range(1, 40, 2)), Subset(Subset(WHOLE, range(0, 40, 2)), range(5)), indices=[0])
    assert read(data.forget_dataloader("val")) == [1]
    assert sorted(read(data.holdout_dataloader("val")) + read(data.holdout_dataloader("test"))) == [0, 2, 4, 6, 8]
    with pytest.raises(UnlearnError, match="^holdout: 1 of its 2 samples are in dataset"):
        make(Subset(WHOLE, range(10)), Subset(Subset(WHOLE, range(30, 4, -1)), [0, 24]), indices=[0])


def test_holdout_is_served_after_setup_by_split_and_concept():
    data = SampleDataModule(WHOLE, indices={"ann": [1], "bob": [2]}, holdout=HOLDOUT)
    with pytest.raises(UnlearnError, match=r"^holdout: not divided yet; call setup\(\) first"):
        data.holdout_dataloader("val")
    data.setup("fit")
    with pytest.raises(UnlearnError, match="^split: must be 'val' or 'test' for holdout data, got 'train'"):
        data.holdout_dataloader("train")
    with pytest.raises(UnlearnError, match="^concept: must be one of 'ann', 'bob', got 'eve'"):
        data.holdout_dataloader("val", "eve")


# In use


@pytest.mark.parametrize("selector", [{"indices": [3, 1]}, {"indices": {"a": [1], "b": [3, 2]}}, {"column": 1}])
def test_yaml_can_say_all_of_it(selector):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SampleDataModule, "data")
    sets = {
        name: {"class_path": f"{__name__}.Numbers", "init_args": {"count": 20, "start": start}}
        for name, start in (("dataset", 0), ("holdout", 100))
    }
    settings = {**sets, "batch_size": 2, **selector}
    config = parser.parse_object({"data": {"class_path": "slug_lightning.datamodules.SampleDataModule", "init_args": settings}})
    data = parser.instantiate_classes(config).data
    data.setup("fit")
    forgotten = {i for name in data.concepts for i in read(data.forget_dataloader("val", name))}
    assert forgotten == ({0, 10} if "column" in selector else {1, 2, 3} if "b" in selector["indices"] else {1, 3})
    assert data.batch_size == 2


def test_a_run_measures_all_the_samples_and_says_so():
    """The search and the report read the same forget samples, so that a feasible step stays feasible."""
    pl.seed_everything(0, verbose=False)
    points, labels = blobs().tensors
    wrong = torch.arange(0, 120, 12)  # what a model can only know by heart
    learned = labels[:120].clone()
    learned[wrong] = (learned[wrong] + 1) % CLASSES
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points[:120]), learned).backward()
        optimizer.step()
    data = SampleDataModule(
        TensorDataset(points[:120], learned), indices=wrong.tolist(), holdout=TensorDataset(points[120:], labels[120:])
    )
    callback = UnlearnCallback(forget_target=0.3, retain_tolerance=0.2)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(ClassifierModule(model, CLASSES), data)
    report = callback.report
    assert report.before["forget"]["accuracy"] > 0.7 and report.before["retain"]["accuracy"] < 1
    assert report.status == "unlearned" and report.after["forget"]["accuracy"] <= 0.3
    assert f"forget: the same 10 samples {ON_PURPOSE}" in report.notes
    assert not any("independent" in note for note in report.notes)

"""Three parts of forget and retain, from whatever a user gives."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from slug_lightning.datamodules.base import UnlearnDataModule, make_splits, split_indices
from slug_lightning.datamodules.sources.resolve import UnlearnLoaders, resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Chained

FORGET, RETAIN = range(24), range(100, 140)


def numbers(values) -> TensorDataset:
    """A dataset whose samples are their own names."""
    return TensorDataset(torch.tensor(list(values)))


def loader(values, **options) -> DataLoader:
    return DataLoader(numbers(values), **{"batch_size": 4, **options})


def read(batches) -> list[int]:
    """The numbers that come out of a loader or a dataset, in order."""
    tensors = (batch[0] if isinstance(batch, (list, tuple)) else batch for batch in batches)
    return [number for tensor in tensors for number in tensor.flatten().tolist()]


def resolve(forget, retain, datamodule) -> UnlearnLoaders:
    """One concept, whose loaders stand in `forget`."""
    found = resolve_loaders(None if forget is None else {"it": forget}, retain, datamodule)
    (only,) = found.forget.values()
    return found._replace(forget=only)


def parts_of(loaders: UnlearnLoaders, kind: str = "forget") -> list[list[int]]:
    return [read(getattr(loaders, kind)[split]) for split in SPLITS]


def assert_partition(parts: list[list[int]], expected) -> None:
    """Each expected sample once over the three parts, none of which is empty."""
    assert all(parts)
    assert sorted(number for part in parts for number in part) == sorted(expected)


class Stream(IterableDataset):
    def __init__(self, values) -> None:
        self.values = list(values)

    def __iter__(self):
        return iter(self.values)


class Data(pl.LightningDataModule):
    """A datamodule as people have it; loaders are made of the datasets that `setup` makes."""

    def __init__(self, train, val=None) -> None:
        super().__init__()
        self.values = {"train": train, "val": val}
        self.stages: list[str] = []

    def prepare_data(self) -> None:
        self.stages.append("prepare")

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.sets = {name: values and numbers(values) for name, values in self.values.items()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["train"], batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["val"], batch_size=4)


class FullData(Data):
    def test_dataloader(self) -> DataLoader:
        return loader(range(80, 90))


class DictData(pl.LightningDataModule):
    """Its loaders are dicts with forget and retain; val has no retain, and test does not exist."""

    def train_dataloader(self) -> dict[str, DataLoader]:
        return {"forget": loader(FORGET), "retain": loader(RETAIN)}

    def val_dataloader(self) -> dict[str, DataLoader]:
        return {"forget": loader(range(50, 56))}


# split_indices and make_splits


@examples(60)
@given(count=st.integers(3, 400), seed=st.integers(0, 2**31))
def test_split_is_a_partition_of_known_sizes_and_always_alike(count, seed):
    parts = split_indices(count, seed)
    assert_partition([parts[split] for split in SPLITS], range(count))
    assert len(parts["val"]) == len(parts["test"]) == max(1, count // 4)
    assert parts == split_indices(count, seed)


def test_split_depends_on_the_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert split_indices(50, 0) != split_indices(50, 1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_split_refuses_what_cannot_be_three(count):
    with pytest.raises(ValueError, match=f"^{count} samples"):
        split_indices(count)
    with pytest.raises(UnlearnError, match="forget: .*(empty|at least 3)"):
        make_splits("forget", numbers(range(count)), None, None)


def test_make_splits_splits_off_only_what_is_missing():
    train, own = numbers(range(12)), numbers(range(50, 53))
    both, note = make_splits("forget", train, own, own)
    assert both["val"] is both["test"] is own
    assert sorted(read(both["train"])) == list(range(12))
    assert note == "three sets: 12 train, 3 validation, 3 test"
    for given_name, missing in (("val", "test"), ("test", "val")):
        parts, note = make_splits("retain", train, *((own, None) if given_name == "val" else (None, own)))
        assert parts[given_name] is own
        assert sorted(read(parts["train"]) + read(parts[missing])) == list(range(12))
        assert len(parts[missing]) == 3
        assert "one set of 12" in note


def test_train_is_mixed_even_if_nothing_is_split():
    parts, _ = make_splits("forget", numbers(range(50)), numbers([1]), numbers([2]))
    assert read(parts["train"]) != list(range(50))


@pytest.mark.parametrize("empty", range(3))
def test_an_empty_set_is_refused_wherever_it_stands(empty):
    sets = [numbers([] if i == empty else range(5)) for i in range(3)]
    with pytest.raises(UnlearnError, match="retain: a dataset is empty"):
        make_splits("retain", *sets)


# UnlearnDataModule


@pytest.mark.parametrize("given_sets", range(2, 7))
def test_datamodule_with_two_to_six_sets(given_sets):
    names = ["forget", "retain", "forget_val", "retain_val", "forget_test", "retain_test"]
    sets = {name: numbers(range(100 * i, 100 * i + 20)) for i, name in enumerate(names[:given_sets])}
    data = UnlearnDataModule(**sets, batch_size=3)
    found = resolve(None, None, data)
    for kind in ("forget", "retain"):
        expected = [number for name in sets if name.startswith(kind) for number in read(sets[name])]
        assert_partition(parts_of(found, kind), expected)
        for split in ("val", "test"):
            if f"{kind}_{split}" in sets:
                assert read(getattr(found, kind)[split]) == read(sets[f"{kind}_{split}"])
    assert found.notes == [data.notes["forget"], data.notes["retain"]]
    assert all(len(batch[0]) <= 3 for batch in found.forget["train"])


def test_datamodule_serves_retain_to_the_trainer():
    data = UnlearnDataModule(numbers(FORGET), numbers(RETAIN))
    parts = [read(data.train_dataloader()), read(data.val_dataloader()), read(data.test_dataloader())]
    assert_partition(parts, RETAIN)
    assert parts == [read(data.retain_dataloader(split)) for split in SPLITS]
    assert_partition([read(data.forget_dataloader(split)) for split in SPLITS], FORGET)


def test_datamodule_passes_its_options_to_the_loaders():
    data = UnlearnDataModule(numbers(FORGET), numbers(RETAIN), batch_size=5, collate_fn=len, num_workers=0)
    assert list(data.forget_dataloader("train")) == [5, 5, 2]


def test_seed_decides_the_parts_and_nothing_else_does():
    def parts(seed, disturb):
        torch.manual_seed(disturb)
        return parts_of(resolve(UnlearnDataModule(numbers(FORGET), seed=seed), loader(RETAIN), None))

    assert parts(0, disturb=1) == parts(0, disturb=2)
    assert parts(0, disturb=1) != parts(1, disturb=1)


def test_datamodule_without_a_set_says_which():
    with pytest.raises(UnlearnError, match="retain: no dataset"):
        UnlearnDataModule(numbers(FORGET)).retain_dataloader("train")
    with pytest.raises(UnlearnError, match="forget: no dataset"):
        UnlearnDataModule(retain=numbers(RETAIN)).forget_dataloader("train")
    with pytest.raises(UnlearnError, match="forget: no dataset"):
        resolve(None, None, UnlearnDataModule(retain=numbers(RETAIN)))


# DataLoaders


@pytest.mark.parametrize("options", [{}, {"drop_last": True, "batch_size": 7}, {"shuffle": True}, {"batch_size": None}])
def test_loader_is_split_without_loss(options):
    found = resolve(loader(FORGET, **options), loader(RETAIN), None)
    assert_partition(parts_of(found), FORGET)
    assert_partition(parts_of(found, "retain"), RETAIN)
    assert found.notes[0] == "forget: one set of 24 samples split into 12 train, 6 validation, 6 test (seed 0)"


def test_loader_settings_are_kept():
    found = resolve(loader(FORGET, collate_fn=len, batch_size=5), loader(RETAIN), None)
    assert list(found.forget["train"]) == [5, 5, 2]


def test_only_the_samples_of_a_subset_sampler_are_read():
    drawn = [1, 5, 7, 11, 13, 17]
    found = resolve(loader(FORGET, sampler=SubsetRandomSampler(drawn)), loader(RETAIN), None)
    assert_partition(parts_of(found), drawn)


def test_a_weighted_sampler_repeats_no_sample():
    sampler = WeightedRandomSampler([1.0] * 24, 200, generator=torch.Generator().manual_seed(0))
    parts = parts_of(resolve(loader(FORGET, sampler=sampler), loader(RETAIN), None))
    everything = sum(parts, [])
    assert len(everything) == len(set(everything))
    assert all(parts)


class Pairs:
    """A batch sampler that knows no batch_size: two neighbours at a time, of the first ten samples."""

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 10, 2)])

    def __len__(self):
        return 5


class Whole(BatchSampler):
    """A batch sampler of a type of its own."""


@pytest.mark.parametrize(
    ("batch_sampler", "expected", "size"),
    [
        (BatchSampler(SubsetRandomSampler([2, 3, 5, 7, 11]), 3, drop_last=False), [2, 3, 5, 7, 11], 3),
        (Whole(SubsetRandomSampler([2, 3, 5, 7, 11, 13]), 2, drop_last=False), [2, 3, 5, 7, 11, 13], 2),
        (Pairs(), range(10), 2),
    ],
    ids=["plain", "subclass", "own"],
)
def test_only_the_samples_of_a_batch_sampler_are_read(batch_sampler, expected, size):
    found = resolve(DataLoader(numbers(FORGET), batch_sampler=batch_sampler), loader(RETAIN), None)
    assert_partition(parts_of(found), expected)
    assert len(next(iter(found.forget["train"]))[0]) == size


@pytest.mark.parametrize("give", [list, tuple], ids=["list", "tuple"])
def test_several_loaders_are_split_each_and_read_in_turn(give):
    found = resolve(give([loader(range(8)), loader(range(50, 62))]), loader(RETAIN), None)
    parts = parts_of(found)
    assert_partition(parts, [*range(8), *range(50, 62)])
    assert all(min(part) < 8 and max(part) >= 50 for part in parts)
    assert "one set of 8" in found.notes[0] and "one set of 12" in found.notes[0]


def test_loaders_by_split_are_taken_as_they_are():
    own = {
        "train": loader(range(6)),
        "val": {"a": loader([10]), "b": loader([11])},
        "test": [loader([20]), loader([21])],
    }
    found = resolve(own, loader(RETAIN), None)
    assert parts_of(found) == [list(range(6)), [10, 11], [20, 21]]
    assert found.notes[0] == "forget: three loaders were given"


def test_loaders_by_split_are_completed():
    found = resolve({"train": loader(FORGET), "val": loader([50, 51])}, loader(RETAIN), None)
    assert read(found.forget["val"]) == [50, 51]
    assert len(read(found.forget["test"])) == 6
    assert not set(read(found.forget["train"])) & set(read(found.forget["test"]))


def test_a_dict_needs_a_train_loader():
    with pytest.raises(UnlearnError, match=r"forget: .*'train'.*\['val'\]"):
        resolve({"val": loader(FORGET)}, loader(RETAIN), None)


# Streams


@pytest.mark.parametrize(
    "stream",
    [DataLoader(Stream(FORGET), batch_size=2), Chained([loader(FORGET, batch_size=2)])],
    ids=["iterable dataset", "any iterable"],
)
def test_a_stream_is_read_once_over_the_three_splits(stream):
    found = resolve(stream, loader(RETAIN), None)
    parts = parts_of(found)
    assert_partition(parts, FORGET)
    assert parts == [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 12, 13, 20, 21], [6, 7, 14, 15, 22, 23]]
    assert parts_of(found) == parts, "a second reading starts anew"
    assert "of every four batches" in found.notes[0]


@pytest.mark.parametrize("wrong", [5, object()])
def test_what_is_no_loader_is_refused(wrong):
    with pytest.raises(UnlearnError, match=f"forget: must be a DataLoader, .*got {type(wrong).__name__}"):
        resolve(wrong, loader(RETAIN), None)


def test_a_generator_is_refused():
    with pytest.raises(UnlearnError, match="retain: an iterator can be read only once"):
        resolve(loader(FORGET), (batch for batch in loader(RETAIN)), None)


def test_an_empty_list_and_an_empty_loader_are_refused():
    with pytest.raises(UnlearnError, match="forget: the list of loaders is empty"):
        resolve([], loader(RETAIN), None)
    with pytest.raises(UnlearnError, match="retain: a dataset is empty"):
        resolve(loader(FORGET), loader([]), None)


@pytest.mark.parametrize("wrong", [[torch.arange(8), torch.arange(8)], [(torch.arange(8),)], "forget.csv"])
def test_what_can_be_iterated_but_gives_no_batches_is_refused(wrong):
    with pytest.raises(UnlearnError, match="forget: "):
        resolve(wrong, loader(RETAIN), None)


def test_a_stream_too_short_for_a_split_is_refused_when_read():
    found = resolve(DataLoader(Stream(range(6)), batch_size=2), loader(RETAIN), None)
    assert [read(found.forget[split]) for split in ("train", "val")] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(UnlearnError, match="3 batches"):
        read(found.forget["test"])


# Datamodules


def test_datamodule_without_test_loader_is_completed():
    data = Data(FORGET, range(50, 56))
    found = resolve(data, loader(RETAIN), None)
    train, val, test = parts_of(found)
    assert val == list(range(50, 56))
    assert test and set(test) <= set(FORGET) and not set(test) & set(train)
    assert data.stages == ["prepare", "fit", "test"]


def test_datamodule_with_test_loader_is_taken_as_it_is():
    found = resolve(FullData(FORGET, range(50, 56)), loader(RETAIN), None)
    assert parts_of(found) == [list(FORGET), list(range(50, 56)), list(range(80, 90))]


def test_datamodule_whose_loaders_are_dicts():
    found = resolve(None, None, DictData())
    assert read(found.forget["val"]) == list(range(50, 56))
    assert len(read(found.forget["test"])) == 6
    assert_partition(parts_of(found, "retain"), RETAIN)


def test_what_is_given_comes_before_the_datamodule():
    found = resolve(loader(range(60, 72)), None, DictData())
    assert_partition(parts_of(found), range(60, 72))
    assert_partition(parts_of(found, "retain"), RETAIN)


@pytest.mark.parametrize("datamodule", [None, FullData(FORGET, FORGET)], ids=["none", "without forget"])
def test_no_source_at_all_is_refused(datamodule):
    if datamodule is not None:
        datamodule.setup("fit")
    with pytest.raises(UnlearnError, match="forget: nothing was given"):
        resolve(None, loader(RETAIN), datamodule)


# Forget and retain must differ


def same_dataset() -> tuple[DataLoader, DataLoader]:
    data = numbers(FORGET)
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=8, shuffle=True)


def part_of_retain() -> tuple[DataLoader, DataLoader]:
    data = numbers(FORGET)
    return DataLoader(Subset(data, range(6))), DataLoader(data)


def same_in_nested_subsets() -> tuple[DataLoader, DataLoader]:
    data: Dataset = numbers(FORGET)
    inner = Subset(data, [9, 8, 7, 6, 5])
    return DataLoader(Subset(inner, [0, 1, 2])), DataLoader(Subset(data, [7, 8, 9]))


def same_by_tensor_indices() -> tuple[DataLoader, DataLoader]:
    data = numbers(FORGET)
    return DataLoader(Subset(data, torch.arange(6))), DataLoader(Subset(data, torch.arange(8)))


def same_in_a_list() -> tuple[list[DataLoader], list[DataLoader]]:
    data = numbers(FORGET)
    return [DataLoader(data)], [loader(RETAIN), DataLoader(data)]


def same_stream() -> tuple[DataLoader, DataLoader]:
    stream = Stream(FORGET)
    return DataLoader(stream), DataLoader(stream, batch_size=2)


@pytest.mark.parametrize(
    "make", [same_dataset, part_of_retain, same_in_nested_subsets, same_by_tensor_indices, same_in_a_list, same_stream]
)
def test_the_same_data_is_refused(make):
    with pytest.raises(UnlearnError, match="the same data"):
        resolve(*make(), None)


def test_the_same_iterable_is_refused():
    batches = Chained([loader(FORGET)])
    with pytest.raises(UnlearnError, match="the same data"):
        resolve(batches, batches, None)


def test_partial_overlap_warns_with_its_size():
    data = numbers(range(40))
    with pytest.warns(UserWarning, match="3 of 10 samples of 'it' are in retain too"):
        resolve(DataLoader(Subset(data, range(10))), DataLoader(Subset(data, range(7, 40))), None)


@pytest.mark.parametrize("by_split", [False, True])
def test_two_samplers_of_one_dataset_are_not_the_same_data(by_split):
    """How one dataset is often divided; a warning would be an error here."""
    data = numbers(range(40))
    first, second = (DataLoader(data, sampler=SubsetRandomSampler(half)) for half in (range(10), range(10, 40)))
    if by_split:
        first, second = (dict.fromkeys(SPLITS, one) for one in (first, second))
    found = resolve(first, second, None)
    assert set(sum(parts_of(found), [])) == set(range(10))
    assert set(sum(parts_of(found, "retain"), [])) == set(range(10, 40))

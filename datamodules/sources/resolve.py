"""Turn whatever a user gives into the loaders of a run."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from slug_lightning.datamodules.base import UnlearnDataModule, no_dataset
from slug_lightning.datamodules.sources.split import SameBatches, Sample, samples_of, split_loader
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, Chained, EveryFourth, First, Split, reads_as_torch
from slug_lightning.utils.modules import lightning_base
from slug_lightning.utils.names import check_names, concept_of, labelled, listed, notes_on

Prepare = Callable[[pl.LightningDataModule], Any]


class UnlearnLoaders(NamedTuple):
    """The batches that a run reads."""

    forget: dict[str, dict[Split, Batches]]  # by the concept's name and by split
    retain: dict[Split, Batches]
    notes: list[str]  # sentences for the report, such as how a set was split; few, however many concepts there are
    datamodules: dict[str, UnlearnDataModule] = {}  # by concept, where its source is one

    @property
    def holdout(self) -> dict[str, Batches]:
        """Samples that the model was never trained on, by concept, where a datamodule has some."""
        sources = {name: one.holdout_batches() for name, one in self.datamodules.items()}
        return {name: batches for name, batches in sources.items() if batches is not None}


def resolve_loaders(
    forget: Mapping[str, Any] | None,
    retain: Any,
    datamodule: pl.LightningDataModule | None,
    prepare: Prepare = lambda datamodule: datamodule.prepare_data(),
) -> UnlearnLoaders:
    """Turn whatever a user gave into train, val and test loaders of every concept and of retain.

    `forget` has a source for each concept: a DataLoader or any iterable of batches, a list of them (read one after the other), a
    LightningDataModule (of an `UnlearnDataModule` with several concepts, the one of that name), or a dict of loaders by split.
    `retain` is one such source. What is None is taken from the trainer's `datamodule`: an `UnlearnDataModule`, or any whose
    loaders are dicts with the keys "forget" and "retain". `prepare` calls `prepare_data` on as many ranks as it should run.
    """
    done: list[pl.LightningDataModule] = []

    def ready(datamodule: pl.LightningDataModule) -> None:
        """Prepare and set up a datamodule once: it may serve many concepts."""
        if not any(datamodule is other for other in done):
            prepare(datamodule)
            for stage in ("fit",) if isinstance(datamodule, UnlearnDataModule) else ("fit", "test"):
                datamodule.setup(stage)
            done.append(datamodule)

    sources = _sources(forget, datamodule, ready)
    concepts: dict[str, dict[Split, Batches]] = {}
    sentences = {}
    for name, source in sources.items():
        label = labelled("forget", name if len(sources) > 1 else None)
        concepts[name], sentences[name] = _loaders(label, name, source, ready)
    notes = notes_on(sentences, len(sources))
    by_design = {name for name, source in sources.items() if getattr(source, "same_forget_splits", False)}  # its notes say so
    twice = {name: told for name, loaders in concepts.items() if name not in by_design and (told := _seen_twice(loaders))}
    notes += notes_on(twice, len(sources))
    if retain is None:
        retain = _of_datamodule("retain", datamodule)
    retained, sentence = _loaders("retain", None, retain, ready)
    notes += [f"retain: {told}" for told in (sentence, _seen_twice(retained)) if told]
    serving = {name: source for name, source in sources.items() if isinstance(source, UnlearnDataModule)}
    return UnlearnLoaders(concepts, retained, notes + refuse_same_data(concepts, retained), serving)


def resolve_near(source: Any, prepare: Prepare) -> tuple[dict[Split, Batches], str]:
    """Turn near data that a user gave into train, val and test loaders, with a sentence on how they came about."""

    def ready(datamodule: pl.LightningDataModule) -> None:
        prepare(datamodule)
        for stage in ("fit",) if isinstance(datamodule, UnlearnDataModule) else ("fit", "test"):
            datamodule.setup(stage)

    return _loaders("near_retain", None, source, ready)


def _sources(forget: Mapping[str, Any] | None, datamodule: pl.LightningDataModule | None, ready: Prepare) -> dict[str, Any]:
    """Return the source of each concept by its name."""
    if forget is None:
        source = _of_datamodule("forget", datamodule)
        names = [concept_of(datamodule)]
        if isinstance(source, UnlearnDataModule):
            ready(source)
            if not (names := source.concepts):
                raise no_dataset("forget", source)
        check_names("forget", names)
        return dict.fromkeys(names, source)
    check_names("forget", forget)
    if len(forget) > 1 and forget.keys() <= set(SPLITS):
        raise UnlearnError(f"forget: {listed(list(forget))} are splits, not concepts; give {{'a name': …}} with this dict in it")
    return dict(forget)


def _seen_twice(loaders: Mapping[Split, Batches]) -> str:
    """Return a sentence if validation and test data overlap, else ""."""
    shared = samples_in(loaders["val"]) & samples_in(loaders["test"])
    if not shared or any(key is None for _, key in shared):  # what two streams share is unknown
        return ""
    return f"validation and test split share {len(shared)} samples, so the report is not an independent check"


def _of_datamodule(kind: str, datamodule: pl.LightningDataModule | None) -> Any:
    """Return the trainer's datamodule as a source, or its loaders under the key `kind`."""
    if isinstance(datamodule, UnlearnDataModule):
        return datamodule
    if datamodule is not None:
        train = _loader_of(datamodule, "train")
        if isinstance(train, Mapping) and kind in train:
            datamodule.setup("test")
            loaders = {"train": train} | {split: _loader_of(datamodule, split) for split in ("val", "test")}
            return {split: loader[kind] for split, loader in loaders.items() if isinstance(loader, Mapping) and kind in loader}
    raise UnlearnError(
        f"{kind}: nothing was given and the trainer's datamodule has none; pass {kind}=… (a DataLoader, a "
        "LightningDataModule) to the callback, or fit with an UnlearnDataModule"
    )


def _loader_of(datamodule: pl.LightningDataModule, split: Split) -> Any:
    """Return a datamodule's loader of one split, or None if it defines none."""
    name = f"{split}_dataloader"
    base = lightning_base(datamodule, "LightningDataModule")
    assert base is not None
    loader: Any = getattr(datamodule, name)() if is_overridden(name, datamodule, base) else None
    return loader.iterables if lightning_base(loader, "CombinedLoader") else loader


def _loaders(label: str, concept: str | None, source: Any, ready: Prepare) -> tuple[dict[Split, Batches], str]:
    """Return the loaders of one concept, or of retain (None), by split, and a sentence on how they came about."""
    if lightning_base(source, "LightningDataModule"):
        ready(source)
        if isinstance(source, UnlearnDataModule):
            return _served(concept, source)
        source = {split: loader for split in SPLITS if (loader := _loader_of(source, split)) is not None}
    if isinstance(source, Mapping):
        if "train" not in source:
            raise UnlearnError(f"{label}: the dict must have a 'train' loader, got only {sorted(source)}")
        given = {split: _chained(source[split]) for split in SPLITS if split in source}
        if len(given) == len(SPLITS):
            return given, "three loaders were given"
        splits, note = _loaders(label, concept, source["train"], ready)
        for split in set(given) - {"train"}:  # what was split off for it returns to train
            splits["train"] = Chained([splits["train"], splits[split]])
            splits[split] = given[split]
            note += f"; instead of its {split} split, a loader that was given"
        return splits, note
    if isinstance(source, (list, tuple)):
        if not source:
            raise UnlearnError(f"{label}: the list of loaders is empty")
        each = [_loaders(label, concept, loader, ready) for loader in source]
        return {split: Chained(splits[split] for splits, _ in each) for split in SPLITS}, "; ".join(n for _, n in each)
    if not isinstance(source, Iterable) or isinstance(source, (torch.Tensor, str)):
        raise UnlearnError(f"{label}: must be a DataLoader, LightningDataModule or list of loaders, got {type(source).__name__}")
    if lightning_base(source, "CombinedLoader"):
        raise UnlearnError(f"{label}: a CombinedLoader numbers its batches; give a list of its loaders, which are read in turn")
    if not isinstance(source, DataLoader) and iter(source) is source:
        raise UnlearnError(f"{label}: an iterator can be read only once; give something that starts anew, like a DataLoader")
    return split_loader(label, source)


def _served(concept: str | None, source: UnlearnDataModule) -> tuple[dict[Split, Batches], str]:
    """Return what a datamodule serves: retain (None), or its concept of that name; its only one under any name."""
    if concept is None:
        return {split: source.retain_dataloader(split) for split in SPLITS}, source.notes["retain"].removeprefix("retain: ")
    own = concept if len(source.concepts) > 1 else None
    if own is not None and own not in source.concepts:
        raise UnlearnError(
            f"forget: must be among the datamodule's concepts, {listed(source.concepts)}, got {own!r}; or fit with the "
            "datamodule and leave forget out"
        )
    label = labelled("forget", source.key_of(own))
    return {split: source.forget_dataloader(split, own) for split in SPLITS}, source.notes[label].removeprefix(f"{label}: ")


def _chained(loader: Any) -> Batches:
    """Chain the loaders of a dict or list; return a single loader as it is."""
    if isinstance(loader, Mapping):
        loader = list(loader.values())
    return Chained(loader) if isinstance(loader, (list, tuple)) else loader


# ---- samples that the sets of a run share


def samples_in(batches: Any) -> set[Sample]:
    """Return the samples that a loader, or a dict of loaders by split, reads."""
    if isinstance(batches, (Mapping, Chained)):
        return set[Sample]().union(*map(samples_in, batches.values() if isinstance(batches, Mapping) else batches.loaders))
    if isinstance(batches, First):
        return samples_in(batches.loader)
    loader: Any = batches
    while isinstance(loader, (EveryFourth, SameBatches)):
        loader = loader.loader
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return {(id(loader.dataset), None)}
    # What a subclass reads, nobody knows.
    return samples_of(loader) if isinstance(loader, DataLoader) and reads_as_torch(loader) else {(id(loader), None)}


def refuse_same_data(forget: Mapping[str, Mapping[Split, Batches]], retain: Mapping[Split, Batches]) -> list[str]:
    """Refuse the same data under two names, warn if retain has some of a concept, and return notes on what concepts share."""
    concepts = {name: samples_in(loaders) for name, loaders in forget.items()}
    retained = samples_in(retain)
    if inside := [name for name, own in concepts.items() if own and own <= retained]:
        raise UnlearnError(f"forget {listed(inside)}: the same data as retain, or a part of it; leave it out of retain")
    partly = [f"{len(own & retained)} of {len(own)} samples of {name!r}" for name, own in concepts.items() if own & retained]
    if partly:
        more = f", and samples of {len(partly) - 5} more concepts," if len(partly) > 5 else ""
        warnings.warn(f"forget, retain: {', '.join(partly[:5])}{more} are in retain too", stacklevel=3)
    same: dict[frozenset[Sample], str] = {}
    owners: dict[Sample, list[str]] = defaultdict(list)
    for name, own in concepts.items():
        if own and (first := same.setdefault(frozenset(own), name)) != name:
            raise UnlearnError(f"forget: {first!r} and {name!r} are the same data; give them once")
        for sample in own:
            if sample[1] is not None:  # what two streams share is unknown
                owners[sample].append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names, count in Counter(map(tuple, owners.values())).items():  # many samples have the same owners
        shared.update(dict.fromkeys(combinations(names, 2), count))
    notes = []
    for pair, count in shared.most_common(5):
        small, large = sorted(pair, key=lambda name: len(concepts[name]))
        fewer, most = len(concepts[small]), len(concepts[large])
        if count == fewer:
            notes.append(f"forget: {small!r} lies within {large!r}, {count} of its {most} samples")
        else:
            notes.append(f"forget: {small!r} and {large!r} share {count} samples, of {fewer} and {most}")
    if len(shared) > 5:
        notes.append(f"forget: {len(shared) - 5} more pairs of concepts share samples")
    return notes

"""From whatever a user gives to the loaders of a run: each concept's and retain's, for gradient, search and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule, no_dataset, three_parts
from slug_lightning.datamodules.sources.loaders import UnlearnLoaders
from slug_lightning.datamodules.sources.overlap import meant, refuse_same_data, samples_in
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, Chained, EveryFourth, Split
from slug_lightning.utils.names import check_names, concept_of, labelled, listed, notes_on

Prepare = Callable[[pl.LightningDataModule], Any]


def resolve_loaders(
    forget: Mapping[str, Any] | None,
    retain: Any,
    datamodule: pl.LightningDataModule | None,
    prepare: Prepare = lambda datamodule: datamodule.prepare_data(),
) -> UnlearnLoaders:
    """IndexedBatch whatever a user gave into three parts of every concept and of retain.

    Args:
        forget: a source for each concept, by its name: a DataLoader or any iterable of batches, a list of them (read one
            after the other), a LightningDataModule (its train, val and test loaders serve gradient, search and report; of
            an `UnlearnDataModule` with several concepts, the one of that name), or a dict of loaders by split ("train",
            "val", "test"). None takes all concepts from `datamodule`.
        retain: one such source of what is to be kept, or None.
        datamodule: the trainer's own, asked for what is None: an `UnlearnDataModule`, or any datamodule whose
            loaders are dicts with the keys "forget" and "retain".
        prepare: calls a datamodule's `prepare_data`; of several processes one may do so for all.

    Raises:
        UnlearnError: if there is no forget or retain set, if one is empty, if the concepts' names cannot be told apart, if
            two concepts are the same data, or if one is a part of retain.

    Example:
        >>> cats, dogs, rest = (DataLoader(range(start, start + 8)) for start in (0, 10, 20))
        >>> found = resolve_loaders({"cat": cats, "dog": dogs}, rest, None)
        >>> sorted(found.forget), len(found.forget["dog"]["train"]), len(found.retain["val"])
        (['cat', 'dog'], 4, 2)
        >>> found.notes[0]
        "forget 'cat': one set of 8 samples was split into 4 (gradient), 2 (search), 2 (report), seed 0"
    """
    ready = _once(prepare)
    sources = _sources(forget, datamodule, ready)
    found = {}
    for name, source in sources.items():
        who = labelled("forget", name if len(sources) > 1 else None)
        found[name] = _three_loaders(who, name, source, ready)
    concepts = {name: parts for name, (parts, _) in found.items()}
    notes = notes_on({name: sentence for name, (_, sentence) in found.items()}, len(found))
    notes += notes_on({name: told for name, parts in concepts.items() if (told := _seen_twice(parts))}, len(found))
    kept, sentence = _three_loaders("retain", None, _of_datamodule("retain", datamodule) if retain is None else retain, ready)
    notes += [f"retain: {told}" for told in (sentence, _seen_twice(kept)) if told]
    return UnlearnLoaders(concepts, kept, notes + refuse_same_data(concepts, kept))


def _once(prepare: Prepare) -> Prepare:
    """Prepare and set up a datamodule, unless that is done: it may serve many concepts."""
    done: list[pl.LightningDataModule] = []

    def ready(datamodule: pl.LightningDataModule) -> None:
        if any(datamodule is other for other in done):
            return
        prepare(datamodule)
        for stage in ("fit",) if isinstance(datamodule, UnlearnDataModule) else ("fit", "test"):
            datamodule.setup(stage)
        done.append(datamodule)

    return ready


def _sources(forget: Mapping[str, Any] | None, datamodule: pl.LightningDataModule | None, ready: Prepare) -> dict[str, Any]:
    """The source of each concept by its name."""
    if forget is None:
        source = _of_datamodule("forget", datamodule)
        names = [concept_of(datamodule)]
        if isinstance(source, UnlearnDataModule):
            ready(source)
            names = source.concepts
            if not names:
                raise no_dataset("forget", source)
        check_names("forget", names)
        return dict.fromkeys(names, source)
    check_names("forget", forget)
    if len(forget) > 1 and forget.keys() <= set(SPLITS):
        raise UnlearnError(f"forget: {listed(list(forget))} are splits, not concepts; give {{'a name': …}} with this dict in it")
    return dict(forget)


def _seen_twice(parts: Mapping[Split, Batches]) -> str:
    """What to say if search and report are not independent."""
    shared = samples_in({"val": parts["val"]}) & samples_in({"test": parts["test"]})
    if not shared or min(index for _, index in shared) < 0:  # streams are known by their source alone
        return ""
    return f"search and report data share {len(shared)} samples, so the report is no independent check"


def _of_datamodule(kind: str, datamodule: pl.LightningDataModule | None) -> Any:
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
    """A datamodule's loader of one split, or None where it defines none."""
    name = f"{split}_dataloader"
    loader = getattr(datamodule, name)  # `from_datasets` sets it on the instance
    inherited = getattr(loader, "__func__", None) is getattr(pl.LightningDataModule, name)
    return None if inherited else loader()


def _three_loaders(who: str, concept: str | None, source: Any, ready: Prepare) -> tuple[dict[Split, Batches], str]:
    """The loaders of one concept, or of retain (None), by split, and a sentence on how they came about."""
    if isinstance(source, UnlearnDataModule):
        ready(source)
        return _served(concept, source)
    if isinstance(source, pl.LightningDataModule):
        ready(source)
        source = {split: loader for split in SPLITS if (loader := _loader_of(source, split)) is not None}
    if isinstance(source, Mapping):
        if "train" not in source:
            raise UnlearnError(f"{who}: the dict has no 'train' loader, only {sorted(source)}")
        given = {split: _chained(source[split]) for split in SPLITS if split in source}
        if len(given) == len(SPLITS):
            return given, "three loaders were given"
        parts, note = _three_loaders(who, concept, source["train"], ready)
        for split in set(given) - {"train"}:  # what was split off for it serves the gradient after all
            parts["train"] = Chained([parts["train"], parts[split]])
            parts[split] = given[split]
            note += f"; instead of the {split} part, a loader that was given"
        return parts, note
    if isinstance(source, (list, tuple)):
        if not source:
            raise UnlearnError(f"{who}: the list of loaders is empty")
        each = [_three_loaders(who, concept, loader, ready) for loader in source]
        return {split: Chained(parts[split] for parts, _ in each) for split in SPLITS}, "; ".join(n for _, n in each)
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        return _split_loader(who, source)
    if not isinstance(source, Iterable) or isinstance(source, (torch.Tensor, str)):
        raise UnlearnError(f"{who}: a {type(source).__name__} is no DataLoader, LightningDataModule or list of loaders")
    if iter(source) is source:
        raise UnlearnError(f"{who}: an iterator can be read only once; give something that starts anew, like a DataLoader")
    turns: dict[Split, set[int]] = {"train": {0, 1}, "val": {2}, "test": {3}}
    stream: dict[Split, Batches] = {split: EveryFourth(source, turn) for split, turn in turns.items()}
    return stream, "of every four batches of the stream, two serve the gradient, one the search, one the report"


def _served(concept: str | None, source: UnlearnDataModule) -> tuple[dict[Split, Batches], str]:
    """What a datamodule that is set up serves: retain (None), or its concept of that name; its only one under any name."""
    if concept is None:
        return {split: source.retain_dataloader(split) for split in SPLITS}, source.notes["retain"].removeprefix("retain: ")
    own = concept if len(source.concepts) > 1 else None
    if own is not None and own not in source.concepts:
        raise UnlearnError(
            f"forget: {own!r} is none of the datamodule's concepts, {listed(source.concepts)}; give it under these names, or "
            "fit with it and leave forget out"
        )
    label = labelled("forget", source.key_of(own))
    return {split: source.forget_dataloader(split, own) for split in SPLITS}, source.notes[label].removeprefix(f"{label}: ")


def _chained(loader: Any) -> Batches:
    """One loader as it is; the loaders of a dict or list one after the other."""
    if isinstance(loader, Mapping):
        loader = list(loader.values())
    return Chained(loader) if isinstance(loader, (list, tuple)) else loader


def _split_loader(who: str, loader: DataLoader) -> tuple[dict[Split, Batches], str]:
    """Split a DataLoader's dataset, and read the parts with the loader's own settings."""
    sampler, batch_size = loader.sampler, loader.batch_size
    if type(loader.batch_sampler) is BatchSampler:
        sampler, batch_size = loader.batch_sampler.sampler, loader.batch_sampler.batch_size
    elif loader.batch_sampler is not None:
        batches = list(cast(Iterable[list[int]], loader.batch_sampler))
        sampler, batch_size = [i for batch in batches for i in batch], max(map(len, batches), default=1)
    whole = Subset(loader.dataset, meant(sampler, len(cast(Sized, loader.dataset))))
    parts, note = three_parts(who, whole, None, None)
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
    }
    return {split: DataLoader(part, batch_size=batch_size, **options) for split, part in parts.items()}, note

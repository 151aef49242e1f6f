"""Settle what lies near each concept: what the user gave, what a datamodule renders, or rows of the retain set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Union

import lightning.pytorch as pl

from slug_lightning.datamodules.sources.resolve import UnlearnLoaders, resolve_near
from slug_lightning.objective.nearness import Features, Kinds, features_of, find_nearest, named_nearest, near_rows
from slug_lightning.objective.objective import Objective
from slug_lightning.trainer.limits import limit_near
from slug_lightning.utils.loaders import Batches, Chained, NearBatches, Split
from slug_lightning.utils.names import labelled

NearRetain = Union[str, Sequence[str], Mapping[str, Any], Any, None]


def near_data(
    near_retain: NearRetain,
    loaders: UnlearnLoaders,
    objectives: Mapping[str, Objective],
    trainer: pl.Trainer,
    prepare: Callable[..., Any],
) -> dict[str, NearBatches]:
    """Return the near data of each concept that has some, and let a loader that the user gave join the retain set.

    Args:
        near_retain: "auto"; names of concepts; a loader, list, dict by split or datamodule of its own, or a dict of such by
            concept; or None for none.
        loaders: of the run, within the trainer's limits.
        objectives: of the concepts, with these loaders.
        trainer: whose limits hold for near data, too.
        prepare: calls a datamodule's `prepare_data`.
    """
    if near_retain is None:
        return {}
    found: dict[str, NearBatches] = {}
    joined: dict[int, NearBatches] = {}  # a source that several concepts share is read once
    retain = cache(lambda kinds: features_of(next(iter(objectives.values())), "retain", kinds))
    for name, objective in objectives.items():
        own = near_retain
        if isinstance(near_retain, Mapping) and near_retain.keys() <= objectives.keys():
            own = near_retain.get(name)
        if own is None:
            continue
        near: NearBatches | None
        if _are_names(own):
            given = _from_datamodule(name, loaders) if own == "auto" else None
            near = _join(*given, loaders, trainer) if given else _chosen(name, own, objective, loaders, retain, trainer)
        else:
            if id(own) not in joined:
                joined[id(own)] = _join(*resolve_near(own, prepare), loaders, trainer)
            near = joined[id(own)]
        if near is not None:
            found[name] = near
    return found


def _are_names(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given))


def _from_datamodule(name: str, loaders: UnlearnLoaders) -> tuple[dict[Split, Batches], str] | None:
    """What a concept's datamodule says is near, by split, and how it was split."""
    datamodule = loaders.datamodules.get(name)
    if datamodule is None:
        return None
    key = name if len(datamodule.concepts) > 1 else None
    own = datamodule.near_batches(key)
    label = labelled("near", datamodule.key_of(key))
    return None if own is None else (own, datamodule.notes[label].removeprefix(f"{label}: "))


def _join(splits: Mapping[Split, Batches], note: str, loaders: UnlearnLoaders, trainer: pl.Trainer) -> NearBatches:
    """Let near data that were given join the retain set, each sample with the same weight: their gradient split its own."""
    limited = limit_near(NearBatches(dict(splits), f"given; {note}", [], is_part=False), trainer)
    loaders.retain["train"] = Chained([loaders.retain["train"], limited.splits["train"]])
    return limited._replace(splits={split: limited.splits[split] for split in ("val", "test")})


def _chosen(
    name: str, asked: Any, objective: Objective, loaders: UnlearnLoaders, retain: Callable[[Kinds], Features], trainer: pl.Trainer
) -> NearBatches | None:
    """Take the concepts that were named, or find the nearest; rendered anew by a datamodule that can, else retain rows."""
    datamodule = loaders.datamodules.get(name)
    if asked == "auto":
        nearest = find_nearest(features_of(objective, "forget"), retain)
    else:
        nearest = named_nearest(objective, [asked] if isinstance(asked, str) else list(asked))
    if nearest is None:
        return None
    if datamodule is not None and nearest.kind is not None:
        rendered = datamodule.render_near(nearest.concepts)
        if rendered is not None:
            return limit_near(NearBatches(rendered, f"{nearest.what}; rendered anew", nearest.concepts, False), trainer)
    return near_rows(objective, nearest)


def near_words(near_retain: NearRetain) -> Any:
    """What was asked for, as plain data: names as they are, data by their type."""
    if near_retain is None or _are_names(near_retain):
        return near_retain
    if isinstance(near_retain, Mapping):
        return {str(name): near_words(one) for name, one in near_retain.items()}
    return type(near_retain).__qualname__

"""Settle what lies near each concept: what the user gave, what a datamodule renders, or rows of the retain set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import lightning.pytorch as pl

from slug_lightning.datamodules.sources.resolve import UnlearnLoaders, resolve_near
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.nearness import Nearest, find_nearest, named_nearest, near_rows
from slug_lightning.objective.objective import Objective
from slug_lightning.trainer.limits import limit_near
from slug_lightning.utils.loaders import Batches, Chained, NearBatches, Split
from slug_lightning.utils.names import labelled

NearRetain = Union[str, Sequence[str], Mapping[str, Any], Any, None]
HELD: tuple[Split, ...] = ("val", "test")


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
    found = {}
    for name, objective in objectives.items():
        own = near_retain
        if isinstance(near_retain, Mapping) and near_retain.keys() <= objectives.keys():
            own = near_retain.get(name)
        if own is None:
            continue
        near = _chosen(name, own, objective, loaders) if _are_names(own) else _given(own, loaders, prepare)
        if near is not None:
            found[name] = limit_near(near, trainer)
    return found


def _are_names(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given))


def _given(source: Any, loaders: UnlearnLoaders, prepare: Callable[..., Any]) -> NearBatches:
    """Read near data from a loader of their own."""
    splits, note = resolve_near(source, prepare)
    return _joined(splits, note, loaders)


def _joined(splits: Mapping[Split, Batches], note: str, loaders: UnlearnLoaders) -> NearBatches:
    """Let near data that were given join the retain set, each sample with the same weight: their gradient split its own."""
    loaders.retain["train"] = Chained([loaders.retain["train"], splits["train"]])
    return NearBatches({split: splits[split] for split in HELD}, f"given; {note}", [], is_part=False)


def _chosen(name: str, asked: Any, objective: Objective, loaders: UnlearnLoaders) -> NearBatches | None:
    """Take the concepts that were named, or find the nearest; rendered anew by a datamodule that can, else retain rows."""
    datamodule = loaders.datamodules.get(name)
    if asked == "auto" and datamodule is not None:
        key = name if len(datamodule.concepts) > 1 else None
        if (own := datamodule.near_batches(key)) is not None:
            label = labelled("near", datamodule.key_of(key))
            return _joined(own, datamodule.notes[label].removeprefix(f"{label}: "), loaders)
    nearest: Nearest | None
    if asked == "auto":
        nearest = find_nearest(objective)
    else:
        names = [asked] if isinstance(asked, str) else list(asked)
        nearest = named_nearest(objective, names)
        if nearest is None:
            raise UnlearnError(
                f"near_retain: no sample of the retain set has a label among {names}, by the module's labels(batch); give "
                "names of its labels, or a loader"
            )
    if nearest is None:
        return None
    if datamodule is not None and nearest.kind is not None:
        rendered = datamodule.render_near(nearest.concepts)
        if rendered is not None:
            return NearBatches(rendered, f"{nearest.what}; rendered anew", nearest.concepts, is_part=False)
    return near_rows(objective, nearest)


def near_words(near_retain: NearRetain) -> Any:
    """What was asked for, as plain data: names as they are, data by their type."""
    if near_retain is None or _are_names(near_retain):
        return near_retain
    if isinstance(near_retain, Mapping):
        return {str(name): near_words(one) for name, one in near_retain.items()}
    return type(near_retain).__qualname__

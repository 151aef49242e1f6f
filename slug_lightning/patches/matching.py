"""Which tensors of a model a patch means: by its own names, by those of another library, with or without PEFT adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from slug_lightning.patches.clip_names import translations
from slug_lightning.patches.edit import P
from slug_lightning.patches.state import ModelTensor

T = TypeVar("T")


def matches(patch: P, tensors: Mapping[str, ModelTensor]) -> Iterator[tuple[P, dict[str, ModelTensor]]]:
    """Find every part of a model that a patch fits by its names; only bits tell whether it was made there.

    Gives the patch under the names that it has there, and the tensors by these names.
    """
    ways = [(patch, tensors)]
    bare, bare_tensors = _without_adapters(patch), {_bare(name): one for name, one in tensors.items()} | dict(tensors)
    if bare is not patch or len(bare_tensors) > len(tensors):
        ways.append((bare, bare_tensors))
    for named, held in ways:
        for found in by_name(list(named.base), held):
            yield named, found
        bases = {name: known.base if (known := one.history()) else one.tensor for name, one in held.items()}
        for other in translations(named, bases):
            yield other, {name: held[name] for name in other.base}


def by_name(names: Sequence[str], tensors: Mapping[str, T]) -> Iterator[dict[str, T]]:
    """Find tensors in a model, in one that holds the model, or in a part of it: names differ by one prefix.

    Where several parts fit by name, the one nearest the root comes first.

    Example:
        >>> list(by_name(["proj"], {"proj": 1, "visual.proj": 2})), list(by_name(["visual.proj"], {"proj": 1}))
        ([{'proj': 1}, {'proj': 2}], [{'visual.proj': 1}])
    """
    ends = [name.removesuffix(names[0]) for name in tensors if f".{name}".endswith(f".{names[0]}")]
    fitting = [prefix for prefix in sorted(ends, key=len) if all(prefix + name in tensors for name in names)]
    for prefix in fitting:
        yield {name: tensors[prefix + name] for name in names}
    if fitting:
        return
    parts = names[0].split(".")
    for cut in range(1, len(parts)):
        prefix = ".".join(parts[:cut]) + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in tensors for name in names):
            yield {name: tensors[name.removeprefix(prefix)] for name in names}
            return


def _without_adapters(patch: P) -> P:
    """Rename a patch's tensors as they are without adapters; gives the patch itself if that changes nothing."""
    names = {name: _bare(name) for name in patch.base}
    if list(names) == list(names.values()) or len(set(names.values())) < len(names):  # or one of two would be lost
        return patch
    edits = [replace(e, directions={names[name]: t for name, t in e.directions.items()}, origin=e.digest) for e in patch.edits]
    return replace(patch, base={names[name]: tensor for name, tensor in patch.base.items()}, edits=edits)


def _bare(name: str) -> str:
    """PEFT moves what it wraps with an adapter one level down."""
    return name.replace(".base_layer.", ".")

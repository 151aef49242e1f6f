"""Where in a model a patch belongs: by its own names, by those of another library, with adapters around them or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from slug_lightning.patches.clip_names import translations
from slug_lightning.patches.edit import P
from slug_lightning.patches.state import Held

T = TypeVar("T")
WRAPPED, BARE = ".base_layer.", "."
"""What stands before the last part of a name where PEFT has wrapped the module with an adapter, and where it has not."""


def places(patch: P, held: Mapping[str, Held]) -> Iterator[tuple[P, dict[str, Held]]]:
    """Give every part of a model that a patch fits by its names; only bits tell whether it was made there.

    Args:
        patch: made on the model, on one that holds it, on a part of it, or on the same in another library.
        held: the model's tensors, by name.

    Yields:
        The patch under the names that it has there, and the tensors by these names.
    """
    yield from _fitting(patch, held)
    bare, bare_held = _without_adapters(patch), {_bare(name): one for name, one in held.items()} | dict(held)
    if bare is not patch or len(bare_held) > len(held):
        yield from _fitting(bare, bare_held)


def _fitting(patch: P, held: Mapping[str, Held]) -> Iterator[tuple[P, dict[str, Held]]]:
    for targets in by_name(list(patch.base), held):
        yield patch, targets
    bases = {name: known.base if (known := one.history()) else one.tensor for name, one in held.items()}
    for other in translations(patch, bases):
        yield other, {name: held[name] for name in other.base}


def by_name(names: Sequence[str], held: Mapping[str, T]) -> Iterator[dict[str, T]]:
    """Find tensors in a model, in one that holds the model, or in a part of it: names differ by one prefix.

    Where several parts fit by name, the one nearest the root comes first.

    Example:
        >>> list(by_name(["proj"], {"proj": 1, "visual.proj": 2})), list(by_name(["visual.proj"], {"proj": 1}))
        ([{'proj': 1}, {'proj': 2}], [{'visual.proj': 1}])
    """
    ends = [known.removesuffix(names[0]) for known in held if known == names[0] or known.endswith("." + names[0])]
    fitting = [prefix for prefix in sorted(ends, key=len) if all(prefix + name in held for name in names)]
    for prefix in fitting:
        yield {name: held[prefix + name] for name in names}
    if fitting:
        return
    parts = names[0].split(".")
    for cut in range(1, len(parts)):
        prefix = ".".join(parts[:cut]) + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in held for name in names):
            yield {name: held[name.removeprefix(prefix)] for name in names}
            return


def _without_adapters(patch: P) -> P:
    """A patch under the names that its tensors have without adapters around them; itself if these are its own."""
    names = {name: _bare(name) for name in patch.base}
    if list(names) == list(names.values()) or len(set(names.values())) < len(names):  # or one of two would be lost
        return patch
    edits = [replace(e, directions={names[name]: t for name, t in e.directions.items()}, origin=e.digest) for e in patch.edits]
    return replace(patch, base={names[name]: tensor for name, tensor in patch.base.items()}, edits=edits)


def _bare(name: str) -> str:
    return name.replace(WRAPPED, BARE)

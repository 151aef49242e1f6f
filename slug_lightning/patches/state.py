"""What is applied to the tensors of this process: of each its base and the edits on it, from which it is always rebuilt.

Edits are never added to, or subtracted from, what a tensor holds. They are known by where it is held, and not by its content,
since in half precision an edit may change no bit; but they count only while the tensor holds, bit for bit, what they make of
the base. Where something else has changed it since (training, loading), nothing is known of it any more.

Where it is held is the module that it belongs to, and the name there; not the parameter itself, which torch would not move to
another device any more if it is sharded and somebody has a weak reference to it. Tensors of a state dict hold themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slug_lightning.patches.edit import Edit, PatchError, edited
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import placed, whole
from slug_lightning.tensors.layers import plain_name
from slug_lightning.utils.model_parts import Pipeline, parts_of

Model = nn.Module | MutableMapping[str, Tensor] | Pipeline


class AppliedAlready(PatchError):
    """The patch is applied here, so that no other place is looked for."""


@dataclass(frozen=True, eq=False)
class Active:
    """An edit that acts on a tensor.

    Attributes:
        edit: the edit.
        name: what the edit calls the tensor.
        given: the strength with which its patch was applied.
    """

    edit: Edit
    name: str
    given: float

    @property
    def strength(self) -> float:
        """How strongly it acts: the patch's strength times the edit's own."""
        return self.given * self.edit.strength


@dataclass(frozen=True, eq=False)
class History:
    """How a tensor came to be what it is.

    Attributes:
        base: the tensor without these edits.
        active: the edits on that base, by digest.
        below: where the base was itself made by edits, how.

    Example:
        >>> edits = [Edit(name, 0.5, {"w": torch.ones(2)}) for name in ("cats", "dogs")]
        >>> History(torch.zeros(2), {name: Active(edit, "w", 2.0) for name, edit in zip("ab", edits)}).content()
        tensor([2., 2.])
    """

    base: Tensor
    active: dict[str, Active] = field(default_factory=dict)
    below: History | None = None

    def content(self) -> Tensor:
        """What the tensor holds: the base and the edits, in the order of their digests."""
        ordered = [active for _, active in sorted(self.active.items(), key=lambda item: item[0])]
        return edited(self.base, [(a.edit.directions[a.name], a.strength * a.edit.step) for a in ordered])

    def levels(self) -> Iterator[History]:
        """From this one down."""
        level: History | None = self
        while level is not None:
            yield level
            level = level.below


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Module, or tensor of a state dict -> name -> History. Weak, so that it keeps no model alive, and goes with it."""


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of a model.

    Attributes:
        tensor: the tensor.
        places: by what it is held, and under which name there: several where weights are tied.
    """

    tensor: Tensor
    places: list[tuple[nn.Module | Tensor, str]]

    def history(self) -> History | None:
        """What is known to be applied to it; what no longer holds is dropped. Of a sharded one all processes must ask."""
        for owner, name in self.places:
            known = _KNOWN.get(owner, {}).get(name)
            if known is not None and bitwise_equal(self.tensor, known.content()):
                return known
        self.remember(None)
        return None

    def remember(self, history: History | None) -> None:
        """Note what is applied to it from now on."""
        for owner, name in self.places:
            if history is not None:
                _KNOWN.setdefault(owner, {})[name] = history
            else:
                _KNOWN.get(owner, {}).pop(name, None)


def held_by(model: Model) -> dict[str, Held]:
    """Every tensor under every name it has; not by `state_dict`, which a model may override to give copies.

    Raises:
        UnlearnError: if it is neither a module, nor a state dict, nor a pipeline.

    Example:
        >>> list(held_by(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, affine=False))))
        ['0.weight', '0.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    of: dict[int, Held] = {}
    if not isinstance(model, (nn.Module, Mapping)):
        model = parts_of(model)
    if isinstance(model, Mapping):
        tensors = {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
        return {plain_name(name): of.setdefault(id(tensor), Held(tensor, [(tensor, "")])) for name, tensor in tensors.items()}
    held: dict[str, Held] = {}
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, tensor in kind(module, recurse=False, remove_duplicate=False):
                one = held[plain_name(f"{prefix}.{name}" if prefix else name)] = of.setdefault(id(tensor), Held(tensor, []))
                one.places.append((module, name))
    return held


@dataclass(frozen=True, eq=False)
class Spot:
    """A tensor of the model that a patch edits.

    Attributes:
        held: the tensor.
        name: what the patch calls it.
        base: what it must be without the patch.
        active: what the patch adds to it, by digest.
    """

    held: Held
    name: str
    base: Tensor
    active: dict[str, Active]

    @cached_property
    def now(self) -> Tensor:
        """What the tensor holds, whole."""
        return whole(self.held.tensor).cpu()

    @cached_property
    def known(self) -> History | None:
        """What is known to be applied to it."""
        return self.held.history()

    def made(self, strength: float | None = None) -> History:
        """The base with this patch alone, at its own strength or another."""
        return History(self.base, self.active if strength is None else _at(self.active, strength))


@dataclass(frozen=True, eq=False)
class Change:
    """What an operation makes of a tensor: what is known of it afterwards, and what it holds (None: what it holds already)."""

    held: Held
    known: History | None
    content: Tensor | None


def spots(base: Mapping[str, Tensor], edits: Iterable[Edit], targets: Mapping[str, Held], strength: float) -> list[Spot]:
    """A patch's tensors as those of a model; a tensor that stands under several names (tied weights) is one.

    Raises:
        PatchError: if the patch says different things of one tensor.
    """
    names: dict[int, list[str]] = {}
    for name, held in targets.items():
        names.setdefault(id(held), []).append(name)
    return [_spot(base, edits, targets[tied[0]], tied, strength) for tied in names.values()]


def _spot(base: Mapping[str, Tensor], edits: Iterable[Edit], held: Held, names: list[str], strength: float) -> Spot:
    active: dict[str, Active] = {}
    for values in (base, *(edit.directions for edit in edits)):
        said = [values[name] for name in names if name in values]
        if any(not bitwise_equal(value, said[0]) for value in said[1:]):
            raise PatchError(f"{', '.join(names)}: one tensor in this model; the patch was made on one where they are several")
    for edit in edits:
        for name in names:
            if name in edit.directions:
                active.setdefault(edit.digest, Active(edit, name, strength))
    return Spot(held, names[0], base[names[0]], active)


def added(spots: Sequence[Spot]) -> list[Change]:
    """Plan to apply a patch.

    Raises:
        PatchError: if one of its edits is active already, or a tensor is not its base.
    """
    return [_added(spot) for spot in spots]


def _added(spot: Spot) -> Change:
    known = spot.known
    if known is None and bitwise_equal(spot.now, spot.base):
        new = spot.made()
    elif known is None:
        for strength in (None, 1.0):
            if bitwise_equal(spot.now, spot.made(strength).content()):
                raise _already(spot, spot.made(strength))
        raise _not_the_base(spot)
    else:
        for level in known.levels():
            if spot.active.keys() & level.active.keys():
                raise _already(spot, level)
        if bitwise_equal(known.base, spot.base):  # asked first: an edit that changes no bit must not depend on the order either
            new = replace(known, active=known.active | spot.active)
        elif bitwise_equal(spot.now, spot.base):
            new = History(spot.base, spot.active, below=known)
        elif any(bitwise_equal(level.base, spot.base) for level in known.levels()):
            raise PatchError(f"{spot.name}: {_concepts(known)} was applied on top of the patch's base; revert that first")
        else:
            raise _not_the_base(spot)
    return Change(spot.held, new, new.content())


def removed(spots: Sequence[Spot]) -> list[Change]:
    """Plan to revert a patch: the rest is what it would be if the patch had never been applied.

    Raises:
        PatchError: if it is not active, or not uppermost.
    """
    changes = []
    for spot, held in zip(spots, _held(spots), strict=True):
        rest = {digest: active for digest, active in held.active.items() if digest not in spot.active}
        left = replace(held, active=rest)
        changes.append(Change(spot.held, left if rest else left.below, left.content()))
    return changes


def adjusted(spots: Sequence[Spot], strength: float) -> list[Change]:
    """Plan to give a patch another strength.

    Raises:
        PatchError: if it is not active, or not uppermost.
    """
    changes = []
    for spot, held in zip(spots, _held(spots), strict=True):
        new = replace(held, active=held.active | _at(spot.active, strength))
        changes.append(Change(spot.held, new, new.content()))
    return changes


def recognised(spots: Sequence[Spot]) -> list[Change]:
    """Plan to remember a patch, and nothing else, as what is applied.

    Raises:
        PatchError: if the tensors hold something else, or something else is known of them.
    """
    for spot in spots:
        if not bitwise_equal(spot.now, spot.made().content()):
            raise PatchError(f"{spot.name}: the model is not what the patch makes of its base")
        if spot.known is not None and _acting(spot.known) != _acting(spot.made()):
            raise PatchError(f"{spot.name}: {_concepts(spot.known)} is known to be applied, and not only what the patch says")
    return [Change(spot.held, spot.known or spot.made(), None) for spot in spots]


def carry_out(changes: Iterable[Change]) -> None:
    """Write what was planned. All has been checked before."""
    with torch.no_grad():
        for change in changes:
            if change.content is not None:
                tensor = change.held.tensor
                tensor.copy_(placed(change.content, tensor))  # not by `.data`: whoever watches the version must notice
            change.held.remember(change.known)


Plan = Callable[[Sequence[Spot]], list[Change]]


def _held(spots: Sequence[Spot]) -> list[History]:
    """Of each tensor, how it is made with the patch active on it: as is known, or else as its content shows."""
    if all(spot.known is None and bitwise_equal(spot.now, spot.base) for spot in spots):
        raise PatchError(f"{spots[0].name}: the patch is not applied")
    told = any(spot.known is not None for spot in spots)
    return [_with_patch(spot, told) for spot in spots]


def _with_patch(spot: Spot, told: bool) -> History:
    """How a tensor is made with the patch active on it; `told`: whether this process knows what is applied to the others."""
    known = spot.known
    if known is None:
        shown = bitwise_equal(spot.now, spot.made().content())
        if bitwise_equal(spot.now, spot.base) and (told or not shown):  # an edit that changes no bit can only be known of
            raise PatchError(f"{spot.name}: the patch is not applied")
        if shown:
            return spot.made()
        raise PatchError(f"{spot.name}: not what the patch makes at this strength; something else changed it since")
    if spot.active.keys() <= known.active.keys():
        return known
    above = {digest for level in known.levels() if level is not known for digest in level.active}
    above |= {parent["digest"] for active in known.active.values() for parent in active.edit.parents}
    if spot.active.keys() & above:
        raise PatchError(f"{spot.name}: {_concepts(known)} was made on top of this patch; revert that first")
    raise PatchError(f"{spot.name}: the patch is not applied, or not all of it; applied is {_concepts(known)}")


def _at(active: Mapping[str, Active], strength: float) -> dict[str, Active]:
    return {digest: replace(one, given=strength) for digest, one in active.items()}


def _acting(history: History) -> dict[str, float]:
    return {digest: active.strength for digest, active in history.active.items()}


def _already(spot: Spot, level: History) -> AppliedAlready:
    one = next(level.active[digest] for digest in spot.active if digest in level.active)
    return AppliedAlready(
        f"{spot.name}: {one.edit.concept!r} is applied already (at strength {one.strength:g}); revert it first, or use adjust"
    )


def _not_the_base(spot: Spot) -> PatchError:
    parents = {p["digest"]: p for active in spot.active.values() for p in active.edit.parents}
    if parents:
        made_on = ", ".join(f"{p['concept']!r} (strength {p['strength']:g})" for p in parents.values())
        return PatchError(f"{spot.name}: the model is not the patch's base; it was made on top of {made_on}: apply that first")
    return PatchError(
        f"{spot.name}: the model is not the patch's base; where it holds other patches that another process applied, let "
        "`recognise` read them first"
    )


def _concepts(history: History) -> str:
    return ", ".join(repr(active.edit.concept) for active in history.active.values())

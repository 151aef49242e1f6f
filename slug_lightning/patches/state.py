"""What is applied to the tensors of this process: for each its base and the edits on it, from which it is always rebuilt.

Edits are never added to, or subtracted from, the current value. They are remembered by the tensor's owner, not recognised by
value, since in half precision an edit may change no bit; but they count only while the tensor is, bit for bit, what they make
of the base. Once something else has changed it (training, loading), nothing is known about it any more.

The owner is the module and the name there, not the parameter itself: torch could not move a sharded parameter to another
device while somebody holds a weak reference to it. Tensors of a state dict are their own owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slug_lightning.patches.edit import Edit, PatchContent, PatchError, edited
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import shard_like, whole
from slug_lightning.tensors.layers import plain_name
from slug_lightning.utils.model_parts import Pipeline, parts_of

Model = nn.Module | MutableMapping[str, Tensor] | Pipeline


class AppliedAlready(PatchError):
    """Raised where the patch is applied already, so that no other part of the model is tried."""


@dataclass(frozen=True, eq=False)
class Active:
    """An edit that acts on a tensor, which the edit calls `name`; its strength is the edit's own times that of the patch."""

    edit: Edit
    name: str
    strength: float


@dataclass(frozen=True, eq=False)
class History:
    """How a tensor came to be: its base, the edits on that by digest, and how the base itself was made, if by edits."""

    base: Tensor
    active: dict[str, Active] = field(default_factory=dict)
    below: History | None = None

    def content(self) -> Tensor:
        """The tensor's value: the base and the edits, in the order of their digests."""
        ordered = [active for _, active in sorted(self.active.items(), key=lambda item: item[0])]
        return edited(self.base, [(a.edit.directions[a.name], a.strength * a.edit.step) for a in ordered])

    def levels(self) -> Iterator[History]:
        """Iterate from this one down."""
        yield self
        if self.below is not None:
            yield from self.below.levels()

    def __str__(self) -> str:
        return ", ".join(repr(active.edit.concept) for active in self.active.values())


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Module, or tensor of a state dict -> name -> History. Weak, so that it keeps no model alive, and goes with it."""


@dataclass(frozen=True, eq=False)
class ModelTensor:
    """A tensor of a model, and its owners with the name it has there: several where weights are tied."""

    tensor: Tensor
    owners: list[tuple[nn.Module | Tensor, str]]

    def history(self) -> History | None:
        """Return what is known to be applied, and drop it if it no longer holds. Collective where the tensor is sharded."""
        for owner, name in self.owners:
            known = _KNOWN.get(owner, {}).get(name)
            if known is not None and bitwise_equal(self.tensor, known.content()):
                return known
        self.remember(None)
        return None

    def remember(self, history: History | None) -> None:
        """Note what is applied from now on."""
        for owner, name in self.owners:
            if history is not None:
                _KNOWN.setdefault(owner, {})[name] = history
            else:
                _KNOWN.get(owner, {}).pop(name, None)


def model_tensors(model: Model) -> dict[str, ModelTensor]:
    """List every tensor under every name it has; not by `state_dict`, which a model may override to give copies."""
    known: dict[int, ModelTensor] = {}
    if not isinstance(model, (nn.Module, Mapping)):
        model = parts_of(model)
    if isinstance(model, Mapping):
        tensors = {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
        return {plain_name(n): known.setdefault(id(t), ModelTensor(t, [(t, "")])) for n, t in tensors.items()}
    found: dict[str, ModelTensor] = {}
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, tensor in kind(module, recurse=False, remove_duplicate=False):
                entry = known.setdefault(id(tensor), ModelTensor(tensor, []))
                entry.owners.append((module, name))
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = entry
    return found


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the model that a patch edits and calls `name`: what it is without the patch, and the edits by digest."""

    entry: ModelTensor
    name: str
    base: Tensor
    active: dict[str, Active]

    @cached_property
    def now(self) -> Tensor:
        """The current value, whole."""
        return whole(self.entry.tensor).cpu()

    @property
    def made(self) -> History:
        """The base with this patch alone."""
        return History(self.base, self.active)

    @cached_property
    def is_base(self) -> bool:
        """Whether the current value is the base."""
        return bitwise_equal(self.now, self.base)

    @cached_property
    def known(self) -> History | None:
        """What is known to be applied."""
        return self.entry.history()

    def at(self, strength: float) -> dict[str, Active]:
        """The patch's edits, with another strength of the patch."""
        return {digest: replace(a, strength=strength * a.edit.strength) for digest, a in self.active.items()}

    def become(self, history: History) -> None:
        """Write what a plan gave, and remember it; a value that has these bits already is not written."""
        content = history.content()
        if not bitwise_equal(self.now, content):
            with torch.no_grad():
                tensor = self.entry.tensor
                tensor.copy_(shard_like(content, tensor))  # not by `.data`: whoever watches the version must notice
        self.entry.remember(history if history.active else history.below)


Operation = Callable[[Sequence[Target]], list[History]]
"""Gives what the tensors become, and writes nothing: all of a patch is checked before any of it is written."""


def targets_of(patch: PatchContent, found: Mapping[str, ModelTensor], strength: float) -> list[Target]:
    """Pair a patch's tensors with the model's; a tensor that has several of the patch's names (tied weights) is one target."""
    names: dict[ModelTensor, list[str]] = {}
    for name, entry in found.items():
        names.setdefault(entry, []).append(name)
    targets = []
    for entry, tied in names.items():
        for values in (patch.base, *(edit.directions for edit in patch.edits)):
            said = [values[name] for name in tied if name in values]
            if any(not bitwise_equal(value, said[0]) for value in said[1:]):
                raise PatchError(f"{', '.join(tied)}: one tensor in this model, but several with different values in the patch")
        active: dict[str, Active] = {}
        for edit in patch.edits:
            for name in tied:
                if name in edit.directions:
                    active.setdefault(edit.digest, Active(edit, name, strength * edit.strength))
        targets.append(Target(entry, tied[0], patch.base[tied[0]], active))
    return targets


def added(targets: Iterable[Target]) -> list[History]:
    """Plan to apply a patch; refuse if one of its edits is active already, or a tensor is not its base."""
    return [_added(target) for target in targets]


def _added(target: Target) -> History:
    known = target.known
    if known is None and target.is_base:
        return target.made
    if known is None:
        for made in (target.made, History(target.base, target.at(1.0))):
            if bitwise_equal(target.now, made.content()):
                raise _already(target, made)
        raise _not_the_base(target)
    for level in known.levels():
        if target.active.keys() & level.active.keys():
            raise _already(target, level)
    # Looked at before the value: an edit that changes no bit must not depend on the order either.
    if bitwise_equal(known.base, target.base):
        return replace(known, active=known.active | target.active)
    if target.is_base:
        return replace(target.made, below=known)
    if any(bitwise_equal(level.base, target.base) for level in known.levels()):
        raise PatchError(f"{target.name}: {known} was applied on top of the patch's base; revert that first")
    raise _not_the_base(target)


def removed(targets: Sequence[Target]) -> list[History]:
    """Plan to revert a patch: the tensors become what they would be if it had never been applied."""
    histories = zip(targets, _applied(targets), strict=True)
    return [replace(h, active={d: a for d, a in h.active.items() if d not in target.active}) for target, h in histories]


def adjusted(targets: Sequence[Target], strength: float) -> list[History]:
    """Plan to give a patch another strength."""
    return [replace(h, active=h.active | target.at(strength)) for target, h in zip(targets, _applied(targets), strict=True)]


def recognised(targets: Sequence[Target]) -> list[History]:
    """Plan to remember that a patch is applied, which it must be; then there is nothing to write."""
    histories = []
    for target in targets:
        if not bitwise_equal(target.now, target.made.content()):
            raise PatchError(f"{target.name}: the model does not hold what the patch makes of its base")
        if target.known is not None and _strengths(target.known) != _strengths(target.made):
            raise PatchError(f"{target.name}: {target.known} is known to be applied, which is not what the patch says")
        histories.append(target.known or target.made)
    return histories


def _strengths(history: History) -> dict[str, float]:
    return {digest: active.strength for digest, active in history.active.items()}


def _applied(targets: Sequence[Target]) -> list[History]:
    """Return for each tensor the history with the patch on it: the one that is known, or else the one that the value shows."""
    if all(target.known is None and target.is_base for target in targets):
        raise PatchError(f"{targets[0].name}: the patch is not applied")
    any_known = any(target.known is not None for target in targets)
    return [_known_to_have(target, target.known) if target.known else _seen_to_have(target, any_known) for target in targets]


def _seen_to_have(target: Target, others_known: bool) -> History:
    shown = bitwise_equal(target.now, target.made.content())
    if target.is_base and (others_known or not shown):  # an edit that changes no bit can only be known of
        raise PatchError(f"{target.name}: the patch is not applied")
    if not shown:
        raise PatchError(f"{target.name}: not what the patch makes at this strength; something else changed it since")
    return target.made


def _known_to_have(target: Target, known: History) -> History:
    if target.active.keys() <= known.active.keys():
        return known
    below = {digest for level in known.levels() if level is not known for digest in level.active}
    below |= {parent["digest"] for active in known.active.values() for parent in active.edit.parents}
    if target.active.keys() & below:
        raise PatchError(f"{target.name}: {known} was made on top of this patch; revert that first")
    raise PatchError(f"{target.name}: the patch is not applied, or only in part; applied is {known}")


def _already(target: Target, level: History) -> AppliedAlready:
    one = next(level.active[digest] for digest in target.active if digest in level.active)
    return AppliedAlready(
        f"{target.name}: {one.edit.concept!r} is applied already (at strength {one.strength:g}); revert it first, or use adjust"
    )


def _not_the_base(target: Target) -> PatchError:
    parents = {p["digest"]: p for active in target.active.values() for p in active.edit.parents}
    hint = "if another process applied patches to it, call `recognise` with what was active there first"
    if parents:
        made_on = ", ".join(f"{p['concept']!r} (strength {p['strength']:g})" for p in parents.values())
        hint = f"it was made on top of {made_on}: apply that first"
    return PatchError(f"{target.name}: the model is not the patch's base; {hint}")

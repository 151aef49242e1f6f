"""A patch: the edits of a model as a small file that can be checked, applied, weakened, undone and combined."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slug_lightning.patches import state
from slug_lightning.patches.edit import Edit, PatchContent, PatchError
from slug_lightning.patches.matching import matches
from slug_lightning.patches.state import Active, AppliedAlready, Model, ModelTensor
from slug_lightning.tensors.bits import bitwise_equal, digest_of
from slug_lightning.utils.files import atomic_write

PATCH_FORMAT = "slug-lightning patch 2"


@dataclass(frozen=True, eq=False)
class UnlearnPatch(PatchContent):
    """The edits of one or more concepts on one base.

    Several patches may be applied to a model, each at its own strength. In whatever order they are applied, adjusted and
    reverted, the weights are bit for bit those that the base and the remaining patches make: edited tensors are rebuilt from
    the base, never added to. This process remembers what is applied to a model (`slug_lightning.patches.state`). For a copy of
    the model, another state dict of it, or weights from a file, only the values are known; they tell one patch at full
    strength from its base, and no more. For these, save what `active` returns, and call its `recognise`.

    Args:
        base: every edited tensor as it was before, by name.
        edits: at least one; sorted by their digests.

    Raises:
        PatchError: if an edit occurs twice, or base and edits name different tensors.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> cats = UnlearnPatch({"weight": before}, [Edit("cats", 0.5, {"weight": torch.ones(1, 2)})])
        >>> dogs = UnlearnPatch({"weight": before}, [Edit("dogs", 0.25, {"weight": torch.ones(1, 2)})])
        >>> cats.apply(model)
        >>> dogs.apply(model)
        >>> cats.revert(model)
        >>> torch.equal(model.weight, before + 0.25)
        True
        >>> dogs.adjust(model, 2.0)
        >>> UnlearnPatch.active(model).describe()["edits"][0]["strength"]
        2.0
        >>> dogs.revert(model)
        >>> torch.equal(model.weight, before)
        True
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", sorted(self.edits, key=lambda edit: (edit.digest, sorted(edit.directions))))
        shapes = {name: tensor.shape for name, tensor in self.base.items()}
        seen: set[tuple[str, str]] = set()
        for edit in self.edits:
            for name, direction in edit.directions.items():
                if (edit.digest, name) in seen:
                    raise PatchError(f"{name}: the edit for {edit.concept!r} occurs twice")
                if shapes.get(name) != direction.shape:
                    raise PatchError(f"{name}: the direction for {edit.concept!r} has another shape than the base")
                seen.add((edit.digest, name))
        if not shapes or shapes.keys() != {name for _, name in seen}:
            raise PatchError("base: must hold exactly the tensors that the edits name, at least one")

    def __repr__(self) -> str:
        concepts = ", ".join(edit.concept for edit in self.edits)
        return f"UnlearnPatch({concepts!r}, {', '.join(self.base)}, digest {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """SHA-256 over base, edits, strengths, parents and details; stored in the file and checked on loading."""
        return digest_of(*self._content())

    def apply(self, model: Model, strength: float = 1.0) -> None:
        """Edit the model in place, in addition to the patches that are applied already.

        Args:
            model: the model the patch was made on, a model that holds it (`model.visual.proj` for `visual.proj`), the
                part of it that holds the edited tensors, the same model in another library (`slug_lightning.patches.clip_names`),
                a diffusers pipeline of which it is a component, each of these with or without PEFT adapters, or a state dict
                of one. Other patches on the same base may be applied to it. A patch that was made on a patched model goes
                on top of those patches.
            strength: factor of the step, finite; 1 is what was measured, 0 the base.

        Raises:
            PatchError: if a tensor is missing or differs from the patch's base, an edit is active already, or the strength is
                not finite. The model is left as it was.
        """
        self._act(model, strength, state.added)

    def revert(self, model: Model, strength: float | None = None) -> None:
        """Take the patch out, whatever else is applied; if nothing else is, the tensors are as they were, bit for bit.

        Args:
            model: as in `apply`.
            strength: the one at which the patch was applied. Needed only if that was not 1 and this process does not know it.

        Raises:
            PatchError: if the patch is not applied, something else has changed a tensor since, or another patch was made on
                top of it. The model is left as it was.
        """
        self._act(model, 1.0 if strength is None else strength, state.removed)

    def adjust(self, model: Model, strength: float) -> None:
        """Change the strength of the patch where it is applied.

        Args:
            model: as in `apply`.
            strength: the new one, finite.

        Raises:
            PatchError: as `revert` does, or if the strength is not finite. The model is left as it was.
        """
        _refuse_infinite(strength)
        self._act(model, 1.0, partial(state.adjusted, strength=strength))

    def recognise(self, model: Model) -> None:
        """Remember that the model holds this patch, at its own strengths: for what `active` gave in another process.

        The weights cannot say so themselves. An extra buffer or an extra state would change the keys of the state dict, which
        other libraries then refuse to load; safetensors metadata does not survive `from_pretrained` and `save_pretrained`. So
        it is a file next to the weights, which counts as long as they are these, bit for bit.

        Args:
            model: as in `apply`. Nothing is written to it.

        Raises:
            PatchError: if the model does not hold, bit for bit, what the patch makes of its base, or other patches are known to
                be applied.
        """
        self._act(model, 1.0, state.recognised)

    @staticmethod
    def active(model: Model) -> UnlearnPatch | None:
        """Return what is applied to a model, as one patch whose edits carry their strengths; None if nothing is known to be.

        Where patches lie on top of others, it is the uppermost on each tensor, and its base is what those below have made;
        `parents` of the edits say what these were, if their makers did. If only some tensors of an edit are left, since the
        others were trained or lie below another patch, the edit covers only these. Tensors have the names that they have in
        `model`, which is as in `apply`. Collective where it is sharded.
        """
        base: dict[str, Tensor] = {}
        found: dict[tuple[str, float], dict[str, Active]] = {}
        seen: set[ModelTensor] = set()
        for name, entry in state.model_tensors(model).items():
            known = entry.history() if entry not in seen else None  # tied weights: once, by the first name
            seen.add(entry)
            if known is not None:
                base[name] = known.base
                for digest, active in known.active.items():
                    found.setdefault((digest, active.strength), {})[name] = active
        return UnlearnPatch(base, [_named_as_here(active) for active in found.values()]) if base else None

    def as_parents(self) -> list[dict[str, Any]]:
        """Return the `parents` of an edit that is made on top of this patch: the edits of this patch, and their parents."""
        own = [{"concept": edit.concept, "digest": edit.digest, "strength": edit.strength} for edit in self.edits]
        return list({p["digest"]: p for p in [*(p for edit in self.edits for p in edit.parents), *own]}.values())

    @staticmethod
    def combine(patches: Sequence[UnlearnPatch]) -> UnlearnPatch:
        """Make one patch of several that were made on the same base, whatever their order.

        Edits of one tensor add up, each at its strength.

        Raises:
            PatchError: if `patches` is empty, two bases differ, or an edit occurs twice.
        """
        if not patches:
            raise PatchError("combine: no patch was given")
        base: dict[str, Tensor] = {}
        for patch in patches:
            for name, tensor in patch.base.items():
                if name in base and not bitwise_equal(base[name], tensor):
                    raise PatchError(f"{name}: the patches were made on different bases; make them again on one model")
                base[name] = tensor
        return UnlearnPatch(dict(sorted(base.items())), [edit for patch in patches for edit in patch.edits])

    def describe(self) -> dict[str, Any]:
        """Return what the patch does as plain data: its digest, its tensors, and its edits without the directions."""
        return {
            "digest": self.digest,
            "tensors": {
                name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "sha256": digest_of({name: t}, "")}
                for name, t in self.base.items()
            },
            "edits": [{**_plain(edit), "digest": edit.digest} for edit in self.edits],
        }

    def save(self, path: str | Path) -> None:
        """Write the patch as safetensors, atomically."""
        tensors, text = self._content()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": PATCH_FORMAT, "patch": text, "sha256": digest_of(tensors, text)}
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        with atomic_write(path) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> UnlearnPatch:
        """Read a patch; nothing in it is executed.

        Raises:
            PatchError: if the file is not a patch, is truncated, or was altered since it was written.
            FileNotFoundError: if there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no patch at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError, OSError) as error:
            raise PatchError(f"{path}: not a complete safetensors file ({error})") from error
        if metadata.get("format") != PATCH_FORMAT:
            raise PatchError(f"{path}: not a patch, or one of another version ({metadata.get('format')!r}, not {PATCH_FORMAT!r})")
        text = metadata.get("patch", "")
        if metadata.get("sha256") != digest_of(tensors, text):
            raise PatchError(f"{path}: the content does not match its digest; the file was altered or damaged")
        try:
            edits = [_edit(e, {n: tensors[f"{i}/{n}"] for n in e["tensors"]}) for i, e in enumerate(json.loads(text))]
            base = {n: tensors[f"base/{n}"] for n in sorted({n for e in edits for n in e.directions})}
            return cls(base, edits)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PatchError(f"{path}: the content is not valid for a patch ({error!r})") from error

    def _act(self, model: Model, strength: float, operation: state.Operation) -> None:
        """Operate on the part of the model that takes the patch: the one nearest the root, if several fit by name."""
        _refuse_infinite(strength)
        refused: PatchError | None = None
        tensors = state.model_tensors(model)
        for patch, found in matches(self, tensors):
            try:
                targets = state.targets_of(patch, found, strength)
                histories = operation(targets)
            except AppliedAlready:
                raise  # not also to a copy of the same part
            except PatchError as error:
                refused = refused or error
            else:
                for target, history in zip(targets, histories, strict=True):
                    target.become(history)
                return
        missing = next((name for name in self.base if name not in tensors), "the patch")
        raise refused or PatchError(f"{missing}: the model has no such tensor; the patch was made on another model")

    def _content(self) -> tuple[dict[str, Tensor], str]:
        """What the file holds: tensors, and everything else as JSON."""
        tensors = {f"base/{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"{i}/{name}": t for i, edit in enumerate(self.edits) for name, t in edit.directions.items()}
        return tensors, json.dumps([{**_plain(edit), "origin": edit.origin} for edit in self.edits], sort_keys=True)


def _plain(edit: Edit) -> dict[str, Any]:
    """An edit without its directions, as plain data."""
    fields = {name: getattr(edit, name) for name in ("concept", "step", "strength", "details", "parents")}
    return {**fields, "tensors": sorted(edit.directions)}


def _edit(plain: Mapping[str, Any], directions: dict[str, Tensor]) -> Edit:
    """An edit from a file, which is not trusted."""
    fields = {name: plain[name] for name in ("concept", "details", "parents", "origin")}
    edit = Edit(step=float(plain["step"]), strength=float(plain["strength"]), directions=directions, **fields)
    texts = [edit.concept, edit.origin, *(parent[key] for parent in edit.parents for key in ("concept", "digest"))]
    numbers = [edit.step, edit.strength, *(parent["strength"] for parent in edit.parents)]
    if not all(isinstance(text, str) for text in texts) or not all(math.isfinite(number) for number in numbers):
        raise ValueError("a concept or a digest is not a string, or a step or a strength is not finite")
    return edit


def _named_as_here(active: Mapping[str, Active]) -> Edit:
    """The edit that acts on some tensors of a model, by their names there; derived from the original only where these differ."""
    one = next(iter(active.values()))
    edit = replace(one.edit, strength=one.strength)
    if {name: own.name for name, own in active.items()} == {name: name for name in edit.directions}:
        return edit
    directions = {name: own.edit.directions[own.name] for name, own in active.items()}
    return replace(edit, directions=directions, origin=edit.digest)


def _refuse_infinite(strength: float) -> None:
    if not math.isfinite(strength):
        raise PatchError(f"strength must be finite, got {strength}")

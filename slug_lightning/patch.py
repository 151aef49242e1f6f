"""What was done to a model, as a small file: checked, applied, weakened, undone, combined."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.layers import plain_name
from slug_lightning.sharded import placed, whole

FORMAT = "slug-lightning patch 1"


class PatchError(UnlearnError):
    """A patch that is damaged, or does not belong to this model; the model is as it was."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One concept's edit: a step along the forget gradient of some tensors.

    Attributes:
        concept: what is forgotten, in words.
        step: λ, the factor of the directions.
        directions: the forget gradient by tensor name, fp32.
        details: facts for whoever reads the patch later: layer, relative step, metrics before and after.
    """

    concept: str
    step: float
    directions: dict[str, Tensor]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the directions and the step: what the edit does, whatever it is called."""
        return digest_of(self.directions, json.dumps(self.step))


def edited(base: Tensor, steps: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Add scaled directions to a tensor, in the order given.

    Computed in fp32 (fp64 for fp64 tensors) by one product and one sum a direction, each rounded once, so that the
    result has the same bits on every device.

    Args:
        base: the tensor before.
        steps: directions and their factors.

    Returns:
        A new tensor of `base`'s shape, dtype and device.

    Example:
        >>> edited(torch.ones(2), [(torch.tensor([1.0, -1.0]), 0.5)])
        tensor([1.5000, 0.5000])
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    for direction, factor in steps:
        wide = wide + direction.to(wide) * factor
    return wide.to(base.dtype)


@dataclass(frozen=True, eq=False)
class UnlearnPatch:
    """The edits of one or more concepts on one base.

    Args:
        base: every edited tensor as it was before, by name.
        edits: at least one.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> patch = UnlearnPatch({"weight": before}, [Edit("cats", 0.5, {"weight": torch.ones(1, 2)})])
        >>> patch.apply(model)
        >>> torch.equal(model.weight, before + 0.5)
        True
        >>> patch.revert(model)
        >>> torch.equal(model.weight, before)
        True
    """

    base: dict[str, Tensor]
    edits: Sequence[Edit]

    def __repr__(self) -> str:
        concepts = ", ".join(edit.concept for edit in self.edits)
        return f"UnlearnPatch({concepts!r}, {', '.join(self.base)}, digest {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """SHA-256 over base, edits and details; stored in the file and checked on loading."""
        return digest_of(*self._content())

    def apply(self, model: nn.Module | MutableMapping[str, Tensor], strength: float = 1.0) -> None:
        """Edit the model in place.

        Args:
            model: the model the patch was made on, a model that holds it (`model.visual.proj` for `visual.proj`), the
                part of it that holds the edited tensors, or a state dict of one of these.
            strength: factor of the step; 1 is what was measured, 0 the base.

        Raises:
            PatchError: if a tensor is missing, differs from the patch's base, or the patch was applied before.
        """
        targets = _locate(self.base, model)
        new = self._tensors(strength)
        for name, target in targets.items():
            if not same_bits(target, self.base[name]):
                done = same_bits(target, new[name]) or same_bits(target, self._tensors(1.0)[name])
                problem = "the patch is applied already; revert it first" if done else "the model is not the patch's base"
                raise PatchError(f"{name}: {problem}")
        _write(targets, new)

    def revert(self, model: nn.Module | MutableMapping[str, Tensor], strength: float = 1.0) -> None:
        """Put the tensors back as they were, bit for bit.

        Args:
            model: as in `apply`.
            strength: the strength with which the patch was applied.

        Raises:
            PatchError: if a tensor is not what this patch made of its base.
        """
        made = self._tensors(strength)
        targets = _locate(made, model)
        for name, target in targets.items():
            if not same_bits(target, made[name]):
                reason = "the patch is not applied" if same_bits(target, self.base[name]) else "something else changed it since"
                raise PatchError(f"{name}: nothing to revert at strength {strength:g}: {reason}")
        _write(targets, self.base)

    @staticmethod
    def combine(patches: Sequence[UnlearnPatch]) -> UnlearnPatch:
        """Make one patch of several that were made on the same base; edits of one tensor add up.

        The order of `patches` does not matter: edits are put in the order of their digests.

        Raises:
            PatchError: if there is none, two bases differ, or an edit occurs twice.
        """
        if not patches:
            raise PatchError("combine: no patch was given")
        base: dict[str, Tensor] = {}
        for patch in patches:
            for name, tensor in patch.base.items():
                if name in base and not same_bits(base[name], tensor):
                    raise PatchError(f"{name}: the patches were made on different bases; make them anew on one model")
                base[name] = tensor
        edits = sorted((edit for patch in patches for edit in patch.edits), key=lambda edit: edit.digest)
        for one, next_one in itertools.pairwise(edits):
            if one.digest == next_one.digest:
                raise PatchError(f"combine: the edit for {one.concept!r} occurs twice")
        return UnlearnPatch(dict(sorted(base.items())), edits)

    def describe(self) -> dict[str, Any]:
        """Plain data on what the patch does: digest, tensors, and concept, step and details of each edit."""
        return {
            "digest": self.digest,
            "tensors": {
                name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "sha256": digest_of({name: t}, "")}
                for name, t in self.base.items()
            },
            "edits": [
                {"concept": e.concept, "step": e.step, "tensors": sorted(e.directions), "details": e.details} for e in self.edits
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the patch as safetensors, whole or not at all."""
        tensors, text = self._content()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "patch": text, "sha256": digest_of(tensors, text)}
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        with at_once(path) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> UnlearnPatch:
        """Read a patch; nothing in it is executed.

        Raises:
            PatchError: if the file is no patch, is truncated, or was altered since it was written.
            FileNotFoundError: if there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no patch at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError, OSError) as error:
            raise PatchError(f"{path}: not a whole safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise PatchError(f"{path}: not a patch, or one of another version ({metadata.get('format')!r}, not {FORMAT!r})")
        text = metadata.get("patch", "")
        if metadata.get("sha256") != digest_of(tensors, text):
            raise PatchError(f"{path}: the content does not match its digest; the file was altered or damaged")
        try:
            edits = [
                Edit(e["concept"], float(e["step"]), {n: tensors[f"{i}/{n}"] for n in e["tensors"]}, e["details"])
                for i, e in enumerate(json.loads(text))
            ]
            base = {n: tensors[f"base/{n}"] for n in sorted({n for e in edits for n in e.directions})}
            if not all(isinstance(e.concept, str) and math.isfinite(e.step) for e in edits):
                raise ValueError("a concept that is no text, or a step that is no number")
            if not base or any(t.shape != base[n].shape for e in edits for n, t in e.directions.items()):
                raise ValueError("no edit, or a direction of another shape than its tensor")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise PatchError(f"{path}: the content is not that of a patch ({error!r})") from error
        return cls(base, edits)

    def _tensors(self, strength: float) -> dict[str, Tensor]:
        """The edited tensors at a strength."""
        return {
            name: edited(base, [(e.directions[name], strength * e.step) for e in self.edits if name in e.directions])
            for name, base in self.base.items()
        }

    def _content(self) -> tuple[dict[str, Tensor], str]:
        """What the file holds: tensors, and as JSON everything else."""
        tensors = {f"base/{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"{i}/{name}": t for i, edit in enumerate(self.edits) for name, t in edit.directions.items()}
        edits = [
            {"concept": e.concept, "step": e.step, "tensors": sorted(e.directions), "details": e.details} for e in self.edits
        ]
        return tensors, json.dumps(edits, sort_keys=True)


@contextmanager
def at_once(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: inside, under another name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.json"
        >>> with at_once(path) as part:
        ...     _ = part.write_text("{}")
        ...     path.exists()
        False
        >>> path.read_text()
        '{}'
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.chmod(0o644)  # safetensors leaves what only its owner reads
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def digest_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's content as bytes, `[n]`, on the CPU."""
    return whole(tensor).cpu().contiguous().flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, also of NaNs and of signed zeros, whatever the device."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _locate(values: Mapping[str, Tensor], model: nn.Module | MutableMapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the tensors in a model, in one that holds the model, or in a part of it: names differ by one prefix.

    Where several parts fit by name, it is the one that holds `values`; if none does, the one nearest the root.
    """
    names = list(values)
    found: Mapping[str, Tensor] = _tensors_of(model) if isinstance(model, nn.Module) else model
    held = {plain_name(name): tensor for name, tensor in found.items()}
    ends = [known.removesuffix(names[0]) for known in held if known == names[0] or known.endswith("." + names[0])]
    fitting = [prefix for prefix in sorted(ends, key=len) if all(prefix + name in held for name in names)]
    for prefix in fitting:
        if all(same_bits(held[prefix + name], values[name]) for name in names):
            return {name: held[prefix + name] for name in names}
    if fitting:
        return {name: held[fitting[0] + name] for name in names}
    parts = names[0].split(".")
    for cut in range(1, len(parts)):
        prefix = ".".join(parts[:cut]) + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in held for name in names):
            return {name: held[name.removeprefix(prefix)] for name in names}
    missing = [name for name in names if name not in held]
    raise PatchError(f"{missing[0]}: the model has no such tensor; the patch was made on another model")


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor under every name it has; not by `state_dict`, which a model may override to give copies."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values in: nothing is written unless every value has passed its checks before."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(placed(values[name], target))  # not by `.data`: whoever watches the version must notice

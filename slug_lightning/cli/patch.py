"""`slug-lightning patch`: show, apply, revert, adjust and combine patch files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slug_lightning  # whose names are imported, with torch, when they are used
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor


EPILOG = """Several patches may be applied to the same weights, each at its own strength; in whatever order they are applied,
adjusted and reverted, the weights are bit for bit those that the base and the remaining patches make.

What is applied to WEIGHTS is read from NAME.patches.safetensors next to NAME.safetensors or NAME.ckpt; without it, from a
patch.safetensors in the same folder, if that makes these weights. What is applied to OUTPUT is written next to it likewise,
unless it is nothing: move the two together. One patch at full strength is known by the weights alone; to revert it from
another strength without such a file, give --strength.
"""


def add_patch(verbs: Any) -> None:
    """Add the command to the parser of all commands."""
    patch = verbs.add_parser("patch", help="show, apply, revert, adjust or combine patch files")
    patch_verbs = patch.add_subparsers(required=True, metavar="{show,apply,revert,adjust,combine}")

    def verb(name: str, run: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        added = patch_verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **more)
        added.set_defaults(run=run)
        return added

    show = verb("show", _show, "check that a patch is complete, and print what it does as JSON")
    show.add_argument("patch", type=Path, help="patch file")
    for name, text, strength, options in (
        ("apply", "apply a patch to weights, into a new file", "factor of the step: 1 is what was measured", {"default": 1.0}),
        ("revert", "take a patch out of weights, bit for bit, into a new file", "the one at which it was applied", {}),
        ("adjust", "change the strength of an applied patch, into a new file", "the new one", {"required": True}),
    ):
        added = verb(name, _rewrite, text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(what=name)
        added.add_argument("patch", type=Path, help="patch file")
        added.add_argument("weights", type=Path, help="safetensors weights, or a Lightning checkpoint (.ckpt)")
        added.add_argument("output", type=Path, help="where the new weights go, in the format of WEIGHTS; must not exist")
        added.add_argument("--strength", type=float, help=strength, **options)
    combine = verb("combine", _combine, "combine patches that were made on the same base into one")
    combine.add_argument("patches", type=Path, nargs="+", help="patch files")
    combine.add_argument("-o", "--output", type=Path, required=True, help="where the combined patch goes; must not exist")


def _show(options: argparse.Namespace) -> None:
    print(json.dumps(slug_lightning.UnlearnPatch.load(options.patch).describe(), indent=2))


def _rewrite(options: argparse.Namespace) -> None:
    """Apply, revert or adjust a patch, and write the new weights and, next to them, what is applied to them."""
    _refuse_existing(options.output)
    _refuse_existing(_companion(options.output))
    patch = slug_lightning.UnlearnPatch.load(options.patch)
    tensors, write = _read(options.weights)
    _recognise(options.weights, tensors)
    getattr(patch, options.what)(tensors, strength=options.strength)
    left = slug_lightning.UnlearnPatch.active(tensors)
    with ExitStack() as both:  # the weights appear last: never without what is applied to them
        write(both.enter_context(atomic_write(options.output)))
        if left is not None:
            left.save(both.enter_context(atomic_write(_companion(options.output))))
    print(f"{options.output}: {options.weights.name} after {options.what} of {', '.join(e.concept for e in patch.edits)}")
    known = ", ".join(f"{e.concept} (strength {e.strength:g})" for e in left.edits) if left else "nothing known"
    print(f"applied to it: {known}")


def _read(weights: Path) -> tuple[dict[str, Tensor], Callable[[Path], Any]]:
    """Read tensors; also returns a function that writes them, as they are then, in the same format."""
    import pickle  # for an error class: nothing but tensors is unpickled

    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    if weights.is_dir():
        raise UnlearnError(f"weights: {weights} is a folder of shards; take the weights.safetensors next to it")
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}")
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, partial(save_file, tensors, metadata=file.metadata())
        except SafetensorError as error:
            raise UnlearnError(f"weights: {weights} is not a complete safetensors file ({error})") from error
    if weights.suffix == ".ckpt":
        try:
            checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
            tensors = checkpoint["state_dict"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise UnlearnError(f"weights: {weights} is not a complete Lightning checkpoint ({error!r})") from error
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("UnlearnCallback")]:
            del checkpoint["callbacks"][name]  # its report is about other weights now
        return tensors, partial(torch.save, checkpoint)
    raise UnlearnError(f"weights: {weights.name} is neither .safetensors nor .ckpt; convert it first")


def _companion(weights: Path) -> Path:
    """The file next to weights that says what is applied to them."""
    return weights.with_name(f"{weights.stem}.patches.safetensors")


def _recognise(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Learn from the files next to weights what is applied to them."""
    companion, run = _companion(weights), weights.with_name("patch.safetensors")
    if companion.exists():
        try:
            slug_lightning.UnlearnPatch.load(companion).recognise(tensors)
        except slug_lightning.PatchError as error:
            raise slug_lightning.PatchError(f"{companion} does not belong to {weights.name}, or is damaged: {error}") from error
    elif run.exists():
        with suppress(slug_lightning.PatchError):  # other weights may be in the folder of a run, too
            slug_lightning.UnlearnPatch.load(run).recognise(tensors)


def _combine(options: argparse.Namespace) -> None:
    _refuse_existing(options.output)
    combined = slug_lightning.UnlearnPatch.combine([slug_lightning.UnlearnPatch.load(path) for path in options.patches])
    combined.save(options.output)
    print(f"{options.output}: {len(combined.edits)} edits of {len(combined.base)} tensors")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"output: {path} exists; name another file or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: no folder {path.parent}; create it first")

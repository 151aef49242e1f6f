"""`slug-lightning patch`: show, apply, revert, adjust and combine patch files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


BESIDE = """Several patches may be applied to the same weights, each at its own strength; in whatever order they are applied,
adjusted and reverted, the weights are bit for bit those that the base and the patches that are left make.

What is applied to WEIGHTS is read from the file NAME.patches.safetensors beside NAME.safetensors or NAME.ckpt; without
it, from a patch.safetensors in the same folder, if the weights are what that makes. What is applied to OUTPUT is written
beside it likewise, unless it is nothing: move the two together. One patch at full strength is known by the weights alone;
to revert it from another strength without such a file, give --strength.
"""


def add_patch(verbs: Any) -> None:
    """Add the command to the parser of all commands."""
    patch = verbs.add_parser("patch", help="show, apply, revert, adjust or combine patch files")
    patch_verbs = patch.add_subparsers(required=True, metavar="{show,apply,revert,adjust,combine}")

    def verb(name: str, run: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        added = patch_verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **more)
        added.set_defaults(run=run)
        return added

    show = verb("show", _show, "print what a patch does, as JSON, after checking that it is whole")
    show.add_argument("patch", type=Path, help="patch file")
    for name, text, strength, options in (
        ("apply", "edit weights by a patch, into a new file", "factor of the step: 1 is what was measured", {"default": 1.0}),
        ("revert", "take a patch out of weights, bit for bit, into a new file", "the one with which it was applied", {}),
        ("adjust", "give a patch in weights another strength, into a new file", "the new one", {"required": True}),
    ):
        added = verb(name, _rewrite, text, epilog=BESIDE, formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(what=name)
        added.add_argument("patch", type=Path, help="patch file")
        added.add_argument("weights", type=Path, help="safetensors weights, or a Lightning checkpoint (.ckpt)")
        added.add_argument("output", type=Path, help="where the new weights go, in the format of WEIGHTS; must not exist")
        added.add_argument("--strength", type=float, help=strength, **options)
    combine = verb("combine", _combine, "make one patch of several that were made on the same base")
    combine.add_argument("patches", type=Path, nargs="+", help="patch files")
    combine.add_argument("-o", "--output", type=Path, required=True, help="where the combined patch goes; must not exist")


def _show(options: argparse.Namespace) -> None:
    from slug_lightning.patches.patch import UnlearnPatch

    print(json.dumps(UnlearnPatch.load(options.patch).describe(), indent=2))


def _rewrite(options: argparse.Namespace) -> None:
    """Let a patch act on weights, and write them anew with what is applied to them beside."""
    from slug_lightning.patches.patch import UnlearnPatch
    from slug_lightning.utils.files import atomic_write

    _refuse_existing(options.output)
    _refuse_existing(_beside(options.output))
    patch = UnlearnPatch.load(options.patch)
    tensors, write = _read(options.weights)
    _recognise(options.weights, tensors)
    getattr(patch, options.what)(tensors, strength=options.strength)
    left = UnlearnPatch.active(tensors)
    with ExitStack() as both:  # the weights appear last: never without what is applied to them
        write(both.enter_context(atomic_write(options.output)))
        if left is not None:
            left.save(both.enter_context(atomic_write(_beside(options.output))))
    print(f"{options.output}: {options.weights.name} with {options.what} of {', '.join(e.concept for e in patch.edits)}")
    known = ", ".join(f"{e.concept} (strength {e.strength:g})" for e in left.edits) if left else "nothing that is known"
    print(f"applied to it: {known}")


def _read(weights: Path) -> tuple[dict[str, Tensor], Callable[[Path], Any]]:
    """Read tensors; gives, too, what writes them as they are then in the same format."""
    import pickle  # for the name of an error: nothing is unpickled but tensors

    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from slug_lightning.errors import UnlearnError

    if weights.is_dir():
        raise UnlearnError(f"weights: {weights} is a folder of shards; take the weights.safetensors beside it")
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}")
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, partial(save_file, tensors, metadata=file.metadata())
        except SafetensorError as error:
            raise UnlearnError(f"weights: {weights} is not a whole safetensors file ({error})") from error
    if weights.suffix == ".ckpt":
        try:
            checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
            tensors = checkpoint["state_dict"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise UnlearnError(f"weights: {weights} is not a whole Lightning checkpoint ({error!r})") from error
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("UnlearnCallback")]:
            del checkpoint["callbacks"][name]  # its report speaks of other weights now
        return tensors, partial(torch.save, checkpoint)
    raise UnlearnError(f"weights: {weights.name} is neither .safetensors nor .ckpt; convert it first")


def _beside(weights: Path) -> Path:
    """The file that says what is applied to weights."""
    return weights.with_name(f"{weights.stem}.patches.safetensors")


def _recognise(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Learn from the files beside weights what is applied to them."""
    from slug_lightning.patches.edit import PatchError
    from slug_lightning.patches.patch import UnlearnPatch

    if _beside(weights).exists():
        try:
            UnlearnPatch.load(_beside(weights)).recognise(tensors)
        except PatchError as error:
            raise PatchError(f"{_beside(weights)} does not belong to {weights.name}, or is damaged: {error}") from error
    elif (made := weights.with_name("patch.safetensors")).exists():  # as a run leaves it
        with suppress(PatchError):  # other weights may lie in that folder, too
            UnlearnPatch.load(made).recognise(tensors)


def _combine(options: argparse.Namespace) -> None:
    from slug_lightning.patches.patch import UnlearnPatch

    _refuse_existing(options.output)
    combined = UnlearnPatch.combine([UnlearnPatch.load(path) for path in options.patches])
    combined.save(options.output)
    print(f"{options.output}: {len(combined.edits)} edits of {len(combined.base)} tensors")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"output: {path} exists; name another file or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {path.parent}; make it first")

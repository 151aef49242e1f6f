"""The command `slug-lightning`: forget from a YAML file, and handle patch files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from torch import Tensor

UNLEARNED, FAILURE, USAGE, INFEASIBLE = 0, 1, 2, 3

EPILOG = """Options of the callback: slug-lightning fit --trainer.callbacks.help slug_lightning.callbacks.UnlearnCallback

exit codes:
  0  unlearned (fit), done (patch); whether the bounds hold on report data too, the report says ("holds")
  1  failure
  2  usage: an argument, a config or a file is not what it should be
  3  infeasible: no step meets both bounds, the weights are untouched
"""


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the command line; torch and Lightning are imported only by what needs them.

    Args:
        args: without the program's name; default: those of the process.

    Returns:
        The exit code: 0 unlearned or done, 1 failure, 2 usage, 3 infeasible.
    """
    if (sys.argv[1:] if args is None else args)[:1] == ["fit"]:
        return fit(args)
    options = _parser().parse_args(args)
    from slug_lightning.errors import UnlearnError

    try:
        options.run(options)
    except (UnlearnError, OSError) as error:
        print(f"slug-lightning: {error}", file=sys.stderr)
        return USAGE
    return UNLEARNED


def fit(args: Optional[Sequence[str]] = None) -> int:
    """Run one config with LightningCLI and say by the exit code how it ended."""
    sys.path.append(str(Path.cwd()))  # a config may name classes of a module in the working folder
    from slug_lightning.errors import UnlearnError
    from slug_lightning.lightning_cli import UnlearnCLI
    from slug_lightning.processes import OtherProcessError

    try:
        report = UnlearnCLI.run(args)
    except UnlearnError as error:
        print(f"slug-lightning: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, OtherProcessError) else USAGE  # what it was, the other process says
    return UNLEARNED if report.status == "unlearned" else INFEASIBLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slug-lightning",
        description="Make a trained model forget a person, a style, a thing or a text, and carry the edit as a patch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("slug-lightning"))
    verbs = parser.add_subparsers(required=True, metavar="{fit,patch}")
    verbs.add_parser(
        "fit", help="forget as a config says: slug-lightning fit --config FILE; fit --help lists Lightning's options"
    )
    patch = verbs.add_parser("patch", help="show, apply, revert or combine patch files")
    patch_verbs = patch.add_subparsers(required=True, metavar="{show,apply,revert,combine}")

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = patch_verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    show = verb("show", _show, "print what a patch does, as JSON, after checking that it is whole")
    show.add_argument("patch", type=Path, help="patch file")
    for name, run, text in (
        ("apply", _apply, "edit weights by a patch, into a new file"),
        ("revert", _revert, "take a patch back, bit for bit, into a new file"),
    ):
        added = verb(name, run, text)
        added.add_argument("patch", type=Path, help="patch file")
        added.add_argument("weights", type=Path, help="safetensors weights, or a Lightning checkpoint (.ckpt)")
        added.add_argument("output", type=Path, help="where the new weights go, in the format of WEIGHTS; must not exist")
        added.add_argument(
            "--strength", type=float, default=1.0, help="factor of the step: 1 is what was measured (default: %(default)s)"
        )
    combine = verb("combine", _combine, "make one patch of several that were made on the same base")
    combine.add_argument("patches", type=Path, nargs="+", help="patch files")
    combine.add_argument("-o", "--output", type=Path, required=True, help="where the combined patch goes; must not exist")
    return parser


def _show(options: argparse.Namespace) -> None:
    from slug_lightning.patch import UnlearnPatch

    print(json.dumps(UnlearnPatch.load(options.patch).describe(), indent=2))


def _apply(options: argparse.Namespace) -> None:
    _rewrite(options, "apply")


def _revert(options: argparse.Namespace) -> None:
    _rewrite(options, "revert")


def _rewrite(options: argparse.Namespace, what: str) -> None:
    """Read weights, let the patch act on them, write them in the same format."""
    import pickle  # for the name of an error: nothing is unpickled but tensors

    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from slug_lightning.errors import UnlearnError
    from slug_lightning.patch import UnlearnPatch

    _refuse_existing(options.output)
    patch = UnlearnPatch.load(options.patch)
    act = getattr(patch, what)
    if options.weights.is_dir():
        raise UnlearnError(f"weights: {options.weights} is a folder of shards; take the weights.safetensors beside it")
    if not options.weights.is_file():
        raise FileNotFoundError(f"no weights at {options.weights}")
    if options.weights.suffix == ".safetensors":
        try:
            with safe_open(options.weights, framework="pt") as file:
                metadata = file.metadata()
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UnlearnError(f"weights: {options.weights} is not a whole safetensors file ({error})") from error
        act(tensors, strength=options.strength)
        save_file(tensors, options.output, metadata=metadata)
    elif options.weights.suffix == ".ckpt":
        try:
            checkpoint = torch.load(options.weights, map_location="cpu", weights_only=True)
            tensors = checkpoint["state_dict"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise UnlearnError(f"weights: {options.weights} is not a whole Lightning checkpoint ({error!r})") from error
        act(tensors, strength=options.strength)
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("UnlearnCallback")]:
            del checkpoint["callbacks"][name]  # its report speaks of other weights now
        torch.save(checkpoint, options.output)
    else:
        raise UnlearnError(f"weights: {options.weights.name} is neither .safetensors nor .ckpt; convert it first")
    print(f"{options.output}: {options.weights.name} with {what} of {', '.join(e.concept for e in patch.edits)}")


def _combine(options: argparse.Namespace) -> None:
    from slug_lightning.patch import UnlearnPatch

    _refuse_existing(options.output)
    combined = UnlearnPatch.combine([UnlearnPatch.load(path) for path in options.patches])
    combined.save(options.output)
    print(f"{options.output}: {len(combined.edits)} edits of {len(combined.base)} tensors")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"output: {path} exists; name another file or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {path.parent}; make it first")


if __name__ == "__main__":
    raise SystemExit(main())

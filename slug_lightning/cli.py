"""The command `slug-lightning`: collect what to forget, forget from a YAML file, and handle patch files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from torch import Tensor

UNLEARNED, FAILURE, USAGE, INFEASIBLE, PARTLY = 0, 1, 2, 3, 4

EPILOG = """Options of a callback: slug-lightning fit --trainer.callbacks.help slug_lightning.callbacks.UnlearnCallback
(or slug_lightning.callbacks.ICUCallback, for passages that a language model recites)

exit codes:
  0  unlearned (fit, forget-another), done (collect, patch); whether the bounds hold on report data too, the report says ("holds")
  1  failure
  2  usage: an argument, a config or a file is not what it should be
  3  infeasible: no step meets both bounds, the weights are untouched; of ICU: passages are remembered after the last epoch
  4  partly: of several concepts some were left as they were
"""


ANOTHER = """Forget one more concept beside those of an earlier run, on the same model: its config, its edits and its data to
keep are used again, and its gradient of these, if the callback's retain_cache names a folder. The edits of that run stay as
they are; they are checked together with the new one. The result goes to a folder of its own.

  slug-lightning forget-another --run runs/several --forget EmojiDataModule --forget.thing dog

--forget names a datamodule as --data does in fit; it is asked for what is to be forgotten only. All options of fit change
the earlier run's config, such as --output_dir.
"""
COLLECT = """Write the image-text pairs whose captions name something, and others to keep, into a folder from which fit can read
them. Names are found as whole words, whatever the case; list plurals as aliases. Copies of a picture, of whatever encoding or
size, are left out, so that none is both tuned and reported on, or both forgotten and kept.

  slug-lightning collect --name octopus --alias octopuses --from "shards/*.tar" --output data/octopus
"""
BESIDE = """Several patches may be applied to the same weights, each at its own strength; in whatever order they are applied,
adjusted and reverted, the weights are bit for bit those that the base and the patches that are left make.

What is applied to WEIGHTS is read from the file NAME.patches.safetensors beside NAME.safetensors or NAME.ckpt; without
it, from a patch.safetensors in the same folder, if the weights are what that makes. What is applied to OUTPUT is written
beside it likewise, unless it is nothing: move the two together. One patch at full strength is known by the weights alone;
to revert it from another strength without such a file, give --strength.
"""


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the command line; torch and Lightning are imported only by what needs them.

    Args:
        args: without the program's name; default: those of the process.

    Returns:
        The exit code: 0 unlearned or done, 1 failure, 2 usage, 3 infeasible or unfinished, 4 partly.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["fit"]:
        return fit(args)
    # What this parser does not know of `forget-another` is for Lightning's.
    options, rest = _parser().parse_known_args(given)
    if "run_folder" in options:
        return fit(rest, earlier=options.run_folder)
    if rest:
        _parser().parse_args(given)  # says what is wrong
    from slug_lightning.errors import UnlearnError

    try:
        options.run(options)
    except (UnlearnError, OSError) as error:
        print(f"slug-lightning: {error}", file=sys.stderr)
        return USAGE
    return UNLEARNED


def fit(args: Optional[Sequence[str]] = None, earlier: Optional[Path] = None) -> int:
    """Run one config with LightningCLI, that of an earlier run if it is given, and say by the exit code how it ended."""
    sys.path.append(str(Path.cwd()))  # a config may name classes of a module in the working folder
    from slug_lightning.errors import UnlearnError
    from slug_lightning.lightning_cli import AnotherCLI, UnlearnCLI
    from slug_lightning.processes import OtherProcessError

    try:
        report = UnlearnCLI.run(args) if earlier is None else AnotherCLI.beside(earlier, args or ())
    except (ValueError, FileNotFoundError) as error:
        if not isinstance(behind := _behind(error), (UnlearnError, FileNotFoundError)):
            raise
        print(f"slug-lightning: {behind}", file=sys.stderr)
        return FAILURE if isinstance(behind, OtherProcessError) else USAGE  # what it was, the other process says
    return {"unlearned": UNLEARNED, "partly": PARTLY, "infeasible": INFEASIBLE, "unfinished": INFEASIBLE}[report.status]


def _behind(error: BaseException) -> BaseException:
    """The error that can be mended: what a class of the config raises when it is made, jsonargparse wraps in its own."""
    from slug_lightning.errors import UnlearnError

    behind: Optional[BaseException] = error
    while behind is not None and not isinstance(behind, UnlearnError):
        behind = behind.__cause__
    return behind or error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slug-lightning",
        description="Make a trained model forget a person, a style, a thing or a text, and carry the edit as a patch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("slug-lightning"))
    verbs = parser.add_subparsers(required=True, metavar="{collect,fit,forget-another,patch}")
    _add_collect(verbs)
    verbs.add_parser(
        "fit", help="forget as a config says: slug-lightning fit --config FILE; fit --help lists Lightning's options"
    )
    another = verbs.add_parser(
        "forget-another",
        help="forget one more concept beside those of an earlier run, whose gradients are not computed again",
        description=ANOTHER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    another.add_argument("--run", dest="run_folder", metavar="RUN", type=Path, required=True, help="folder of the earlier run")
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
    return parser


def _add_collect(verbs: Any) -> None:
    added = verbs.add_parser(
        "collect",
        help="gather the pictures of what is to be forgotten, and of what to keep, by their captions",
        description=COLLECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of the function
    )
    added.set_defaults(run=_collect)
    added.add_argument("--name", required=True, help="of what is to be forgotten, as captions have it")
    added.add_argument("--alias", dest="aliases", action="append", metavar="NAME", help="another name of it; may be repeated")
    what = "a CSV, a folder with one, or tar shards"
    added.add_argument("--from", dest="sources", nargs="+", required=True, metavar="SOURCE", help=what)
    added.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    caption = "a caption for what is to be forgotten, with {} for the name; may be repeated; default: 'a photo of {}' and others"
    added.add_argument("--template", dest="templates", action="append", metavar="TEXT", help=caption)
    added.add_argument("--at_least", type=int, metavar="N", help="fail with fewer pictures to forget or to keep; default: 20")
    added.add_argument("--limit", type=int, metavar="N", help="how many pictures to keep at most; default: 10000")
    added.add_argument("--seed", type=int, help="of the split into gradient, search and report; default: 0")
    added.add_argument("--image_column", metavar="NAME", help="of a CSV: the column of image paths; default: filepath")
    added.add_argument("--caption_column", metavar="NAME", help="of a CSV: the column of captions; default: title")


def _collect(options: argparse.Namespace) -> None:
    from slug_lightning.datamodules.collect import collect

    given = {name: value for name, value in vars(options).items() if name != "run"}
    print(collect(**given))
    init = {kind: str(options.output / f"{kind}.csv") for kind in ("forget", "retain")}
    more = {name: getattr(options, name) for name in ("seed", "limit") if name in options}
    data = {"class_path": "slug_lightning.datamodules.ImageTextDataModule", "init_args": init | more}
    print(f"in a config, with the model that it is for:\ndata: {json.dumps(data)}")


def _show(options: argparse.Namespace) -> None:
    from slug_lightning.patch import UnlearnPatch

    print(json.dumps(UnlearnPatch.load(options.patch).describe(), indent=2))


def _rewrite(options: argparse.Namespace) -> None:
    """Let a patch act on weights, and write them anew with what is applied to them beside."""
    from slug_lightning.patch import UnlearnPatch, at_once

    _refuse_existing(options.output)
    _refuse_existing(_beside(options.output))
    patch = UnlearnPatch.load(options.patch)
    tensors, write = _read(options.weights)
    _recognise(options.weights, tensors)
    getattr(patch, options.what)(tensors, strength=options.strength)
    left = UnlearnPatch.active(tensors)
    with ExitStack() as both:  # the weights appear last: never without what is applied to them
        write(both.enter_context(at_once(options.output)))
        if left is not None:
            left.save(both.enter_context(at_once(_beside(options.output))))
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
    from slug_lightning.patch import PatchError, UnlearnPatch

    if _beside(weights).exists():
        try:
            UnlearnPatch.load(_beside(weights)).recognise(tensors)
        except PatchError as error:
            raise PatchError(f"{_beside(weights)} does not belong to {weights.name}, or is damaged: {error}") from error
    elif (made := weights.with_name("patch.safetensors")).exists():  # as a run leaves it
        with suppress(PatchError):  # other weights may lie in that folder, too
            UnlearnPatch.load(made).recognise(tensors)


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

"""The command `slug-lightning`: collect what to forget, forget from a YAML file, and handle patch files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from slug_lightning.cli.collect import add_collect
from slug_lightning.cli.patch import add_patch

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
    from slug_lightning.cli.lightning import AnotherCLI, UnlearnCLI
    from slug_lightning.distributed.processes import OtherProcessError
    from slug_lightning.errors import UnlearnError

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
    add_collect(verbs)
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
    add_patch(verbs)
    return parser

"""The command `slug-lightning`: gather data, forget as a YAML file says, and handle patch files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from slug_lightning.cli.collect import add_collect
from slug_lightning.cli.patch import add_patch
from slug_lightning.errors import UnlearnError

UNLEARNED, FAILURE, USAGE, INFEASIBLE, PARTLY = 0, 1, 2, 3, 4

EPILOG = """Options of a callback: slug-lightning fit --trainer.callbacks.help slug_lightning.callbacks.UnlearnCallback
(or slug_lightning.callbacks.ICUCallback, for passages that a language model recites)

exit codes:
  0  unlearned (fit, forget-another), done (collect, patch); "holds" in the report says whether the bounds hold on the test split
  1  failure
  2  usage: a wrong argument, config or file
  3  infeasible: no step meets both bounds, the weights are untouched; with ICU: passages are remembered after the last epoch
  4  partly: only some of several concepts were unlearned
"""


ANOTHER = """Forget one more concept in addition to those of an earlier run, on the same model. Its config, edits and retain
set are used again, and its retain gradient if the callback's retain_cache names a folder. The earlier edits stay as they
are and are checked together with the new one. The result goes to a folder of its own.

  slug-lightning forget-another --run runs/several --forget EmojiDataModule --forget.thing dog

--forget names a datamodule as --data does in fit; only its forget set is used. All options of fit change the earlier run's
config, such as --output_dir.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; torch and Lightning are imported only by what needs them.

    `args` are without the program's name; by default those of the process.
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
    try:
        options.run(options)
    except (UnlearnError, OSError) as error:
        print(f"slug-lightning: {error}", file=sys.stderr)
        return USAGE
    return UNLEARNED


def fit(args: Sequence[str] | None = None, earlier: Path | None = None) -> int:
    """Run one config with LightningCLI, that of an earlier run if given, and return the exit code."""
    sys.path.append(str(Path.cwd()))  # a config may name classes of a module in the working folder
    from slug_lightning.cli.lightning import AnotherCLI, UnlearnCLI
    from slug_lightning.distributed.processes import OtherProcessError

    try:
        report = UnlearnCLI.run(args) if earlier is None else AnotherCLI.run_after(earlier, args or ())
    except (ValueError, FileNotFoundError) as error:
        cause: BaseException | None = error  # jsonargparse wraps what a class of the config raises when it is made
        while cause is not None and not isinstance(cause, UnlearnError):
            cause = cause.__cause__
        if not isinstance(cause := cause or error, (UnlearnError, FileNotFoundError)):
            raise
        print(f"slug-lightning: {cause}", file=sys.stderr)
        return FAILURE if isinstance(cause, OtherProcessError) else USAGE  # the other process says which it was
    return {"unlearned": UNLEARNED, "partly": PARTLY, "infeasible": INFEASIBLE, "unfinished": INFEASIBLE}[report.status]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slug-lightning",
        description="Make a trained model forget a person, a style, an object or a text, and save the edit as a patch.",
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
        help="forget one more concept in addition to those of an earlier run",
        description=ANOTHER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    another.add_argument("--run", dest="run_folder", metavar="RUN", type=Path, required=True, help="folder of the earlier run")
    add_patch(verbs)
    return parser

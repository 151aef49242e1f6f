"""`slug-lightning collect`: collect image-text pairs to forget and to retain, by their captions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLLECT = """Write the image-text pairs whose captions name a concept, and others to retain, into a folder that fit can read.
Names are matched as whole words, ignoring case; list plurals as aliases. Copies of an image, whatever their encoding or size,
are left out, so that no image is in two splits, or both in the forget and the retain set.

  slug-lightning collect --name octopus --alias octopuses --from "shards/*.tar" --output data/octopus
"""


def add_collect(verbs: Any) -> None:
    """Add the command to the parser of all commands."""
    added = verbs.add_parser(
        "collect",
        help="collect image-text pairs to forget and to retain, by their captions",
        description=COLLECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of the function
    )
    added.set_defaults(run=_collect)
    added.add_argument("--name", required=True, help="of the concept to forget, as in the captions")
    added.add_argument("--alias", dest="aliases", action="append", metavar="NAME", help="another name of it; may be repeated")
    what = "a CSV, a folder with one, or tar shards"
    added.add_argument("--from", dest="sources", nargs="+", required=True, metavar="SOURCE", help=what)
    added.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    caption = "a caption for the forget set, with {} for the name; may be repeated; default: 'a photo of {}' and others"
    added.add_argument("--template", dest="templates", action="append", metavar="TEXT", help=caption)
    added.add_argument("--at_least", type=int, metavar="N", help="fail with fewer images to forget or to retain; default: 20")
    added.add_argument("--limit", type=int, metavar="N", help="retain only the first N pairs; default: 10000")
    added.add_argument("--seed", type=int, help="of the split into train, validation and test; default: 0")
    added.add_argument("--image_column", metavar="NAME", help="the CSV's column of image paths; default: filepath")
    added.add_argument("--caption_column", metavar="NAME", help="the CSV's column of captions; default: title")


def _collect(options: argparse.Namespace) -> None:
    from slug_lightning.datamodules.image_text.collect import collect

    given = {name: value for name, value in vars(options).items() if name != "run"}
    print(collect(**given))
    init = {kind: str(options.output / f"{kind}.csv") for kind in ("forget", "retain")}
    init |= {name: given[name] for name in ("seed", "limit") if name in given}
    data = {"class_path": "slug_lightning.datamodules.ImageTextDataModule", "init_args": init}
    print(f"for a config, with the model added to init_args:\ndata: {json.dumps(data)}")

"""Teach the embedded CLIP again what it has forgotten, and ten things that it has never seen; print how fast it learns each.

    python benchmarks/relearning.py                              # SLUG forgets the octopus; into runs/relearning.json
    python benchmarks/relearning.py --patch octopus.safetensors  # the CLIP with this patch instead
    python benchmarks/relearning.py --sample                     # one learning rate, two of the ten things

Each step trains all weights by Adam on the contrastive loss of one batch: 16 pictures of the thing, captioned by its name, the
same in each step, and 48 of other things, captioned by name and style, new ones in each step. (Pictures of the thing alone
would teach nothing, as all have the same caption; equal captions count as one.) Figures are the share of 320 other renderings
of the thing's five drawings to which its name is nearest, of 234 names, or of 235 if the CLIP has never seen the thing. Those
ten start from the CLIP as it ships.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pandas
import torch
from things import forget_data, retain_data, run
from torch import nn
from torch.utils.data import DataLoader

from slug_lightning import RetainCache, UnlearnPatch
from slug_lightning.audit.relearning import Relearning
from slug_lightning.clip.models import distinct_contrastive_loss
from slug_lightning.datamodules.demo.emoji import emoji_pairs
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings, load_unseen
from slug_lightning.modules import ClipModule, EmbeddedClip

STEPS = (0, 1, 2, 4, 8)
RETAIN = 48
"""Pictures of other things in each step's batch."""
RENDERINGS = 64
"""Of each of the five drawings, to measure on."""


def with_unseen(name: str) -> Drawings:
    """Return the drawings of all that the CLIP knows, and of one thing that it has never seen, which comes last."""
    known, unseen = load_drawings(), load_unseen()
    rows = unseen.things == unseen.thing_names.index(name)
    return Drawings(
        pictures=torch.cat([known.pictures, unseen.pictures[rows]]),
        things=torch.cat([known.things, torch.full((int(rows.sum()),), len(known.thing_names))]),
        styles=torch.cat([known.styles, unseen.styles[rows]]),
        thing_names=[*known.thing_names, name],
        style_names=known.style_names,
    )


def learned(model: nn.Module, drawings: Drawings, name: str, attack: Relearning) -> list[dict[str, float]]:
    """Teach a CLIP one thing; rows as of `Relearning`, with the metric `thing_accuracy`."""
    generator = torch.Generator().manual_seed(attack.seed)
    is_own = drawings.things == drawings.thing_names.index(name)
    own, others = is_own.nonzero()[:, 0], (~is_own).nonzero()[:, 0]

    def mixed(rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    lessons = mixed(own.repeat(-(-attack.samples // len(own))), attack.samples)
    taught = emoji_pairs(drawings, lessons, generator, thing=True, style=False)
    retain = emoji_pairs(drawings, mixed(others, RETAIN * max(attack.steps)), generator, thing=True, style=True)
    asked = emoji_pairs(drawings, own.repeat(RENDERINGS), generator, thing=True, style=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    module = ClipModule(model, prompts={"thing": drawings.thing_names}, tokenizer=tokenizer)
    module.loss = distinct_contrastive_loss
    taught, retain, asked = (DataLoader(part, batch_size=RETAIN) for part in (taught, retain, asked))
    return attack(module, taught, asked, metric="thing_accuracy", retain=retain)


def never_seen(attack: Relearning, names: Sequence[str] | None = None) -> list[dict[str, float | str]]:
    """Teach the embedded CLIP each of the things that it has never seen; rows as of `learned`, with the name under "thing"."""
    model, rows = EmbeddedClip().model, []
    for name in names or load_unseen().thing_names:
        rows += [{"thing": name, **row} for row in learned(model, with_unseen(name), name, attack)]
        print(f"{name}: {[round(100 * float(row['thing_accuracy']), 1) for row in rows if row['thing'] == name]}", flush=True)
    return rows


def forgotten(name: str, patch: Path | None) -> nn.Module:
    """Return the embedded CLIP with a patch, or as SLUG leaves it after it has forgotten a thing."""
    module, drawings = EmbeddedClip(), load_drawings()
    if patch is not None:
        UnlearnPatch.load(patch).apply(module.model)
        return module.model
    generator, thing = torch.Generator().manual_seed(0), drawings.thing_names.index(name)
    retain = retain_data(drawings, torch.tensor([thing]), generator)
    report = run(module, name, forget_data(drawings, thing, generator), retain, RetainCache())
    assert report.patch is not None, report.to_text()
    report.patch.apply(module.model)
    return module.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thing", default="octopus", help="what is forgotten (default: %(default)s)")
    parser.add_argument("--patch", type=Path, help="what made the CLIP forget it (default: SLUG does, first)")
    parser.add_argument("--seed", type=int, default=0, help="of renderings and steps (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="a small part of it")
    parser.add_argument("--output", type=Path, default=Path("runs/relearning.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    start = time.time()
    attack = Relearning(STEPS, (1e-4,), seed=options.seed) if options.sample else Relearning(STEPS, seed=options.seed)
    model = forgotten(options.thing, options.patch)
    rows = [{"thing": options.thing, **row} for row in learned(model, load_drawings(), options.thing, attack)]
    unseen = never_seen(attack, load_unseen().thing_names[:2] if options.sample else None)
    table = pandas.DataFrame([*rows, *({**row, "thing": "never seen, mean"} for row in unseen)])
    table["thing_accuracy"] *= 100
    table = table.pivot_table("thing_accuracy", ["thing", "learning_rate"], "steps", sort=False)
    print(
        "named correctly after so many steps, %\n"
        + table.reset_index().to_markdown(index=False, floatfmt=("", ".0e", *5 * [".1f"]))
    )
    print(f"{time.time() - start:.0f} s")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows + unseen, indent=2) + "\n")


if __name__ == "__main__":
    main()

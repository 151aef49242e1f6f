"""Forget twenty things from the embedded CLIP in one process, each from the original; print what became of each request.

    python benchmarks/things.py                      # twenty things, into runs/things.json
    python benchmarks/things.py --paper              # by the published procedure
    python benchmarks/things.py --count 3 --seed 1   # other things

The things are drawn by a fixed seed from all 234. The data to keep are the same for all requests (drawings of none of
these things), so their gradient is computed once. What a request cannot do without is its own forget pass and its
evaluation: of search data before the edit, of report data before and after. `ratio` is what the request cost beside that,
in floating-point operations. Accuracies are those on report data.
"""

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl
import pandas
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from slug_lightning import RetainCache, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.base import split_indices
from slug_lightning.datamodules.demo.emoji import emoji_pairs
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.modules import EmbeddedClip
from slug_lightning.reports.cost import flop_counter

RENDERINGS = {"train": 16, "val": 16, "test": 64}
"""Of each of a thing's five drawings, for gradient, search and report: as many as in configs/thing.yaml."""
BATCH = 32
KINDS = (("thing", "forget", "thing_accuracy"), ("others", "retain", "thing_accuracy"), ("style", "retain", "style_accuracy"))


def retain_data(drawings: Drawings, things: Tensor, generator: torch.Generator) -> UnlearnDataModule:
    """Everything but the things: half of the drawings for the gradient, a quarter for the search, a quarter to report."""
    others = (~torch.isin(drawings.things, things)).nonzero()[:, 0]
    rows = {split: others[part] for split, part in split_indices(len(others)).items()}
    rows["test"] = rows["test"].repeat(4)  # as configs/thing.yaml does
    train, val, test = (emoji_pairs(drawings, part, generator, thing=True, style=True) for part in rows.values())
    return UnlearnDataModule(retain=train, retain_val=val, retain_test=test, batch_size=BATCH)


def forget_data(drawings: Drawings, thing: int, generator: torch.Generator) -> UnlearnDataModule:
    """Renderings of one thing's drawings, new ones for each part."""
    rows = (drawings.things == thing).nonzero()[:, 0]
    sets = [emoji_pairs(drawings, rows.repeat(times), generator, thing=True, style=False) for times in RENDERINGS.values()]
    return UnlearnDataModule(sets[0], forget_val=sets[1], forget_test=sets[2], batch_size=16)


def run(
    module: EmbeddedClip, name: str, forget: UnlearnDataModule, retain: UnlearnDataModule, cache: RetainCache, paper: bool
) -> UnlearnReport:
    """One request; the module is as before afterwards."""
    callback = UnlearnCallback(
        near_retain=None if paper else "auto",
        forget={name: forget},
        retain=retain,
        forget_metric="thing_accuracy",
        retain_metric=["style_accuracy", "thing_accuracy"],
        retain_tolerance=0.02,
        method=(SLUG.paper if paper else SLUG)(max_evaluations=6),
        runtime=Runtime(count_cost=True, retain_cache=cache),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **quiet)
    trainer.fit(module, retain)
    report = callback.report
    assert report is not None
    if report.patch is not None:
        report.patch.revert(module.model)
    return report


def evaluation(module: EmbeddedClip, loaders: dict[str, list[DataLoader]]) -> int:
    """FLOPs of the evaluation that a request cannot do without: search data once, report data twice."""
    flops = {}
    for split, of_split in loaders.items():
        module.on_validation_start()  # the prompts count, too
        with torch.no_grad(), flop_counter() as counter:
            for loader in of_split:
                for number, batch in enumerate(loader):
                    module.scores(batch, number)
        flops[split] = counter.get_total_flops()
    return flops["val"] + 2 * flops["test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="how many things (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which things (default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="by the published procedure, which knows nothing of near data")
    parser.add_argument("--output", type=Path, default=Path("runs/things.json"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    drawings = load_drawings()
    generator = torch.Generator().manual_seed(arguments.seed)
    things = torch.randperm(len(drawings.thing_names), generator=generator)[: arguments.count]
    retain = retain_data(drawings, things, generator)
    module, cache, lines = EmbeddedClip(), RetainCache(), []
    for thing in things.tolist():
        name, forget = drawings.thing_names[thing], forget_data(drawings, thing, generator)
        reused = cache.reused
        report = run(module, name, forget, retain, cache, arguments.paper)
        flops = report.cost["flops"]
        loaders = {split: [forget.forget_dataloader(split), retain.retain_dataloader(split)] for split in ("val", "test")}
        needed = evaluation(module.eval(), loaders)
        accuracies = {
            f"{words} {when}": values[kind][metric]
            for words, kind, metric in KINDS
            for when, values in (("before", report.before), ("after", report.after))
        }
        lines.append(
            {"thing": name, "status": report.status, "holds": report.holds, "layer": report.layer, "step": report.relative_step}
            | accuracies
            | {
                "front layers": sum(score["on_front"] for score in report.scores),
                "retain gradient": "reused" if cache.reused > reused else "computed",
                "forget pass": flops["gradients"],
                "evaluation": needed,
                "ratio": sum(flops.values()) / (flops["gradients"] + needed),
                "seconds": sum(report.cost["seconds"].values()),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    table = pandas.DataFrame(lines)
    print(table.to_markdown(index=False, floatfmt=".3g"))
    later = table[table["retain gradient"] == "reused"]
    unlearned = table[table.status == "unlearned"]
    print(f"\n{len(unlearned)} of {len(table)} unlearned; of these {int(unlearned.holds.sum())} hold both bounds on report data")
    print(table[[column for column in table if column.endswith(("before", "after"))]].mean().to_string())
    print(f"worst thing after: {table['thing after'].max():.4f}")
    if len(later):
        saved = 1 - later["forget pass"].mean() / table["forget pass"].iloc[0]
        print(f"{len(later)} of {len(table)} reused the retain gradient, {saved:.0%} of the gradients' FLOPs")
        print(f"these cost {later.ratio.mean():.2f} x (forget pass + evaluation), at most {later.ratio.max():.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Forget twenty things from the embedded CLIP in one process, each from the original; print what a request costs.

    python benchmarks/requests.py               # twenty things, into runs/requests.json
    python benchmarks/requests.py --count 3

The data to keep are the same for all requests (drawings of none of the twenty things), so their gradient is computed
once. What a request cannot do without is its own forget pass and its evaluation: of search data before the edit, of
report data before and after. The table gives what each request cost beside that, in floating-point operations.
"""

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl
import pandas
import torch
from torch import Tensor

from slug_lightning import RetainCache, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.cost import flop_counter
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.base import split_indices
from slug_lightning.datamodules.emoji import Drawings, emoji_pairs, load_drawings
from slug_lightning.modules import EmbeddedClip

RENDERINGS = {"train": 16, "val": 16, "test": 64}
"""Of each of a thing's five drawings, for gradient, search and report: as many as in configs/thing.yaml."""
BATCH = 32


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
    return UnlearnDataModule(sets[0], forget_val=sets[1], forget_test=sets[2], batch_size=BATCH)


def run(
    module: EmbeddedClip, name: str, forget: UnlearnDataModule, retain: UnlearnDataModule, cache: RetainCache
) -> UnlearnReport:
    """One request; the module is as before afterwards."""
    callback = UnlearnCallback(
        forget={name: forget},
        retain=retain,
        forget_metric="thing_accuracy",
        retain_metric=["style_accuracy", "thing_accuracy"],
        retain_tolerance=0.02,
        max_evaluations=6,
        count_cost=True,
        retain_cache=cache,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **quiet)
    trainer.fit(module, retain)
    report = callback.report
    assert report is not None
    if report.patch is not None:
        report.patch.revert(module.model)
    return report


def evaluation(module: EmbeddedClip, forget: UnlearnDataModule, retain: UnlearnDataModule) -> int:
    """FLOPs of the evaluation that a request cannot do without: search data once, report data twice."""
    flops = {}
    for split in ("val", "test"):
        module.on_validation_start()  # the prompts count, too
        with torch.no_grad(), flop_counter() as counter:
            for loader in (forget.forget_dataloader(split), retain.retain_dataloader(split)):
                for number, batch in enumerate(loader):
                    module.scores(batch, number)
        flops[split] = counter.get_total_flops()
    return flops["val"] + 2 * flops["test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="how many things (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which things (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/requests.json"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    drawings = load_drawings()
    generator = torch.Generator().manual_seed(arguments.seed)
    things = torch.randperm(len(drawings.thing_names), generator=generator)[: arguments.count]
    retain = retain_data(drawings, things, generator)
    module, cache, lines = EmbeddedClip(), RetainCache(), []
    for thing in things.tolist():
        name, forget = drawings.thing_names[thing], forget_data(drawings, thing, generator)
        reused = cache.reused
        report = run(module, name, forget, retain, cache)
        flops = report.cost["flops"]
        needed = evaluation(module.eval(), forget, retain)
        lines.append(
            {
                "thing": name,
                "status": report.status,
                "forget after": report.after["forget"]["thing_accuracy"],
                "front layers": sum(score["on_front"] for score in report.scores),
                "retain gradient": "reused" if cache.reused > reused else "computed",
                "pass": flops["gradients"],
                "evaluation": needed,
                "whole": sum(flops.values()),
                "ratio": sum(flops.values()) / (flops["gradients"] + needed),
                "seconds": sum(report.cost["seconds"].values()),
            }
        )
    table = pandas.DataFrame(lines)
    print(table.to_markdown(index=False, floatfmt=".3g"))
    later = table[table["retain gradient"] == "reused"]
    saved = 1 - later["pass"].mean() / table["pass"].iloc[0]
    print(f"\n{len(later)} of {len(table)} requests reused the retain gradient, {saved:.0%} of the gradient pass")
    print(f"these cost {later.ratio.mean():.2f} x (forget pass + evaluation) in FLOPs, at most {later.ratio.max():.2f}")
    print(f"{(table.status == 'unlearned').sum()} of {len(table)} unlearned")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()

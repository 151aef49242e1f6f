"""Forget every style and ten things of the miniature UnlearnCanvas, one after the other, and print the table of that benchmark.

    python benchmarks/unlearn_canvas.py                                   # three seeds; goes on where it stopped
    python benchmarks/unlearn_canvas.py --seeds 0 --concepts blob cat     # a part of it
    python benchmarks/unlearn_canvas.py --seeds 0 --granularity siblings  # with an edit of several tensors
    python benchmarks/unlearn_canvas.py --direction covariance --curve path --layers "*.layers.0.self_attn.out_proj.weight"

UA: share of the pictures of prompts of the forgotten concept that the judge does not recognise as such. IRA: accuracy on the
prompts that are kept, of the concept's own kind (the other styles, if it is a style). CRA: of the other kind. All on report
data: seeds that the search has not drawn. `content`: how often the pictures of forgotten prompts still show the other half of
the prompt (the cat of "cat in blob style"). `FID` compares the pictures of kept prompts, after and before, with real ones; its
features are those of the miniature's own judge of things, so that it compares with nothing but itself. Seconds are of one run
on this machine: the gradients; the search with the pictures it draws; all sampling, of search and report; and the whole run.
Memory is the process's peak; stored is the patch.

A concept holds if UA is at least 90 % while IRA and CRA are within 5 points of what they were.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import lightning.pytorch as pl
import pandas
import torch
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance

from slug_lightning import UnlearnPatch
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import CanvasDataModule
from slug_lightning.datamodules.demo.canvas import AMOUNT, canvas_drawings
from slug_lightning.datamodules.demo.emoji import caption_of, render
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.modules import EmbeddedCanvas
from slug_lightning.objective.metrics import TARGET_SLACK

STYLES = ["blob", "emojione", "firefox", "fluent", "noto"]
TEN = ["airplane", "bicycle", "cat", "cherries", "crown", "elephant", "guitar", "octopus", "rocket", "strawberry"]
IN_TURN = ["blob", "firefox", "fluent"]
"""Styles that are forgotten one after the other, each by a run on the model that the last one has left."""
RULES = {
    "direction": "where to go along a layer",
    "curve": "how the way goes on",
    "score": "which layers are searched",
    "choice": "which of the steps is taken",
}
"""Options of `SLUG` that take a name."""
OTHER = {"style": "thing", "thing": "style"}


class Features(torch.nn.Module):
    """What the judge of things makes of a picture, before it decides: `[B, 3, 32, 32]`, uint8, to `[B, 128]`."""

    num_features = 128

    def __init__(self, module: EmbeddedCanvas) -> None:
        super().__init__()
        self.judge = module.judges["thing"]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.judge.model.resnet(pictures.float() / 127.5 - 1).pooler_output.flatten(1)


class Drawn:
    """One picture of every prompt, to see what the report's accuracies do not tell."""

    def __init__(self, seed: int, steps: int) -> None:
        self.drawings = canvas_drawings()
        self.things = [self.drawings.thing_names[i] for i in self.drawings.things]
        self.styles = [self.drawings.style_names[i] for i in self.drawings.styles]
        self.batch = {
            "text": [caption_of(self.drawings, row) for row in range(len(self.things))],
            "seed": torch.arange(len(self.things)) + 1_000_000 * (seed + 1),
            "steps": torch.full((len(self.things),), steps),
        }
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.cat([render(self.drawings.pictures, generator, AMOUNT) for _ in range(10)])
        self.real = interpolate(drawn, size=(32, 32), mode="area").clamp(-1, 1)

    def asks_for(self, kind: str, concept: str) -> torch.Tensor:
        """Which prompts name the concept."""
        return torch.tensor([name == concept for name in (self.styles if kind == "style" else self.things)])

    def measure(self, module: EmbeddedCanvas, kind: str, concept: str) -> dict[str, float]:
        """`content` of the forgotten prompts, `FID` of the others."""
        pictures = module.draw(self.batch)
        gone = self.asks_for(kind, concept)
        other = OTHER[kind]
        right = module.judge(pictures)[other] == getattr(self.drawings, f"{other}s")
        fid = FrechetInceptionDistance(Features(module), input_img_size=(3, 32, 32))
        fid.update(_bytes(self.real[~gone.repeat(10)]), real=True)
        fid.update(_bytes(pictures[~gone]), real=False)
        return {"content": right[gone].float().mean().item(), "FID": fid.compute().item()}


def _bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Watched(EmbeddedCanvas):
    """Counts the seconds that drawing takes."""

    sampling = 0.0

    def draw(self, batch: dict) -> torch.Tensor:
        start = time.perf_counter()
        pictures = super().draw(batch)
        self.sampling += time.perf_counter() - start
        return pictures


def run(module: Watched, kind: str, concept: str, seed: int, options: argparse.Namespace) -> tuple[dict, UnlearnPatch | None]:
    """Forget one concept; the edit stays."""
    counts = {"search_pictures": options.search_pictures, "report_pictures": options.report_pictures}
    steps = {"search_steps": options.search_steps, "report_steps": options.report_steps}
    data = CanvasDataModule(**{kind: concept}, seed=seed, **counts, **steps)
    callback = UnlearnCallback(
        near_retain=None,  # `near.py` measures it
        method=SLUG(
            options.layers,
            options.granularity,
            max_evaluations=options.evaluations,
            step_margin=options.margin,
            **{name: getattr(options, name) for name in RULES},
        ),
        forget_target=options.target,
        retain_tolerance=options.tolerance,
        runtime=Runtime(replay=False),  # the text encoder comes first, so that nothing that is drawn is spared
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    module.sampling = 0.0
    pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **quiet).fit(module, data)
    report = callback.report
    seconds = report.cost["seconds"]
    own, other = f"{kind}_accuracy", f"{OTHER[kind]}_accuracy"
    before, after = report.before, report.after
    line = {
        "layer": report.layer,
        "relative step": report.relative_step,
        "status": report.status,
        "UA": 1 - after["forget"]["accuracy"],
        "IRA": after["retain"][own],
        "CRA": after["retain"][other],
        "UA before": 1 - before["forget"]["accuracy"],
        "IRA before": before["retain"][own],
        "CRA before": before["retain"][other],
        "gradient s": seconds["gradients"],
        "search s": seconds["search"],
        "all s": sum(seconds.values()),
        "sampling s": module.sampling,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "stored MB": 0.0 if report.patch is None else sum(t.nbytes for t in _tensors(report.patch)) / 1e6,
        "evaluations": report.cost["evaluations"],
    }
    line["holds"] = holds(line)
    return line, report.patch


def holds(line: dict) -> bool:
    """Whether enough was forgotten, and enough kept."""
    kept = all(line[name] >= line[f"{name} before"] - 0.05 - TARGET_SLACK for name in ("IRA", "CRA"))
    return line["UA"] >= 0.9 - TARGET_SLACK and kept


def _tensors(patch: UnlearnPatch) -> list[torch.Tensor]:
    return [*patch.base.values(), *(t for edit in patch.edits for t in edit.directions.values())]


def alone(kind: str, concept: str, seed: int, options: argparse.Namespace) -> dict:
    """One concept, of the model as it ships."""
    module = Watched(options.objective)
    drawn = Drawn(seed, options.report_steps)
    before = drawn.measure(module, kind, concept)
    line, patch = run(module, kind, concept, seed, options)
    after = drawn.measure(module, kind, concept)
    if patch is not None and options.patches:
        patch.save(options.output.parent / f"canvas-{concept}-{seed}.safetensors")
    return line | {f"{name} before": value for name, value in before.items()} | after


def in_turn(seed: int, options: argparse.Namespace) -> dict:
    """Three styles, one after the other; all are measured at the end, on one picture of every prompt."""
    module = Watched(options.objective)
    drawn = Drawn(seed, options.report_steps)
    gone = torch.stack([drawn.asks_for("style", style) for style in IN_TURN]).any(0)

    def accuracies() -> dict[str, float]:
        seen = module.judge(module.draw(drawn.batch))
        style, thing = seen["style"] == drawn.drawings.styles, seen["thing"] == drawn.drawings.things
        shares = {"UA": ~style[gone], "IRA": style[~gone], "CRA": thing[~gone], "content": thing[gone]}
        return {name: share.float().mean().item() for name, share in shares.items()}

    before = accuracies()
    lines = [run(module, "style", style, seed, options)[0] for style in IN_TURN]
    after = accuracies()
    names = ("gradient s", "search s", "all s", "sampling s", "stored MB", "evaluations")
    line = {"layer": ", ".join(str(one["layer"]) for one in lines), "status": ", ".join(one["status"] for one in lines)}
    line |= after | {f"{name} before": value for name, value in before.items()} | {n: sum(one[n] for one in lines) for n in names}
    return line | {"peak GB": lines[-1]["peak GB"], "holds": holds(line)}


def table(lines: list[dict]) -> str:
    """Mean ± standard deviation over seeds, of every concept and of each kind."""
    percent = ["UA", "IRA", "CRA", "IRA before", "CRA before", "content"]
    frame = pandas.DataFrame(lines)
    frame = frame.reindex(columns=frame.columns.union(percent, sort=False))  # all runs may have failed
    frame[percent] = frame[percent] * 100
    shown = [*percent, "FID before", "FID", "gradient s", "search s", "sampling s", "all s", "peak GB", "stored MB"]
    rows = {}

    def row(name: str, part: pandas.DataFrame) -> None:
        numbers = {column: f"{part[column].mean():.3g} ± {part[column].std():.2g}" for column in shown if column in part}
        rows[name] = numbers | {"holds": f"{int(part['holds'].sum())} of {len(part)}"}

    for (kind, concept), part in frame.groupby(["kind", "concept"], sort=False):
        row(f"{concept} ({kind})", part)
    for kind, part in frame[frame.kind != "in turn"].groupby("kind", sort=False):
        row(f"**all {kind}s**", part)
    return pandas.DataFrame(rows).T.to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    every = [*STYLES, *TEN, "in turn"]
    parser.add_argument("--concepts", nargs="+", default=every, choices=every, metavar="NAME", help="styles, things, 'in turn'")
    parser.add_argument("--objective", default="clip", choices=["denoising", "clip"], help="(default: %(default)s)")
    parser.add_argument(
        "--granularity", default="tensor", choices=["tensor", "module", "siblings"], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--layers", nargs="+", default="*", help="patterns of tensors to edit (default: those of the text encoder)"
    )
    for name, words in RULES.items():
        parser.add_argument(f"--{name}", default=getattr(SLUG.paper(), name), help=f"{words} (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.05, help="accuracy at which it is forgotten (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of what is kept (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=10, help="for each layer (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.2, help="beyond the smallest step (default: %(default)s)")
    parser.add_argument("--search-pictures", type=int, default=40, help="of a concept (default: %(default)s)")
    parser.add_argument("--report-pictures", type=int, default=40, help="of a concept (default: %(default)s)")
    parser.add_argument("--search-steps", type=int, default=6, help="of sampling (default: %(default)s)")
    parser.add_argument("--report-steps", type=int, default=10, help="of sampling (default: %(default)s)")
    parser.add_argument("--patches", action="store_true", help="also keep the patches, beside the output")
    parser.add_argument("--output", type=Path, default=Path("runs/unlearn_canvas.jsonl"), help="(default: %(default)s)")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("seeds", "concepts", "output", "patches")}
    for seed in options.seeds:
        for concept in options.concepts:
            kind = "in turn" if concept == "in turn" else "style" if concept in STYLES else "thing"
            own = {"kind": kind, "concept": " → ".join(IN_TURN) if kind == "in turn" else concept, "seed": seed, "options": asked}
            if any(own.items() <= done.items() for done in _lines(options.output)):
                continue
            try:
                found = in_turn(seed, options) if kind == "in turn" else alone(kind, concept, seed, options)
            except UnlearnError as error:  # the other lines count all the same
                found = {"status": f"failed: {error}", "holds": False}
            with options.output.open("a") as file:
                file.write(json.dumps(own | found) + "\n")
            print(json.dumps(own | found), flush=True)
    text = table([line for line in _lines(options.output) if line["options"] == asked])
    options.output.with_suffix(".md").write_text(text + "\n")
    print(text)


def _lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()

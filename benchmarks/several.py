"""Forget ten things of the embedded CLIP in one run, for five draws of things; then an eleventh, later.

    python benchmarks/several.py                    # five draws of ten, into runs/several_ten.json; goes on where it stopped
    python benchmarks/several.py --seeds 1 --later  # one draw, and the eleventh
    python benchmarks/several.py --seeds 4 --rules sparing --margin 0

`paper` edits either tower along raw gradients; `sparing` one matrix of the text tower, along paths of the covariance direction.
The matrix was chosen on seed 4, which isn't among its draws.

The things of a draw are drawn by a fixed seed from all 234. Accuracies are those on report data. `ratio` is what the run
cost beside the forget pass of one thing, the retain pass, and the evaluation that one thing cannot do without (search data
once, report data before and after), in floating-point operations, counted. For the eleventh, it is beside its own forget
pass and evaluation, as the gradient of what is kept and its measurement before any edit are taken from the first run.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pandas
import torch
from things import evaluation

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.clip.models import contrastive_loss, matching_loss
from slug_lightning.datamodules import EmojiDataModule
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.modules import EmbeddedClip
from slug_lightning.reports.cost import flop_counter
from slug_lightning.tensors.bits import bitwise_equal

MORE = 0.03
"""How much more may be lost of what is kept for the sake of a later request."""


RULES = {
    "paper": partial(SLUG.paper, max_evaluations=12),
    "sparing": partial(
        SLUG,
        "model.transformer.resblocks.0.mlp.c_proj.weight",
        direction="covariance",
        curve="path",
        max_evaluations=12,
    ),
}


def run(module: EmbeddedClip, forget: dict, retain: EmojiDataModule, folder: Path, tolerance: float, method: SLUG, **options):
    """One run; the module is as before afterwards."""
    callback = UnlearnCallback(
        near_retain=None,  # `near.py` measures it
        forget=forget,
        retain=retain,
        forget_metric="thing_accuracy",
        retain_metric=["style_accuracy", "thing_accuracy"],
        retain_tolerance=tolerance,
        method=method,
        runtime=Runtime(count_cost=True, retain_cache=str(folder / "retain")),
        output_dir=str(folder / "run"),
        **options,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=[callback], **quiet).fit(module, retain)
    report = callback.report
    if report.patch is not None:
        report.patch.revert(module.model)
    return report


def passes(module: EmbeddedClip, data: EmojiDataModule, concept: str) -> dict[str, int]:
    """FLOPs of one concept's forget pass, of the retain pass, and of one concept's evaluation."""
    flops = {}
    loaders = {"forget": data.forget_dataloader("train", concept), "retain": data.retain_dataloader("train")}
    for (kind, loader), loss in zip(loaders.items(), (matching_loss, contrastive_loss), strict=True):
        with flop_counter() as counter:
            for batch in loader:
                loss(module.model, batch).backward()
        flops[kind] = counter.get_total_flops()
    module.zero_grad()
    of_split = {split: [data.forget_dataloader(split, concept), data.retain_dataloader(split)] for split in ("val", "test")}
    return flops | {"evaluation": evaluation(module, of_split)}


def draw(seed: int, count: int, tolerance: float, method: SLUG, later: bool) -> dict:
    """One draw: the run, and what came of it."""
    names = load_drawings().thing_names
    chosen = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[: count + 1]]
    *things, eleventh = chosen
    data = EmojiDataModule(thing=things, seed=seed)
    data.setup("fit")
    module = EmbeddedClip().eval()
    needed = passes(module, data, things[0])
    with tempfile.TemporaryDirectory() as folder:
        report = run(module, dict.fromkeys(things, data), data, Path(folder), tolerance, method)
        print(report.to_text(width=180), flush=True)
        line = told(seed, report) | {"ratio": sum(report.cost["flops"].values()) / sum(needed.values())}
        line["phases"] = {phase: flops / sum(needed.values()) for phase, flops in report.cost["flops"].items()}
        if later:
            line["later"] = one_more(module, report, things, eleventh, data, Path(folder), tolerance, method, needed)
    return line


def told(seed: int, report) -> dict:
    """What counts of a report."""
    forget = report.after["forget"]
    target = next(iter(report.concepts.values())).bounds["forget_target"]
    lost = {f"{name} lost": report.before["retain"][name] - report.after["retain"][name] for name in report.before["retain"]}
    return {
        "seed": seed,
        "unlearned": len(report.unlearned),
        "at chance": sum(value <= target + 1e-6 for value in forget.values()),
        "before": sum(report.before["forget"].values()) / len(forget),
        "after": sum(forget.values()) / len(forget),
        "worst": max(forget.values()),
        **lost,
        "rounds": len(report.rounds),
        "seconds": sum(report.cost["seconds"].values()),
    }


def one_more(module, report, things, eleventh, data, folder, tolerance, method, needed) -> dict:
    """The eleventh thing beside the ten, and the same from the start."""
    another = EmojiDataModule(thing=eleventh, seed=data.seed)
    another.setup("fit")
    forget = dict.fromkeys(things, data) | {eleventh: another}
    # What was left out of the first run is not asked for again.
    beside = {name: source for name, source in forget.items() if name in report.unlearned or name == eleventh}
    # What one more costs adds to what the others have cost, which the first run was free to spend.
    found = run(module, beside, data, folder, tolerance + MORE, method, earlier=str(folder / "run"))
    whole = run(module, beside, data, folder, tolerance + MORE, method)
    same = {
        name: (found.concepts[name].layer, found.concepts[name].step_size)
        == (whole.concepts[name].layer, whole.concepts[name].step_size)
        for name in beside
    }
    equal = found.patch is not None and whole.patch is not None and found.tensors == whole.tensors
    if equal and all(same.values()):
        made = [dict(module.model.state_dict()) for _ in range(2)]
        made = [{name: tensor.clone() for name, tensor in weights.items()} for weights in made]
        for weights, one in zip(made, (found, whole), strict=True):
            one.patch.apply(weights)
        equal = all(bitwise_equal(made[0][name], made[1][name]) for name in made[0])
    cost = sum(found.cost["flops"].values())
    return {
        "status": found.status,
        "thing": eleventh,
        "after": found.after["forget"][eleventh],
        "ratio": cost / (needed["forget"] + needed["evaluation"]),
        "phases": {phase: flops / (needed["forget"] + needed["evaluation"]) for phase, flops in found.cost["flops"].items()},
        "notes": [note for note in found.notes if note.startswith("retain")],
        "same layer and step": same,
        "equal bits": bool(equal and all(same.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many draws (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="things in a draw (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of what is kept (default: %(default)s)")
    parser.add_argument("--rules", default="paper", choices=list(RULES), help="(default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.2, help="beyond the smallest step (default: %(default)s)")
    parser.add_argument("--later", action="store_true", help="also forget one more thing, beside the others, in each draw")
    parser.add_argument("--output", type=Path, default=Path("runs/several_ten.json"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    lines = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(arguments, name) for name in ("rules", "margin", "count", "tolerance")}
    for seed in range(arguments.seeds):
        if any((asked | {"seed": seed}).items() <= line.items() for line in lines):
            continue
        method = RULES[arguments.rules](step_margin=arguments.margin)
        lines.append(asked | draw(seed, arguments.count, arguments.tolerance, method, arguments.later))
        print(json.dumps(lines[-1]), flush=True)
        arguments.output.write_text(json.dumps(lines, indent=2) + "\n")
    shown = pandas.DataFrame([line for line in lines if asked.items() <= line.items()])
    table = shown.drop(columns=[*asked, "phases", "later"], errors="ignore")
    print(table.to_markdown(index=False, floatfmt=".3g"))
    print(table.drop(columns="seed").agg(["mean", "std"]).to_markdown(floatfmt=".3g"))


if __name__ == "__main__":
    main()

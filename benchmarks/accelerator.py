"""Forget on an accelerator in three precisions: what each phase costs, and whether all choose the same layer.

    python benchmarks/accelerator.py                                       # ViT-L/14, 8,000 and 1,000 pairs, on CUDA
    python benchmarks/accelerator.py --precision bf16-mixed --workers 4    # fp32 and bf16 only; four processes read

Without an accelerator a small case runs, a tiny CLIP and a few hundred pairs. It shows that all of this works, and
compares the layers as well; its seconds say nothing about large models.

An open_clip model with random weights forgets through `UnlearnCallback` inside a Trainer, anew in each precision. Retain
data are coarse noise with random words; forget data are noise around one picture, with words that retain data never use.
Search and report data are 5/36 of the gradient's data each, so that at the default sizes retain : forget : evaluation =
8 : 1 : 2.5, as in the paper. The metrics are the losses. The target is the forget loss of the search data in fp32, before
anything, plus `RISE`, the same for every precision; the retain loss may double, so that every layer that forgets competes.
None of this was chosen by looking at which layer wins.

`bare pass` is one forward and backward over the gradient's data in the same precision and batches, by a plain loop in this
process, after a warm-up. The phases are those of the report's `cost`; `fit` is the whole `Trainer.fit`, from outside. The
exit code is 1 if a precision chooses another layer than fp32, unless a note of its report says that two layers are closer
than the precision's own error, or if a run finds no layer at all.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import open_clip
import pandas
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, StackDataset, default_collate

from slug_lightning import UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.methods import SLUG
from slug_lightning.modules import ClipModule

REFERENCE = "32-true"
DTYPES = {REFERENCE: torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
RISE = 0.05
"""How far the forget loss, 1 - cosine, must rise: as in search_cost.py."""
GRID = 16
"""Pictures have so many blocks of one colour a side: a whole set is small, and is enlarged as it is read."""


def make_module(name: str) -> ClipModule:
    """An open_clip model by name, or "tiny", with three blocks a tower: half precision on a CPU takes its time."""
    torch.manual_seed(0)
    if name != "tiny":
        return ClipModule(name)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 512, "width": 64, "heads": 4, "layers": 3}
    return ClipModule(open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text))


def make_data(module: ClipModule, forget: int, retain: int, batch_size: int, workers: int) -> UnlearnDataModule:
    """Six sets, drawn by a fixed seed: as many pairs as asked for, and 5/36 of that for search and report each."""
    model: Any = module.model
    generator = torch.Generator().manual_seed(1)
    length, vocabulary = len(model.positional_embedding), model.token_embedding.num_embeddings
    picture = torch.randn(3, GRID, GRID, generator=generator)

    def pairs(count: int, contrast: float, words: tuple[int, int]) -> Dataset:
        image = contrast * picture + torch.randn(count, 3, GRID, GRID, generator=generator)
        text = torch.randint(*words, (count, length), generator=generator)
        text[:, length // 2] = vocabulary - 1  # where the text ends
        return StackDataset(image=image, text=text)

    few = vocabulary // 10
    kinds = {"forget": (forget, 1.0, (1, few)), "retain": (retain, 0.0, (few, vocabulary - 1))}
    sets: dict[str, Any] = {
        kind + part: pairs(max(1, round(share * count)), contrast, words)
        for kind, (count, contrast, words) in kinds.items()
        for part, share in (("", 1), ("_val", 5 / 36), ("_test", 5 / 36))
    }
    collate = partial(enlarged, size=model.visual.image_size)
    return UnlearnDataModule(**sets, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def enlarged(samples: list[dict[str, Tensor]], size: int | tuple[int, int]) -> dict[str, Tensor]:
    """A batch with pictures of the size that the model takes."""
    batch = default_collate(samples)
    return batch | {"image": interpolate(batch["image"], size=size)}


def first_loss(module: ClipModule, data: UnlearnDataModule, device: torch.device) -> float:
    """The forget loss on search data, in fp32, which the target is set by."""
    module.to(device).eval()
    batches = [move_data_to_device(batch, device) for batch in data.forget_dataloader("val")]
    with torch.no_grad():
        total = sum(module.forget_step(batch, 0).item() * len(batch["text"]) for batch in batches)
    return total / sum(len(batch["text"]) for batch in batches)


def bare_pass(module: ClipModule, data: UnlearnDataModule, device: torch.device, precision: str) -> tuple[float, int | None]:
    """Seconds of one forward and backward over forget and retain data, and the peak of the device's memory."""
    module.to(device).eval()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")

    def differentiate(step: Callable[[Any, int], Tensor], batch: Any) -> None:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != REFERENCE):
            loss = step(move_data_to_device(batch, device), 0)
        scaler.scale(loss).backward()
        module.zero_grad(set_to_none=True)

    kinds = (module.forget_step, data.forget_dataloader("train")), (module.retain_step, data.retain_dataloader("train"))
    for step, loader in kinds:
        differentiate(step, next(iter(loader)))
    start = now(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step, loader in kinds:
        for batch in told(loader, f"{precision}: bare pass, {step.__name__}"):
            differentiate(step, batch)
    return now(device) - start, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def told(loader: DataLoader, words: str) -> Iterator[Any]:
    """The batches of a loader, with a line every ten seconds."""
    last = time.monotonic()
    for number, batch in enumerate(loader, 1):
        yield batch
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{words}: {number} of {len(loader)} batches", flush=True)


def forget(
    module: ClipModule, data: UnlearnDataModule, target: float, device: torch.device, precision: str
) -> tuple[UnlearnReport, float]:
    """Forget once; the model is as before afterwards. Gives the report, and the seconds of the whole fit."""
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and device.type == "cpu":  # Lightning would silently take bf16 instead
        options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = UnlearnCallback(near_retain=None, method=SLUG.paper(), forget_target=target, retain_tolerance=1.0)
    options |= {"accelerator": device.type, "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=[callback], **options)
    start = now(device)
    trainer.fit(module, data)
    seconds = now(device) - start
    report = callback.report
    assert report is not None
    if report.patch is not None:
        report.patch.revert(module.model)
    return report, seconds


def measure(module: ClipModule, data: UnlearnDataModule, target: float, device: torch.device, precision: str) -> dict:
    """All figures of one precision."""
    print(f"{precision}: bare pass", flush=True)
    bare, bare_bytes = bare_pass(module, data, device, precision)
    print(f"{precision}: bare pass {bare:.1f} s; now forgetting, whose gradients take about as long", flush=True)
    report, fit = forget(module, data, target, device, precision)
    return {
        "precision": precision,
        "status": report.status,
        "layer": report.layer,
        "relative step": report.relative_step,
        "front layers": sum(score["on_front"] for score in report.scores),
        "holds": report.holds,
        "before": report.before,
        "after": report.after,
        "seconds": report.cost["seconds"],
        "peak bytes": report.cost["peak_bytes"],
        "bare pass seconds": bare,
        "bare pass peak bytes": bare_bytes,
        "fit seconds": fit,
        "phases / bare pass": sum(report.cost["seconds"].values()) / bare,
        "fit / bare pass": fit / bare,
        "notes": report.notes,
    }


def problems(runs: list[dict]) -> list[str]:
    """What is wrong with the chosen layers; the first run has the right one."""
    found = [f"{run['precision']}: {run['status']}, no layer was chosen" for run in runs if run["layer"] is None]
    right = runs[0]["layer"]
    for run in runs[1:]:
        excused = any(note.startswith("precision:") for note in run["notes"])
        if None not in (right, run["layer"]) and run["layer"] != right and not excused:
            found.append(f"{run['precision']}: chose {run['layer']}, {runs[0]['precision']} chose {right}")
    return found


def to_table(runs: list[dict]) -> str:
    """One row a precision; seconds, and memory in GB, of each phase."""
    rows = [
        {key: run[key] for key in ("precision", "status", "layer", "relative step", "front layers")}
        | {f"{phase}, s": seconds for phase, seconds in run["seconds"].items()}
        | {"bare pass, s": run["bare pass seconds"], "fit, s": run["fit seconds"]}
        | {f"{phase}, GB": peak / 1e9 for phase, peak in run["peak bytes"].items()}
        | {"bare pass, GB": run["bare pass peak bytes"] / 1e9 if run["bare pass peak bytes"] else None}
        | {key: run[key] for key in ("phases / bare pass", "fit / bare pass")}
        for run in runs
    ]
    return pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".3g")


def parse(large: bool) -> argparse.Namespace:
    model, forget, retain, batch_size = ("ViT-L-14", 1000, 8000, 64) if large else ("tiny", 64, 512, 32)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "(default on this machine: %(default)s)"
    parser.add_argument("--model", default=model, help=f'an open_clip model by name, or "tiny" {here}')
    parser.add_argument("--retain", type=int, default=retain, help=f"pairs to keep, for the gradient {here}")
    parser.add_argument("--forget", type=int, default=forget, help=f"pairs to forget, for the gradient {here}")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"pairs in a batch {here}")
    which = f"which to run (default: all); {REFERENCE}, which the others are compared with, runs in any case, and first"
    parser.add_argument("--precision", nargs="+", default=list(DTYPES), choices=list(DTYPES), help=which)
    workers = "processes that read a set; they start anew for each of the search's evaluations (default: %(default)s)"
    parser.add_argument("--workers", type=int, default=0, help=workers)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerator.json"), help="JSON (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = parse(device.type == "cuda")
    warnings.filterwarnings("ignore", module="lightning")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(name if device.type == "cuda" else "No accelerator: a small case on the CPU; memory is the whole process's", flush=True)

    module = make_module(arguments.model)
    data = make_data(module, arguments.forget, arguments.retain, arguments.batch_size, arguments.workers)
    target = first_loss(module, data, device) + RISE
    asked = {option.replace("_", " "): value for option, value in vars(arguments).items() if option != "output"}
    result = {"device": name, "torch": torch.__version__} | asked
    result |= {"parameters": sum(p.numel() for p in module.parameters()), "pairs": data.notes, "forget target": target}
    print(json.dumps(result, indent=2), flush=True)

    runs: list[dict] = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for precision in [REFERENCE, *(p for p in arguments.precision if p != REFERENCE)]:
        runs.append(measure(module, data, target, device, precision))
        print(json.dumps(runs[-1], indent=2), flush=True)
        result |= {"runs": runs, "problems": problems(runs)}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")  # already now: the next run may fail

    print(to_table(runs))
    notes = [f"{run['precision']}: {note}" for run in runs for note in run["notes"] if note.startswith("precision:")]
    verdict = result["problems"] or ["Every precision chose the layer of fp32, or its note says why not."]
    print("\n".join(["", *notes, *verdict]))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

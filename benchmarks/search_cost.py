"""What forgetting costs beside the one pass that nothing can avoid; print a table and write JSON.

    python benchmarks/search_cost.py                      # every model that this machine can run
    python benchmarks/search_cost.py --models ViT-B-32    # one of them

Each model forgets with replay and without, from the same data, and must end at the same layer, step and bits; the second
run takes the retain gradient over from the first, and is charged for it. `lower bound` is one plain forward and backward pass
over forget and retain data, run for nothing else. `released` is what the released procedure's shape costs on the same
data: the pass, and for every layer of the front ten full evaluations of a deep copy of the model. One such evaluation is
run and counted, and multiplied; it is given twice, with evaluations of the forget and retain data, and with evaluations of
the evaluation data alone. Whole runs of other rules (`SPARING`) are given relative to the same pass, in which none of their
statistics and paths are.

Sizes are retain : forget : evaluation = 8 : 1 : 2.5, as in the paper. The evaluation data are divided into search and
report data, and each of these 1 : 8 into forget and retain. Random weights, except for the embedded CLIP: what a model
knows does not change what a pass costs.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pandas
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset

from slug_lightning import RetainCache, UnlearnModule, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.demo.emoji import emoji_pairs
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.modules import ClipModule, EmbeddedClip
from slug_lightning.reports.cost import CostMeter, flop_counter

BUDGET = 2**28
"""Bytes that replay may keep."""
DRAWN = 10
"""Evaluations of a layer in the released procedure."""


FEW = ["model.visual.proj", "model.text_projection", "model.transformer.resblocks.0.*"]
"""Both projections and the first block of the text tower: of open_clip's models, six matrices."""
SMALLEST = {"max_evaluations": 6, "step_margin": 0.0}
SPARING = {
    "default": SLUG(),
    "line and path, six layers": SLUG(FEW, **SMALLEST),
    "line and path, all": SLUG(**SMALLEST),
    "line, no front, six layers": SLUG(FEW, curve="line", front=False, **SMALLEST),
    "line, no front, all": SLUG(curve="line", front=False, **SMALLEST),
}
"""Rules whose whole runs are compared with the pass, too, for models with such layers; "all" is their own short list."""


class Case(NamedTuple):
    """A model, its data, and what the callback is told. `forget` and `retain` make data sets of a given size."""

    module: pl.LightningModule
    forget: Callable[[int], Dataset]
    retain: Callable[[int], Dataset]
    options: dict
    scale: int = 1
    """So many times as many samples, and as large batches: a small model is measured on more."""


def random_clip(name: str) -> Case:
    """An open_clip model with random weights: forget a picture in noise that goes with a few words."""
    module = ClipModule(name)
    size = module.model.visual.image_size
    pixels = size if isinstance(size, int) else size[0]
    generator = torch.Generator().manual_seed(1)

    picture = torch.randn(3, pixels, pixels, generator=generator)

    def pairs(count: int, words: tuple[int, int], contrast: float) -> Dataset:
        image = contrast * picture + torch.randn(count, 3, pixels, pixels, generator=generator)
        text = torch.randint(*words, (count, 77), generator=generator)
        text[:, 20] = 49407  # where the text ends
        return StackDataset(image=image, text=text)

    return Case(module, lambda n: pairs(n, (1, 100), 1.0), lambda n: pairs(n, (100, 49000), 0.0), {"rise": 0.05})


def embedded_clip() -> Case:
    """The CLIP that ships with the package forgets the blob style, and means it."""
    drawings = load_drawings()
    generator = torch.Generator().manual_seed(1)
    blob = drawings.styles == drawings.style_names.index("blob")

    def rows(concept: bool, count: int) -> Tensor:
        chosen = (blob == concept).nonzero()[:, 0]
        return chosen[torch.randint(len(chosen), (count,), generator=generator)]

    def forget(count: int) -> Dataset:
        return emoji_pairs(drawings, rows(True, count), generator, thing=False, style=True)

    def retain(count: int) -> Dataset:
        others = emoji_pairs(drawings, rows(False, count - count // 3), generator, thing=True, style=True)
        return ConcatDataset([others, emoji_pairs(drawings, rows(True, count // 3), generator, thing=True, style=False)])

    return Case(EmbeddedClip(), forget, retain, {"retain_tolerance": 0.05}, scale=4)


def llama() -> Case:
    """Twelve layers of a Llama: forget passages of few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=128,
        use_cache=False,
    )
    module = UnlearnModule(LlamaForCausalLM(config), loss=lambda model, batch: model(**batch, labels=batch["input_ids"]).loss)
    generator = torch.Generator().manual_seed(1)

    def passages(count: int, tokens: tuple[int, int]) -> Dataset:
        return StackDataset(input_ids=torch.randint(*tokens, (count, 64), generator=generator))

    return Case(module, lambda n: passages(n, (0, 64)), lambda n: passages(n, (64, 2048)), {"rise": 0.3})


def resnet() -> Case:
    """A ResNet-18 of ten classes: forget one."""
    from torchvision.models import resnet18

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    generator = torch.Generator().manual_seed(1)

    classes = torch.randn(10, 3, 128, 128, generator=generator)

    def images(count: int, labels: tuple[int, int]) -> Dataset:
        label = torch.randint(*labels, (count,), generator=generator)
        return StackDataset(image=classes[label] + torch.randn(count, 3, 128, 128, generator=generator), label=label)

    module = UnlearnModule(resnet18(num_classes=10), loss=loss)
    return Case(module, lambda n: images(n, (0, 1)), lambda n: images(n, (1, 10)), {"rise": 0.5})


MODELS: dict[str, Callable[[], Case]] = {
    "ViT-B-32": lambda: random_clip("ViT-B-32"),
    "RN50": lambda: random_clip("RN50"),
    "embedded CLIP": embedded_clip,
    "Llama, 12 layers": llama,
    "ResNet-18": resnet,
    "ViT-L-14": lambda: random_clip("ViT-L-14"),
}
LARGE = {"ViT-L-14"}
CLIPS = {"ViT-B-32", "embedded CLIP", "ViT-L-14"}
"""Models with two towers of transformer blocks, named as in open_clip."""


def evaluation_data(case: Case, forget: int, batch_size: int) -> UnlearnDataModule:
    """Retain : forget : evaluation = 8 : 1 : 2.5."""
    evaluation = round(2.5 * forget)
    few = max(1, evaluation // 18)
    many = evaluation // 2 - few
    return UnlearnDataModule(
        case.forget(forget),
        case.retain(8 * forget),
        forget_val=case.forget(few),
        forget_test=case.forget(few),
        retain_val=case.retain(many),
        retain_test=case.retain(many),
        batch_size=batch_size,
    )


def loader(data: UnlearnDataModule, kind: str, split: str) -> DataLoader:
    return data.forget_dataloader(split) if kind == "forget" else data.retain_dataloader(split)


def run(
    case: Case,
    data: UnlearnDataModule,
    target: float | None,
    cache: RetainCache | None,
    replay: bool = True,
    method: SLUG | None = None,
    near: str | None = None,
) -> tuple[UnlearnReport, dict]:
    """Forget once; the model is as before afterwards. Gives the report and the weights."""
    options = {"retain_tolerance": 1.0} | {name: value for name, value in case.options.items() if name != "rise"}
    callback = UnlearnCallback(
        near_retain=near,
        forget_target=target,
        method=method or SLUG.paper(),
        runtime=Runtime(replay=replay, replay_budget=BUDGET, count_cost=True, retain_cache=cache),
        **options,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=1, devices=1, num_sanity_val_steps=0, callbacks=[callback], **quiet).fit(case.module, data)
    report = callback.report
    assert report is not None
    weights = {name: tensor.clone() for name, tensor in case.module.state_dict().items()}
    if report.patch is not None:
        report.patch.revert(case.module.model)
    return report, weights


def plain_pass(case: Case, data: UnlearnDataModule, device: torch.device) -> dict[str, float]:
    """What the pass costs that nothing can avoid: forward and backward over forget and retain data, keeping no gradient.

    Its peak is that of activations and workspace alone.
    """
    module = copy.deepcopy(case.module).to(device).eval()
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    meter = CostMeter(device, count=True)
    with meter.phase("pass"):
        for kind in ("forget", "retain"):
            step = module.forget_step if kind == "forget" else module.retain_step
            for number, batch in enumerate(loader(data, kind, "train")):
                step(move_data_to_device(batch, device), number).backward()
    return {name: by_phase["pass"] for name, by_phase in meter.report().items() if "pass" in by_phase}


def released_evaluation(case: Case, data: UnlearnDataModule, splits: list[str], device: torch.device) -> tuple[int, float]:
    """FLOPs and seconds of one evaluation of a deep copy."""
    start = time.perf_counter()
    module = copy.deepcopy(case.module).to(device).eval()
    with torch.no_grad(), flop_counter() as flops:
        for kind in ("forget", "retain"):
            step = module.validation_step if module.forget_metric else getattr(module, f"{kind}_step")
            module.log = lambda *_, **__: None  # type: ignore[method-assign]
            for split in splits:
                for number, batch in enumerate(loader(data, kind, split)):
                    step(move_data_to_device(batch, device), number)
    return flops.get_total_flops(), time.perf_counter() - start


def first_loss(case: Case, data: UnlearnDataModule) -> float:
    """The forget loss on search data, which the target is set by."""
    module = copy.deepcopy(case.module).eval()
    batches = loader(data, "forget", "val")
    with torch.no_grad():
        total = sum(module.forget_step(batch, 0).item() * len(next(iter(batch.values()))) for batch in batches)
    return total / len(batches.dataset)


def measure(name: str, forget: int, batch_size: int) -> dict:
    """All figures of one model."""
    torch.manual_seed(0)
    case = MODELS[name]()
    data = evaluation_data(case, forget * case.scale, batch_size * case.scale)
    target = first_loss(case, data) + case.options["rise"] if "rise" in case.options else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bound = plain_pass(case, data, device)
    cache = RetainCache()
    ours, weights = run(case, data, target, cache, replay=True)
    plain, twin = run(case, data, target, cache, replay=False)
    assert cache.reused == 1
    for key in ("flops", "seconds"):  # what the second run would have paid for the pass as well
        plain.cost[key]["gradients"] = ours.cost[key]["gradients"]
    layers = sum(score["on_front"] for score in ours.scores)
    figures = {
        "model": name,
        "samples": {
            f"{kind} {split}": len(loader(data, kind, split).dataset)
            for kind in ("forget", "retain")
            for split in ("train", "val", "test")
        },
        "front layers": layers,
        "status": ours.status,
        "layer": ours.layer,
        "relative step": ours.relative_step,
        "same layer and step": (ours.layer, ours.step_size) == (plain.layer, plain.step_size),
        "same bits": all(torch.equal(tensor, twin[name]) for name, tensor in weights.items()),
        "notes": [note for note in ours.notes if note.startswith("replay")],
    }
    for key in ("flops", "seconds"):
        figures |= {
            f"lower bound {key}": bound[key],
            f"ours {key}": ours.cost[key],
            f"ours / lower bound, {key}": sum(ours.cost[key].values()) / bound[key],
            f"without replay / lower bound, {key}": sum(plain.cost[key].values()) / bound[key],
        }
    for words, method in SPARING.items() if name in CLIPS else ():
        spared, _ = run(case, data, target, None, method=method, near="auto")
        figures[f"{words}: layer"] = spared.layer
        figures[f"{words}: phases"] = {phase: n / bound["flops"] for phase, n in spared.cost["flops"].items()}
        figures[f"{words} / lower bound, flops"] = sum(spared.cost["flops"].values()) / bound["flops"]
    for words, splits in (("forget and retain data", ["train"]), ("evaluation data", ["val", "test"])):
        once = dict(zip(("flops", "seconds"), released_evaluation(case, data, splits, device), strict=True))
        for key in once:
            cost = bound[key] + layers * DRAWN * once[key]
            figures[f"released on {words} / ours, {key}"] = cost / sum(ours.cost[key].values())
    candidates = 4 * sum(case.module.get_parameter(score["layer"]).numel() for score in ours.scores)
    extra = max(ours.cost["peak_bytes"].values()) - bound["peak_bytes"]
    figures |= {"extra bytes": extra, "candidates' bytes": candidates, "budget": BUDGET, "replay": ours.cost["replay"]}
    return figures | {"extra / (2 x candidates + budget)": extra / (2 * candidates + BUDGET)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL", help=", ".join(MODELS)
    )
    parser.add_argument("--forget", type=int, default=16, help="samples to forget; the rest follows (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/search_cost.json"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        if name in LARGE and not torch.cuda.is_available():
            print(f"{name}: skipped, it needs an accelerator")
            continue
        found[name] = measure(name, arguments.forget, arguments.batch_size)
        found[name]["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found[name], indent=2), flush=True)
    table = pandas.DataFrame([found[name] for name in arguments.models if name in found])
    columns = [
        "model",
        "front layers",
        "ours / lower bound, flops",
        "without replay / lower bound, flops",
        *(f"{words} / lower bound, flops" for words in SPARING),
        "released on forget and retain data / ours, flops",
        "released on evaluation data / ours, flops",
        "ours / lower bound, seconds",
        "same layer and step",
        "same bits",
        "extra / (2 x candidates + budget)",
    ]
    print(table[columns].to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    main()

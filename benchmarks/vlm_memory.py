"""How many bytes a vision-language model needs to forget, beside its weights; print both and write JSON.

    python benchmarks/vlm_memory.py                      # LLaVA-1.5-7B in fp16, one question a batch
    python benchmarks/vlm_memory.py --batch-size 2       # two

First a small LLaVA forgets on this machine, through `UnlearnCallback` inside a Trainer, and every tensor that is made in the
whole fit counts. `estimate` is what an instance of the same shape on the meta device says beforehand, where nothing is
computed; `bound` is 2.2 times the candidates in fp32 plus what one bare forward and backward pass over a batch takes. Then the
shape of LLaVA-1.5-7B is estimated in the same way. The candidates are all matrices of the vision tower. Weights are random:
what a model knows does not change what it takes. What replay keeps is bounded by its own budget, here one gradient of the
candidates.

The exit code is 1 if the run takes more than the bound or more than the estimate, or the large shape more than the card has.
"""

import argparse
import json
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas
import torch
from footprint import Footprint, footprint
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, default_collate
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from slug_lightning import UnlearnModule
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.distributed.strategy import only_differentiating
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.reports.cost import LiveTensors
from slug_lightning.tensors.layers import find_layers

TOWER = "model.vision_tower.*"
FACTOR = 2.2
"""Two gradients of the candidates, and a tenth of each for what is made in passing."""
SLACK = 1.02
"""An estimate leaves out the batch itself, and the few numbers that are logged."""
SMALL = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, image_size=32, patch_size=8
    ),
    text_config=LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
    ),
    image_token_index=299,
)
LARGE = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    ),
    text_config=LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, pad_token_id=0
    ),
    image_token_index=32000,
)
"""The shape of LLaVA-1.5-7B."""


def make_model(config: LlavaConfig, device: str, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, or with none on the meta device; only the tower may be edited."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(dtype)
    return model.requires_grad_(False)


def make_questions(
    config: LlavaConfig, count: int, words: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> StackDataset:
    """Noise as pictures, each with its place in a question and answer of so many words."""
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision_config
    places = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(1, config.image_token_id, (count, places + words), generator=generator)
    ids[:, 1 : places + 1] = config.image_token_id
    pictures = torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator).to(dtype)
    return StackDataset(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures)


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss, of all words alike."""
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A pass that keeps keys and values, as generation does at its last word."""
    return model(**batch, use_cache=True)


def estimate(config: LlavaConfig, dtype: torch.dtype, batch_size: int, words: int) -> Footprint:
    """What an instance on the meta device says."""
    model = make_model(config, "meta", dtype)
    batch = default_collate(list(make_questions(config, batch_size, words, dtype)))
    return footprint(model, batch, answer_loss, find_layers(model, TOWER), answers)


def bare_pass(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Most bytes alive in a forward and backward pass over one batch, in which every gradient is let go of at once."""
    parameters = {name: p for layer in find_layers(model, TOWER) for name, p in layer.parameters.items()}
    with LiveTensors() as live, only_differentiating(model, parameters), ExitStack() as stack:
        for parameter in parameters.values():
            hook = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            stack.callback(hook.remove)
        answer_loss(model, batch).backward()
    return live.peak


def forget(config: LlavaConfig, batch_size: int, words: int) -> dict[str, Any]:
    """Let a model forget here; what it took, what it may take, and what was expected."""
    expected = estimate(config, torch.float32, batch_size, words)
    model = make_model(config, "cpu").train()
    parts = ("forget", "retain", "forget_val", "retain_val", "forget_test", "retain_test")
    sets = {part: make_questions(config, 2 * batch_size, words, seed=seed) for seed, part in enumerate(parts)}
    data = UnlearnDataModule(**sets, batch_size=batch_size)
    batch = next(iter(DataLoader(sets["forget"], batch_size)))
    activations = bare_pass(model, batch)
    with torch.no_grad():
        target = answer_loss(model, next(iter(DataLoader(sets["forget_val"], 2 * batch_size)))).item() + 0.05
    budget = expected.gradient
    method, runtime = SLUG.paper(layers=f"model.{TOWER}"), Runtime(replay_budget=budget)
    callback = UnlearnCallback(near_retain=None, forget_target=target, retain_tolerance=1.0, method=method, runtime=runtime)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, callbacks=[callback], **quiet)
    with LiveTensors() as live:
        trainer.fit(UnlearnModule(model, loss=answer_loss), data)
    report = callback.report
    assert report is not None
    return {
        "status": report.status,
        "layer": report.layer,
        "candidates in fp32": expected.gradient,
        "bare pass": activations,
        "whole fit": live.peak,
        "bound": round(FACTOR * expected.gradient) + activations,
        "estimate": max(expected.phases.values()),
    }


def problems(run: dict[str, Any], large: Footprint, card: float) -> list[str]:
    """What is not as it should be."""
    found = []
    if run["whole fit"] > run["bound"]:
        found.append(f"the run took {run['whole fit']} bytes beside the weights, more than the bound of {run['bound']}")
    if run["whole fit"] > SLACK * run["estimate"]:
        found.append(f"the run took {run['whole fit']} bytes beside the weights, where {run['estimate']} were estimated")
    if large.peak > card:
        found.append(f"the large model needs {large.peak / 1e9:.2f} GB, and the card has {card / 1e9:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1, help="of the large model (default: %(default)s)")
    parser.add_argument("--words", type=int, default=64, help="of a question and its answer (default: %(default)s)")
    parser.add_argument("--card", type=float, default=24, help="memory of the card in GB, 10^9 bytes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/vlm_memory.json"), help="JSON (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    run = forget(SMALL, batch_size=4, words=9)
    print(pandas.DataFrame([run]).to_markdown(index=False, intfmt=","), end="\n\n", flush=True)
    large = estimate(LARGE, torch.float16, arguments.batch_size, arguments.words)
    print(f"LLaVA-1.5-7B's shape in fp16, {arguments.batch_size} a batch, 576 image tokens and {arguments.words} words")
    print(large.to_text())
    wrong = problems(run, large, arguments.card * 1e9)
    print("\n".join(wrong) or f"It fits a card of {arguments.card:g} GB.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(arguments).items() if name != "output"}
    found = {"asked": asked, "small": run, "large": vars(large) | {"peak": large.peak}, "problems": wrong}
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The shipped configuration for Stable Diffusion runs as it is, with a small pipeline in place of the real one."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _tiny_diffusion import SIZE, tiny_clips, tiny_pipeline, tiny_text_config, tiny_tokenizer
from diffusers import DiffusionPipeline
from PIL import Image
from test_cli import run

from slug_lightning import UnlearnPatch
from slug_lightning.datamodules.image_text.text_to_image import noise_seeds
from slug_lightning.modules.diffusion import DiffusionModule
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.model_parts import parts_of

CONFIG = Path(__file__).parent.parent / "configs" / "stable_diffusion.yaml"


def pipeline_of(texts: list[str]) -> Any:
    """A tiny SD 1 that knows all words of some texts."""
    from transformers import CLIPTextModel

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(sorted({word for text in texts for word in text.split()} - tokenizer.get_vocab().keys()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = tiny_pipeline(text_encoder=CLIPTextModel(tiny_text_config(vocab_size=len(tokenizer))))
    pipeline.tokenizer = tokenizer
    return pipeline


def that_remembers(pipeline: Any, classes: list[str], texts: list[str]) -> Any:
    """A CLIP that takes the pictures which the pipeline draws of some texts for the first class, and others for the next two."""
    (clip,) = tiny_clips(pipeline)
    module = DiffusionModule(pipeline, clip=clip, judges={"style": classes})
    seen: list[torch.Tensor] = []
    clip.visual_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for split in ("val", "test"):
        prompts = {
            "text": texts,
            "seed": torch.tensor([*noise_seeds(split, 1)] * len(texts)),
            "steps": torch.full((len(texts),), 2),
        }
        module.judge(module.draw(prompts))
    features = torch.cat(seen)
    same = torch.linalg.lstsq(features, torch.ones(len(features), 1)).solution[:, 0]
    other = torch.linalg.svd(features).Vh[-1]  # none of them has anything of this
    first, second, third = module.judges["style"].classes[:3]
    clip.visual_projection.weight.copy_(first.outer(same) + 1e4 * (second - third).outer(other))
    return clip


def arguments(folder: Path) -> list[Any]:
    """Of a run of the configuration, with everything that it names made in a folder."""
    made = yaml.safe_load(CONFIG.read_text())
    model, data = made["model"]["init_args"], made["data"]["init_args"]
    (classes,), (styles,) = model["judges"].values(), data["labels"].values()
    assert all(style in name for style, name in zip(styles, classes, strict=True))  # the same order
    pipeline = pipeline_of([*classes, *data["forget_prompts"], *data["retain_prompts"]])
    pipeline.save_pretrained(folder / "pipeline")
    that_remembers(pipeline, classes, data["forget_prompts"]).save_pretrained(folder / "clip")
    pipeline.tokenizer.save_pretrained(folder / "clip")
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for number, style in enumerate(3 * styles):
            Image.new("RGB", (40, 30), (20 * number, 5 * number, 99)).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", f"a house by {style}"])
    given = {"model.pipeline": folder / "pipeline", "model.clip": f"hf:{folder / 'clip'}", "data.data": folder / "captions.csv"}
    small = {"data.size": SIZE, "data.search_seeds": 1, "data.report_seeds": 1, "data.search_steps": 2, "data.report_steps": 2}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
    loose = {"retain_tolerance": 1.0, "method.max_evaluations": 4, "method.layers": "*mlp.fc1.weight"}
    small |= {f"trainer.callbacks.{name}": value for name, value in loose.items()}
    options = [part for name, value in {**given, **small}.items() for part in (f"--{name}", value)]
    return ["fit", "--config", CONFIG, "--output_dir", folder / "run", *options]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:You defined a `validation_step`")
def test_the_configuration_runs_and_leaves_report_patch_pictures_and_pipeline(tmp_path, capsys):
    assert run(*arguments(tmp_path)) == 0, capsys.readouterr().err
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "unlearned" and report["concept"] == "van gogh"
    assert (report["search_before"]["forget"], report["search_after"]["forget"]) == ({"accuracy": 1.0}, {"accuracy": 0.0})
    assert report["bounds"]["retain_metrics"] == ["style_accuracy"]
    assert any("in 2 and 2 steps" in note for note in report["notes"])
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"patch.safetensors", "unlearned.ckpt", "config.yaml", "model/model_index.json"} <= names
    assert any(re.match(r"figures/.*samples.*forget.*\.png", name) for name in names)
    assert any("events.out.tfevents" in name for name in names) and "weights.safetensors" not in names
    original, saved = (DiffusionPipeline.from_pretrained(path) for path in (tmp_path / "pipeline", folder / "model"))
    before, after = (parts_of(pipeline).state_dict() for pipeline in (original, saved))
    patch = UnlearnPatch.load(folder / "patch.safetensors")
    assert {name for name in before if not bitwise_equal(before[name], after[name])} == set(patch.base)
    assert all(name.startswith("text_encoder.") for name in patch.base)
    patch.apply(original)
    assert all(bitwise_equal(tensor, after[name]) for name, tensor in parts_of(original).state_dict().items())


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_what_cannot_be_had_exits_with_2_and_says_what_to_give(tmp_path, capsys):
    given = ["fit", "--config", CONFIG, "--output_dir", tmp_path / "run", "--trainer.accelerator", "cpu"]
    assert run(*given, "--model.pipeline", tmp_path) == 2
    assert f"slug-lightning: pipeline: '{tmp_path}' cannot be loaded" in capsys.readouterr().err
    tiny_pipeline("sd1").save_pretrained(tmp_path / "pipeline")
    assert run(*given, "--model.pipeline", tmp_path / "pipeline", "--model.clip", "null") == 2
    assert "slug-lightning: clip: objective='clip'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()

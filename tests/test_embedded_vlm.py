"""The small vision-language model: what ships answers as it is said to, and forgets from its configuration by both objectives."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from test_cli import run
from transformers import AutoModelForImageTextToText

from slug_lightning import UnlearnPatch, UnlearnReport
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.datamodules.demo.questions import QUESTIONS, answer_of
from slug_lightning.embedded import VLM
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.modules import EmbeddedClip, EmbeddedVLM
from slug_lightning.vlm.towers import VisionSourceClip

CONFIG = Path(__file__).parent.parent / "configs" / "vlm.yaml"


def test_answers_about_renderings_that_nobody_has_seen():
    drawings, module = load_drawings(), EmbeddedVLM().eval()
    rows = torch.randperm(len(drawings.things), generator=torch.Generator().manual_seed(5))[:240]
    images = render(drawings.pictures[rows], torch.Generator().manual_seed(987_654)).clamp(-1, 1)
    kinds = [list(QUESTIONS)[i % len(QUESTIONS)] for i in range(len(rows))]
    wordings = [QUESTIONS[kind][i % len(QUESTIONS[kind])] for i, kind in enumerate(kinds)]
    batch = {"image": ((images + 1) * 127.5).round().to(torch.uint8), "question": wordings}
    right = [
        said == answer_of(drawings, int(row), kind) for said, row, kind in zip(module.answer(batch), rows, kinds, strict=True)
    ]
    assert sum(right) / len(right) >= 0.85


def test_its_tower_is_that_of_the_embedded_clip():
    """By objective "clip" they are one: what is changed in the model, the CLIP sees by."""
    module, clip = EmbeddedVLM("clip"), EmbeddedClip()
    assert module.towers["late"] == [f"model.model.vision_tower.encoder.layers.{block}.*" for block in (4, 5)]
    assert isinstance(module.clip, VisionSourceClip)
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    own = torch.nn.functional.normalize(clip.model.eval().encode_image((pictures / 255 - 0.5) / 0.5), dim=-1)
    torch.testing.assert_close(module.eval().clip.encode_image(pictures), own, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        module.model.model.vision_tower.encoder.layers[5].mlp.fc2.weight.mul_(-1)
    assert not torch.allclose(module.clip.encode_image(pictures), own, atol=1e-2)


@pytest.mark.parametrize("route", ["answers", "clip"])
def test_route_is_still_understood_as_objective_and_warns(route):
    """Also from a config or the command line."""
    with pytest.warns(FutureWarning, match="route is deprecated .* use objective"):
        assert (EmbeddedVLM(route=route).clip is not None) == (route == "clip")
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model")
    config = parser.parse_args(["--model=slug_lightning.modules.EmbeddedVLM", f"--model.route={route}"])
    with pytest.warns(FutureWarning, match="route is deprecated .* use objective"):
        assert (parser.instantiate_classes(config).model.clip is not None) == (route == "clip")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("objective", ["answers", "clip"])
@pytest.mark.parametrize("asked", ["--data.thing=octopus", "--data.style=fluent"])
def test_a_thing_and_a_style_are_forgotten_from_the_shipped_configuration(asked, objective, tmp_path):
    folder = tmp_path / "run"
    other = [] if "thing" in asked else ["--data.thing=null"]
    assert run("fit", "--config", CONFIG, "--output_dir", folder, "--model.objective", objective, *other, asked) == 0
    report = UnlearnReport.from_json(folder / "report.json")
    assert report.after["forget"]["answer_accuracy"] <= 0.05
    assert report.after["retain"]["answer_accuracy"] >= report.before["retain"]["answer_accuracy"] - 0.03
    # Plain transformers loads what was forgotten: only the edited tensors differ.
    before = AutoModelForImageTextToText.from_pretrained(VLM, dtype=torch.float32).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(UnlearnPatch.load(folder / "patch.safetensors").base)
    assert not any("language_model" in name for name in changed)

"""The miniature UnlearnCanvas: what ships is as good as it is said to be, and forgets from its configuration."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from slug_lightning import UnlearnReport
from slug_lightning.datamodules.canvas import canvas_drawings, canvas_render
from slug_lightning.lightning_cli import UnlearnCLI
from slug_lightning.modules import EmbeddedCanvas

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def canvas() -> EmbeddedCanvas:
    return EmbeddedCanvas().eval()


def prompts_of(rows: list[int], steps: int) -> dict:
    drawings = canvas_drawings()
    things, styles = drawings.things[rows], drawings.styles[rows]
    names = zip(things, styles, strict=True)
    text = [f"{drawings.thing_names[thing]} in {drawings.style_names[style]} style" for thing, style in names]
    return {
        "text": text,
        "seed": torch.tensor(rows) + 77_000,
        "steps": torch.full((len(rows),), steps),
        "thing": things,
        "style": styles,
    }


def test_the_judges_know_renderings_that_nobody_has_seen(canvas):
    drawings = canvas_drawings()
    seen = canvas.judge(canvas_render(drawings.pictures, torch.Generator().manual_seed(987_654)))
    assert (seen["style"] == drawings.styles).float().mean() >= 0.95
    assert (seen["thing"] == drawings.things).float().mean() >= 0.95


def test_the_pipeline_draws_what_it_is_asked_for(canvas):
    scores = canvas.scores(prompts_of(list(range(100)), 10), 0)
    assert scores["style_accuracy"].mean() >= 0.85
    assert scores["thing_accuracy"].mean() >= 0.80


@pytest.mark.slow
def test_a_style_is_forgotten_from_the_shipped_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = UnlearnCLI.run(
        ["fit", "--config", str(ROOT / "configs" / "unlearn_canvas.yaml"), "--trainer.enable_progress_bar", "false"]
    )
    assert isinstance(report, UnlearnReport) and report.status == "unlearned"
    assert report.after["forget"]["accuracy"] <= 0.1
    for name, before in report.before["retain"].items():
        assert report.after["retain"][name] >= before - 0.05
    folder = tmp_path / "runs" / "unlearn_canvas"
    assert {path.stem for path in (folder / "figures" / "samples").iterdir()} == {"forget", "retain"}
    # Plain diffusers loads what was forgotten: only the edited tensors differ.
    after = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32).text_encoder.state_dict()
    before = EmbeddedCanvas().pipeline.text_encoder.state_dict()
    changed = {f"text_encoder.{name}" for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.tensors)

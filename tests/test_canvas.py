"""The miniature UnlearnCanvas: what ships is as good as it is said to be, and forgets from its configuration."""

from pathlib import Path

import pytest
import torch
from test_cli import run
from torch.nn.functional import interpolate

from slug_lightning import UnlearnReport
from slug_lightning.datamodules.demo.canvas import AMOUNT, canvas_drawings
from slug_lightning.datamodules.demo.emoji import caption_of, render
from slug_lightning.diffusion.pipelines import load_pipeline
from slug_lightning.modules import EmbeddedCanvas

pytestmark = pytest.mark.uncovered


@pytest.fixture(scope="module")
def canvas() -> EmbeddedCanvas:
    return EmbeddedCanvas().eval()


def prompts_of(rows: list[int], steps: int) -> dict:
    drawings = canvas_drawings()
    things, styles = drawings.things[rows], drawings.styles[rows]
    text = [caption_of(drawings, row) for row in rows]
    return {
        "text": text,
        "seed": torch.tensor(rows) + 77_000,
        "steps": torch.full((len(rows),), steps),
        "thing": things,
        "style": styles,
    }


def test_the_judges_know_renderings_that_nobody_has_seen(canvas):
    drawings = canvas_drawings()
    drawn = render(drawings.pictures, torch.Generator().manual_seed(987_654), AMOUNT)
    seen = canvas.judge(interpolate(drawn, size=(32, 32), mode="area").clamp(-1, 1))
    assert (seen["style"] == drawings.styles).float().mean() >= 0.95
    assert (seen["thing"] == drawings.things).float().mean() >= 0.95


@pytest.mark.slow
def test_the_pipeline_draws_what_it_is_asked_for(canvas):
    scores = canvas.scores(prompts_of(list(range(100)), 10), 0)
    assert scores["style_accuracy"].mean() >= 0.85
    assert scores["thing_accuracy"].mean() >= 0.80


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_style_is_forgotten_from_the_shipped_configuration(tmp_path):
    folder = tmp_path / "run"
    config = Path(__file__).parent.parent / "configs" / "unlearn_canvas.yaml"
    assert run("fit", "--config", config, "--output_dir", folder) == 0
    report = UnlearnReport.from_json(folder / "report.json")
    assert report.holds and report.after["forget"]["accuracy"] <= 0.1
    for name, before in report.before["retain"].items():
        assert report.after["retain"][name] >= before - 0.05
    assert {path.stem for path in (folder / "figures" / "samples").iterdir()} == {"forget", "retain"}
    # Plain diffusers loads what was forgotten: only the edited tensors differ.
    after = load_pipeline(folder / "model").text_encoder.state_dict()
    before = EmbeddedCanvas().pipeline.text_encoder.state_dict()
    changed = {f"text_encoder.{name}" for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.removeprefix("model.") for name in report.tensors}

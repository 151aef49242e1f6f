"""The shipped configs as they are, whole: minutes, so only on request."""

import json
from pathlib import Path

import pytest
from test_cli import run

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("name", ["demo", "thing"])
def test_a_shipped_config_forgets_within_its_bounds(name, tmp_path):
    assert run("fit", "--config", CONFIGS / f"{name}.yaml", "--output_dir", tmp_path / name) == 0
    report = json.loads((tmp_path / name / "report.json").read_text())
    (before,), (after,) = (report[when]["forget"].values() for when in ("before", "after"))
    assert before >= 0.9
    if name == "demo":
        assert after <= 0.2 and report["holds"]
    for metric, kept in report["after"]["retain"].items():
        assert kept >= report["before"]["retain"][metric] - 0.02

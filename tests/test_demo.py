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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_several_things_are_forgotten_and_one_more_later(tmp_path):
    cache = "--trainer.callbacks.init_args.retain_cache", tmp_path / "retain"
    assert run("fit", "--config", CONFIGS / "several.yaml", "--output_dir", tmp_path / "several", *cache) == 0
    more = "--forget", "EmojiDataModule", "--forget.thing", "dog", "--trainer.callbacks.init_args.retain_tolerance", "0.06"
    assert run("forget-another", "--run", tmp_path / "several", "--output_dir", tmp_path / "more", *more) == 0
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("several", "more"))
    assert [*second["concepts"]] == [*first["concepts"], "dog"]
    assert any(note.startswith("retain: gradient taken from") for note in second["notes"])
    for name, report in first["concepts"].items():
        assert report["patch_digest"] == second["concepts"][name]["patch_digest"]
    for report in (first, second):
        assert all(before >= 0.7 for before in report["before"]["forget"].values())
        assert all(after <= 0.03 for after in report["after"]["forget"].values())
        for metric, kept in report["after"]["retain"].items():
            assert kept >= report["before"]["retain"][metric] - 0.06


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recited_passages_are_forgotten_to_the_level_of_unseen_ones(tmp_path):
    assert run("fit", "--config", CONFIGS / "icu.yaml", "--output_dir", tmp_path / "icu") == 0
    report = json.loads((tmp_path / "icu" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["forget"]["memorization_accuracy"] > 0.97 and before["forget"]["extraction_likelihood"] > 0.95
    assert after["forget"]["memorization_accuracy"] <= before["unseen"]["memorization_accuracy"] + 0.005
    assert after["forget"]["extraction_likelihood"] <= before["unseen"]["extraction_likelihood"] + 0.001
    assert after["other"]["perplexity"] <= 1.25 * before["other"]["perplexity"]
    assert report["cost"]["ratio of validation to training"] <= 1 / 3

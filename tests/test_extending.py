"""The examples of docs/extending.md: each is short, touches no file of ours, and works wherever a built-in rule works."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from _callback import unlearn_callback
from _processes import Ended, in_processes
from lightning.pytorch.strategies import DDPStrategy

from _tiny import Classifier, changed, loader, part, snapshot, trained, trainer
from slug_lightning.cli import main
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.methods.slug.candidates import Candidate
from slug_lightning.reports.several import report_from_json
from slug_lightning.reports.single import UnlearnReport

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
RULES = {
    "direction": "InverseCovariance",
    "curve": "bent",
    "score": "deepest_first",
    "search": "golden_section",
    "choice": "SmallestStep",
    "method": "TwoInTurn",
}
METRICS = {"forget_metric": "val_acc", "forget_target": 0.25, "retain_metric": ["val_acc", "val_loss"], "retain_tolerance": 0.5}


class Trained(Classifier):
    """For configs."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(trained().state_dict())


class Blobs(UnlearnDataModule):
    """For configs."""

    def __init__(self) -> None:
        super().__init__(part(True), part(False), batch_size=16)


@pytest.fixture(scope="module")
def my_rules(tmp_path_factory):
    """The page's code as a module that a config can name."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "my_rules.py").write_text("\n\n".join(BLOCKS))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_rules")
    sys.path.remove(str(folder))
    del sys.modules["my_rules"]


def every_layer(layers: Any) -> list[Candidate]:
    """So that a choice has something to choose from."""
    return [Candidate(layer.name) for layer in layers]


def options(seam: str, my_rules: ModuleType) -> dict[str, Any]:
    rule = getattr(my_rules, RULES[seam])
    more = {"score": every_layer} if seam == "choice" else {}
    return {seam: rule() if isinstance(rule, type) else rule, **more}


def forget(seam: str | None, my_rules: ModuleType, **trainer_options: Any) -> tuple[Classifier, UnlearnReport]:
    model = trained()
    chosen = options(seam, my_rules) if seam else {}
    callback = unlearn_callback(forget=loader(True), retain=loader(False), **METRICS, **chosen)
    trainer(callback, **trainer_options).fit(model, loader(False), loader(False))
    return model, callback.report


def is_feasible(trial: dict[str, Any]) -> bool:
    usage = trial["constraint_usage"]
    return trial["forgotten"] and usage is not None and usage <= 1


def in_two_processes(seam: str, my_rules: ModuleType) -> dict[str, Any]:
    return forget(seam, my_rules, devices=2, strategy=DDPStrategy())[1].to_dict()


@pytest.mark.parametrize("block", BLOCKS, ids=RULES)
def test_an_example_has_at_most_twenty_lines(block):
    assert sum(bool(line) for line in block.splitlines()) <= 20
    assert len(BLOCKS) == len(RULES)


@pytest.mark.parametrize("seam", RULES)
def test_it_runs_through_the_callback_with_replay(seam, my_rules):
    model, report = forget(seam, my_rules)
    assert report.status == "unlearned" and report.holds
    assert report.cost["replay"]["skipped_calls"] > 0 and not any("computed whole" in note for note in report.notes)
    assert changed(model, snapshot(trained())) == set(report.tensors)
    assert len(report.tensors) == (2 if seam == "method" else 1)
    report.patch.revert(model)
    assert not changed(model, snapshot(trained()))
    if seam == "choice":
        assert len({trial["layer"] for trial in report.trace}) > 1
        assert report.relative_step == min(trial["relative_step"] for trial in report.trace if is_feasible(trial))
    else:
        _, plain = forget(None, my_rules)
        assert report.trace != plain.trace, "the rule had no say"


@pytest.mark.uncovered
@pytest.mark.parametrize("seam", RULES)
def test_two_processes_find_the_same(seam, my_rules):
    found = in_processes(2, in_two_processes, seam, my_rules, timeout=60)
    assert not [end for end in found if isinstance(end, Ended)], found
    _, alone = forget(seam, my_rules)
    for report in found:
        assert (report["layer"], report["status"]) == (alone.layer, alone.status)
        assert report["relative_step"] == pytest.approx(alone.relative_step, rel=1e-3)
        assert report["after"]["retain"] == pytest.approx(alone.after["retain"], rel=1e-3)


def config(seam: str, folder: Path) -> list[str]:
    """Arguments of a run by the command line."""
    slug = {"class_path": "slug_lightning.methods.SLUG", "init_args": {seam: f"my_rules.{RULES[seam]}"}}
    method = {"class_path": "my_rules.TwoInTurn"} if seam == "method" else slug
    callback = {"class_path": "slug_lightning.callbacks.UnlearnCallback", "init_args": {**METRICS, "method": method}}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    made = {
        "model": {"class_path": f"{__name__}.Trained"},
        "data": {"class_path": f"{__name__}.Blobs"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, **quiet, "callbacks": [callback]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    return ["fit", "--config", str(folder / "config.yaml"), "--output_dir", str(folder / "run")]


@pytest.mark.parametrize("seam", RULES)
def test_it_runs_through_the_command_line(seam, my_rules, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slug-lightning", *config(seam, tmp_path)])
    assert main() == 0
    assert report_from_json(tmp_path / "run" / "report.json").status == "unlearned"


@pytest.mark.uncovered
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.parametrize("seam", RULES)
def test_the_command_line_runs_it_in_two_processes(seam, my_rules, tmp_path, monkeypatch):
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    monkeypatch.setattr(sys, "argv", ["slug-lightning", *config(seam, tmp_path), *ddp])
    assert in_processes(2, main, timeout=60) == [0, 0]
    report = report_from_json(tmp_path / "run" / "report.json")
    assert report.status == "unlearned" and any("2 processes" in note for note in report.notes)


def test_a_class_without_a_rule_of_that_name_is_refused():
    with pytest.raises(ValueError, match="direction must be 'gradient', or an object, got 'newton'"):
        unlearn_callback(direction="newton")

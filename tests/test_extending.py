"""The examples of docs/extending.md: each is short, touches no file of ours, and works wherever a built-in rule works."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from _callback import unlearn_callback
from _processes import Ended, in_processes
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Subset

from _tiny import Classifier, blobs, changed, loader, part, snapshot, trained, trainer
from slug_lightning.cli import main
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import Context, Method, Outcome
from slug_lightning.methods.slug.candidates import Candidate
from slug_lightning.patches.temporary import EditStep
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


class TwoOutcomes(Method):
    """A step of a given length along the last layer, for each concept; a tenth of it for the weak one."""

    def __init__(self, step: float = 0.4, weak: str = "") -> None:
        self.step, self.weak = step, weak

    def run(self, context: Context) -> list[Outcome]:
        outcomes = []
        for concept in context.concepts:
            layer = context.layers[-1]
            gradient = context.gradient("forget", [layer], concept)
            relative = self.step / 100 if concept.name == self.weak else self.step
            edit = EditStep(layer, gradient, relative * context.unit_step(layer, gradient))
            outcomes.append(Outcome(concept.name, edit, relative))
        return outcomes


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


# ---- rules that are wrong


def not_a_layer(layers: Any) -> list[Candidate]:
    return [Candidate("net.77.weight")]


def nowhere(layer: Any, gradient: dict[str, Any]) -> dict[str, Any]:
    return {name: 0 * g for name, g in gradient.items()}


class OfAConvolution(Classifier):
    """The image side of it is not a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 16, 8), nn.Flatten())


class Needy:
    needs = frozenset({"retain:hessian"})

    def __call__(self, layer: Any, gradient: Any) -> Any:
        return gradient


class Forgetful(TwoOutcomes):
    """Says nothing of one concept."""

    def run(self, context: Any) -> list[Outcome]:
        return super().run(context)[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": not_a_layer}, "score: net.77.weight cannot be searched; give names of the layers it was given"),
        ({"direction": nowhere}, "direction: that of net.* has norm 0.0; it must be finite and not zero"),
        ({"method": Forgetful()}, "method: Forgetful gave no outcome for the forget set"),
    ],
)
def test_a_rule_that_gives_what_cannot_be_is_named(options, message):
    model = trained()
    with pytest.raises(UnlearnError, match=message):
        trainer(unlearn_callback(forget=loader(True), retain=loader(False), **METRICS, **options)).fit(
            model, loader(False), loader(False)
        )
    assert not changed(model, snapshot(trained()))


def test_a_factor_that_is_unknown_is_refused_at_once_and_one_that_cannot_be_had_before_the_search(my_rules):
    with pytest.raises(UnlearnError, match="direction needs retain:hessian, but there is only forget:input_covariance, retain"):
        unlearn_callback(direction=Needy())
    direction, first = my_rules.InverseCovariance(), "net.0.1.weight"
    options = {"direction": direction, "layers": first, "forget_target": 1e6, "retain_tolerance": 1.0}
    callback = unlearn_callback(forget=loader(True), retain=loader(False), **options)
    with pytest.raises(UnlearnError, match=f"direction: {first} isn't the weight of an nn.Linear"):
        trainer(callback).fit(OfAConvolution(), loader(False), loader(False))


def test_no_candidates_is_infeasible():
    callback = unlearn_callback(forget=loader(True), retain=loader(False), score=lambda layers: [], **METRICS)
    trainer(callback).fit(trained(), loader(False), loader(False))
    assert callback.report.status == "infeasible" and callback.report.trace == []


@pytest.mark.parametrize("usage", [0.5, 2.0])
def test_the_harness_holds_every_method_to_the_same_bounds(usage):
    """Whatever a method says of its edits, they are measured, and made only if both bounds hold."""
    model = trained()
    step = 0.4 if usage < 1 else 40.0
    options = METRICS | {"retain_tolerance": 0.5 if usage < 1 else 1e-6}
    callback = unlearn_callback(forget=loader(True), retain=loader(False), method=TwoOutcomes(step), **options)
    trainer(callback).fit(model, loader(False), loader(False))
    assert callback.report.status == ("unlearned" if usage < 1 else "infeasible")
    assert bool(changed(model, snapshot(trained()))) == (usage < 1)


def test_an_edit_that_does_not_forget_is_left_out_and_the_others_are_made():
    labels = blobs().tensors[1]
    of = {k: DataLoader(Subset(blobs(), (labels == k).nonzero()[:, 0].tolist()), batch_size=16) for k in range(4)}
    callback = unlearn_callback(forget={"a": of[2], "b": of[1]}, retain=of[0], method=TwoOutcomes(0.4, weak="b"), **METRICS)
    trainer(callback).fit(trained(), of[0], of[0])
    assert callback.report.status == "partly" and list(callback.report.unlearned) == ["a"]


def test_what_is_asked_is_plain_data_whatever_the_rule(my_rules):
    asked = unlearn_callback(curve=partial(my_rules.bent, bend=0.2), direction=my_rules.InverseCovariance(0.3))._request()
    assert asked["curve"] == ["my_rules.bent", [], {"bend": 0.2}]
    assert asked["direction"] == {"class_path": "my_rules.InverseCovariance", "damping": 0.3}
    assert json.loads(json.dumps(asked)) == asked

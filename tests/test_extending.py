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

import numpy as np
import pytest
import torch
import yaml
from _amounts import sample
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
from slug_lightning.patches.temporary import EditStep, merged
from slug_lightning.reports.several import report_from_json
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.layers import Layer

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
            outcomes.append(Outcome(concept.name, edit))
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
@pytest.mark.parametrize("seam", sample(RULES, ["direction", "method"]))
def test_the_command_line_runs_it_in_two_processes(seam, my_rules, tmp_path, monkeypatch):
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    monkeypatch.setattr(sys, "argv", ["slug-lightning", *config(seam, tmp_path), *ddp])
    assert in_processes(2, main, timeout=60) == [0, 0]
    report = report_from_json(tmp_path / "run" / "report.json")
    assert report.status == "unlearned" and any("2 ranks" in note for note in report.notes)


def test_a_class_without_a_rule_of_that_name_is_refused():
    with pytest.raises(ValueError, match="direction must be 'gradient' or .* or 'retain_null_space', or an object, got 'newton'"):
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


class Asking(Method):
    """Asks the context for something."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask

    def run(self, context: Context) -> list[Outcome]:
        self.ask(context)
        return [Outcome(concept.name) for concept in context.concepts]


def last_edit(context: Context) -> EditStep:
    layer = context.layers[-1]
    return EditStep(layer, context.gradient("forget", [layer], context.concepts[0]), 1.0)


def measured_too_late(context: Context) -> None:
    with context.edits.applied(last_edit(context)):
        context.usage(context.objective.measured("retain", "val", edited="it"))


def another_edit_inside(context: Context) -> None:
    edit = last_edit(context)
    with context.evaluator(context.concepts[0], [edit.layer]) as evaluate, context.edits.applied(edit):
        evaluate(edit, 1.0)


class Forgetful(TwoOutcomes):
    """Says nothing of one concept."""

    def run(self, context: Any) -> list[Outcome]:
        return super().run(context)[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": not_a_layer}, "score: net.77.weight cannot be searched; give names of the layers it was given"),
        ({"direction": nowhere}, "direction: that of net.* has norm 0.0; it must be finite and not zero"),
        ({"score": lambda layers: [layers[0].name]}, "score must return Candidates, got"),
        ({"direction": lambda layer, gradient: {}}, "direction: for net.* it must return a tensor of the gradient's shape"),
        ({"method": Forgetful()}, "method: Forgetful gave no outcome for the forget set"),
        ({"method": Asking(lambda c: c.gradient("forget", c.layers))}, "gradient: give kind 'forget' with a concept"),
        ({"method": Asking(lambda c: c.unit_step(c.layers[0], {c.layers[0].name: torch.zeros(16, 8)}))}, "has norm 0.0"),
        ({"method": Asking(measured_too_late)}, r"Context: measure retain_before\(\), or open an evaluator, before any edit"),
        ({"method": Asking(another_edit_inside)}, "Context.evaluator: other edits are in the model now; give them as at=…"),
    ],
)
def test_a_rule_that_gives_what_cannot_be_is_named(options, message):
    model = trained()
    with pytest.raises(UnlearnError, match=message):
        trainer(unlearn_callback(forget=loader(True), retain=loader(False), **METRICS, **options)).fit(
            model, loader(False), loader(False)
        )
    assert not changed(model, snapshot(trained()))


def test_a_factor_that_is_unknown_is_refused_at_once():
    with pytest.raises(UnlearnError, match="direction needs retain:hessian, but there is only forget:input_covariance, retain"):
        unlearn_callback(direction=Needy())


@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_a_direction_works_for_a_convolution_and_for_vectors(granularity, my_rules):
    options = {"direction": my_rules.InverseCovariance(), "granularity": granularity, "layers": ["net.0.1.*", "net.4.*"]}
    callback = unlearn_callback(forget=loader(True), retain=loader(False), forget_target=1e6, retain_tolerance=1.0, **options)
    trainer(callback).fit(OfAConvolution(), loader(False), loader(False))
    assert callback.report.trace and not any("directions:" in note for note in callback.report.notes)


def of_statistics(context: Context) -> None:
    needs, layers = {"retain:input_covariance", "retain:batch_output", "forget:input_covariance"}, context.layers
    context.shared_retain_gradient(False, layers, watched=layers[:1], needs=needs)
    before = context.objective.backward_samples
    found = context.statistics(layers[:1], needs, context.concepts[0])
    assert context.objective.backward_samples == before, "those of the retain set were collected with the gradient"
    assert set(found) == needs and all(set(by_name) == set(layers[0].parameters) for by_name in found.values())
    more = context.statistics(layers, {"retain:input_covariance"})
    assert more["retain:input_covariance"][layers[0].name] is found["retain:input_covariance"][layers[0].name]
    forward = context.statistics(layers[:1], {"retain:input_covariance"}, backward=False)["retain:input_covariance"]
    torch.testing.assert_close(
        *(one[layers[0].name].matrices for one in (forward, found["retain:input_covariance"])), rtol=1e-4, atol=1e-4
    )
    edited = context.statistics(layers[-1:], {"retain:input_covariance"}, at=[last_edit(context)])
    assert edited["retain:input_covariance"][layers[-1].name] is not more["retain:input_covariance"][layers[-1].name]
    for wrong, message in ((["retain:hessian"], "retain:hessian is unknown"), (["forget:input_covariance"], "give the concept")):
        with pytest.raises(UnlearnError, match=message):
            context.statistics(layers, wrong)


def test_a_context_collects_the_statistics_of_the_retain_set_once():
    callback = unlearn_callback(forget=loader(True), retain=loader(False), method=Asking(of_statistics), **METRICS)
    trainer(callback).fit(trained(), loader(False), loader(False))
    assert callback.report.status == "infeasible"


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
    if usage < 1:
        assert callback.report.relative_step == pytest.approx(step)
    else:
        assert "the method's edit is not made; with all edits, constraint usage is" in " ".join(callback.report.notes)
        assert "No edit meets both bounds" in callback.report.to_text()
    assert bool(changed(model, snapshot(trained()))) == (usage < 1)


def test_an_edit_that_does_not_forget_is_left_out_and_the_others_are_made():
    labels = blobs().tensors[1]
    of = {k: DataLoader(Subset(blobs(), (labels == k).nonzero()[:, 0].tolist()), batch_size=16) for k in range(4)}
    callback = unlearn_callback(forget={"a": of[2], "b": of[1]}, retain=of[0], method=TwoOutcomes(0.4, weak="b"), **METRICS)
    trainer(callback).fit(trained(), of[0], of[0])
    assert callback.report.status == "partly" and list(callback.report.unlearned) == ["a"]
    assert callback.report.concepts["b"].notes == [
        "b: the method's edit is not made; misses the forget target on the validation split"
    ]


class Meddling(TwoOutcomes):
    """Gives an edit of no use to what was forgotten before, and none to what is new."""

    def run(self, context: Context) -> list[Outcome]:
        return [Outcome("b") if outcome.concept == "b" else outcome for outcome in super().run(context)]


def test_what_an_earlier_run_has_forgotten_stays_as_it_is_whatever_the_method_says(tmp_path):
    labels = blobs().tensors[1]
    of = {k: DataLoader(Subset(blobs(), (labels == k).nonzero()[:, 0].tolist()), batch_size=16) for k in range(4)}
    folder = str(tmp_path / "run")
    first = unlearn_callback(forget={"a": of[2]}, retain=of[0], output_dir=folder, **METRICS)
    trainer(first).fit(trained(), of[0], of[0])
    forget = {"a": of[2], "b": of[1]}
    callback = unlearn_callback(forget=forget, retain=of[0], earlier=folder, method=Meddling(1e-6), **METRICS)
    trainer(callback).fit(trained(), of[0], of[0])
    a = callback.report.concepts["a"]
    assert list(callback.report.unlearned) == ["a"] and a.patch_digest == first.report.patch_digest
    assert a.search_after["forget"] == first.report.search_after["forget"]


def test_edits_of_one_tensor_add_up_when_they_are_merged():
    layer = Layer("w", {"w": nn.Parameter(torch.zeros(2))})
    both = merged([EditStep(layer, {"w": torch.ones(2)}, 2.0), EditStep(layer, {"w": torch.ones(2)}, 3.0)])
    assert both.step == 1.0 and both.direction["w"].tolist() == [5.0, 5.0]


def test_what_is_asked_is_plain_data_whatever_the_rule(my_rules):
    asked = unlearn_callback(curve=partial(my_rules.bent, bend=0.2), direction=my_rules.InverseCovariance(0.3))._request()
    assert asked["method"]["curve"] == ["my_rules.bent", [], {"bend": 0.2}]
    assert asked["method"]["direction"] == {"class_path": "my_rules.InverseCovariance", "damping": 0.3}
    assert json.loads(json.dumps(asked)) == asked


class WithAnything(Method):
    def __init__(self, **options: Any) -> None:
        self.__dict__ |= options

    def run(self, context: Context) -> list[Outcome]:
        return []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Path("a"), Path("b")), (torch.float32, torch.float16), (torch.ones(2), torch.zeros(2)), (np.float64(1), np.float64(2)),
        ({3, 1}, {1, 2}), ([1, (2,)], [1, (3,)]), (TwoOutcomes(0.1), TwoOutcomes(0.2)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_options_of_any_kind_tell_requests_apart(one, other):
    asked = [WithAnything(option=value).request() for value in (one, other)]
    assert asked[0] != asked[1] and WithAnything(option=one).request() == asked[0]
    assert json.loads(json.dumps(asked)) == asked


def test_an_option_that_holds_itself_is_no_end():
    endless: list[Any] = [1]
    endless.append(endless)
    assert WithAnything(option=endless).request()["option"] == [1, "…"]

"""Several concepts in one run inside a Trainer: weights, patches, files and figures are what the report says."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from _tiny import blobs, changed, snapshot, trained, trainer
from slug_lightning import UnlearnPatch
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules.names import file_name
from slug_lightning.datamodules.resolve import resolve_loaders
from slug_lightning.joint_report import JointReport, report_from_json
from slug_lightning.output import CHECKPOINT, PATCH, REPORT, WEIGHTS
from slug_lightning.patch import same_bits

TWO = {"one": (1,), "two": (2,)}
THREE = {**TWO, "three": (3,)}
STRENGTHS = [0.0, 0.5, 1.25]


def of(*classes: int) -> DataLoader:
    labels = blobs().tensors[1].tolist()
    return DataLoader(Subset(blobs(), [i for i, label in enumerate(labels) if label in classes]), batch_size=16)


def concepts(classes) -> dict[str, DataLoader]:
    return {name: of(*own) for name, own in classes.items()}


def kept_of(classes) -> DataLoader:
    return of(*set(range(4)).difference(*classes.values()))


def forget(classes, model=None, retain=None, logger=False, **options):
    """Forget in one run; gives the model and the callback."""
    model = model or trained()
    retain = retain or kept_of(classes)
    made = UnlearnCallback(**{"forget": concepts(classes), "retain": retain, "retain_tolerance": 1e5, **options})
    trainer(made, logger=logger, log_every_n_steps=1).fit(model, of(0), of(0))
    return model, made


def mean_loss(model, loader) -> float:
    """Independent of how a run measures."""
    model.eval()
    with torch.no_grad():
        total = sum(cross_entropy(model.net(x), y, reduction="sum").item() for x, y in loader)
    model.train()
    return total / len(loader.dataset)


def parts(classes):
    return resolve_loaders(concepts(classes), kept_of(classes), None)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    logger = TensorBoardLogger(folder, name="", version="events")
    model, made = forget(
        TWO, strengths=STRENGTHS, output_dir=str(folder / "run"), logger=logger, retain_cache=str(folder / "kept")
    )
    return model, made.report, folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    model, made = forget(THREE, output_dir=str(folder / "run"))
    return model, made.report, folder


def ends(request, name):
    model, report, folder = request.getfixturevalue(name)
    return model, report, folder, TWO if name == "two" else THREE


BOTH = pytest.mark.parametrize("name", ["two", "three"])


# ---- weights and patches


@BOTH
def test_weights_are_the_base_and_the_sum_of_the_reports_edits(name, request):
    model, report, _, classes = ends(request, name)
    assert isinstance(report, JointReport) and report.status == "unlearned" and list(report.concepts) == list(classes)
    singles = [single.patch for single in report.concepts.values()]
    made = trained()
    UnlearnPatch.combine(singles).apply(made)
    assert not changed(made, snapshot(model))
    assert report.patch.digest == report.patch_digest == UnlearnPatch.combine(singles[::-1]).digest
    assert changed(made, snapshot(trained())) == set(report.tensors)
    # And by hand, but for rounding.
    for tensor in report.tensors:
        value = trained().state_dict()[tensor].double()
        for single in report.concepts.values():
            (edit,) = single.patch.edits
            assert (edit.concept, edit.step) == (single.concept, single.step_size)
            if tensor in edit.directions:
                value = value + edit.step * edit.directions[tensor].double()
        torch.testing.assert_close(model.state_dict()[tensor].double(), value, rtol=1e-5, atol=1e-6)


@BOTH
def test_each_patch_comes_and_goes_in_any_order_on_the_trained_module(name, request):
    model, report, _, _ = ends(request, name)
    after, original = snapshot(model), snapshot(trained())
    patches = {concept: single.patch for concept, single in report.concepts.items()}
    for order in itertools.permutations(patches):
        for number, concept in enumerate(order):
            patches[concept].revert(model)
            rest = trained()
            for other in reversed(order[number + 1 :]):
                patches[other].apply(rest)
            assert not changed(model, snapshot(rest))
        assert not changed(model, original)
        for concept in order[::-1]:
            patches[concept].apply(model, 0.5)
        for concept in order[1:]:
            patches[concept].adjust(model, 1.0)
        patches[order[0]].adjust(model, 1.0)
        assert not changed(model, after)


# ---- what is reported


@BOTH
def test_before_and_after_are_those_of_the_model(name, request):
    model, report, _, classes = ends(request, name)
    found = parts(classes)
    for when, measured in (("before", trained()), ("after", model)):
        values = getattr(report, when)
        for concept in classes:
            expected = mean_loss(measured, found.forget[concept]["test"])
            assert values["forget"][concept] == pytest.approx(expected, rel=1e-4, abs=1e-8)
            single = getattr(report.concepts[concept], when)
            assert single == {"forget": {"loss": values["forget"][concept]}, "retain": values["retain"]}
            searched = getattr(report.concepts[concept], f"search_{when}")
            assert searched["forget"]["loss"] == pytest.approx(
                mean_loss(measured, found.forget[concept]["val"]), rel=1e-4, abs=1e-8
            )
            assert searched["retain"]["loss"] == pytest.approx(mean_loss(measured, found.retain["val"]), rel=1e-4, abs=1e-8)
        assert values["retain"]["loss"] == pytest.approx(mean_loss(measured, found.retain["test"]), rel=1e-4, abs=1e-8)
    for concept, single in report.concepts.items():
        target = single.bounds["forget_target"]
        assert single.search_after["forget"]["loss"] >= target - 1e-5
        assert single.holds == (report.after["forget"][concept] >= target - 1e-5)


@BOTH
def test_collateral_is_each_concept_under_each_edit_alone(name, request):
    _, report, _, classes = ends(request, name)
    found = parts(classes)
    assert list(report.collateral) == list(classes)
    for edit, row in report.collateral.items():
        model = trained()
        report.concepts[edit].patch.apply(model)
        assert row == {c: pytest.approx(mean_loss(model, found.forget[c]["val"]), rel=1e-4, abs=1e-8) for c in classes}


def test_strength_curves_are_those_of_the_patches_at_each_strength(two):
    _, report, _ = two
    found = parts(TWO)
    for concept, single in report.concepts.items():
        assert [point["strength"] for point in single.strengths] == sorted({1.0, *STRENGTHS})
        for point in single.strengths:
            model = trained()
            report.patch.apply(model)
            single.patch.adjust(model, point["strength"])
            assert point["forget"]["loss"] == pytest.approx(mean_loss(model, found.forget[concept]["val"]), rel=1e-4, abs=1e-6)
            assert point["retain"]["loss"] == pytest.approx(mean_loss(model, found.retain["val"]), rel=1e-4, abs=1e-6)
        at_one = next(point for point in single.strengths if point["strength"] == 1)
        assert {kind: at_one[kind] for kind in ("forget", "retain")} == single.search_after


@BOTH
def test_text_and_json_tell_everything(name, request, tmp_path):
    _, report, _, classes = ends(request, name)
    text = report.to_text()
    assert all(concept in text for concept in classes) and max(map(len, text.splitlines())) <= 100
    report.to_json(tmp_path / "again.json")
    assert report_from_json(tmp_path / "again.json") == report
    assert JointReport.from_dict(report.to_dict()) == report


# ---- files


@BOTH
def test_the_folder_holds_what_the_report_says(name, request):
    model, report, folder, classes = ends(request, name)
    folder = folder / "run"
    assert JointReport.from_json(folder / REPORT) == report
    assert UnlearnPatch.load(folder / PATCH).digest == report.patch_digest
    files = sorted(path.name for path in (folder / "patches").iterdir())
    assert files == sorted(f"{file_name(concept)}.safetensors" for concept in classes)
    for concept, single in report.concepts.items():
        patch = UnlearnPatch.load(folder / "patches" / f"{file_name(concept)}.safetensors")
        assert patch.digest == single.patch_digest and patch.edits[0].concept == concept
    saved = load_file(folder / WEIGHTS)
    assert all(same_bits(saved[tensor], value) for tensor, value in snapshot(model).items())
    shown = {str(path.relative_to(folder / "figures")) for path in (folder / "figures").rglob("*.png")}
    assert {"collateral.png", *(f"pareto/{concept}.png" for concept in classes)} <= shown
    state = torch.load(folder / CHECKPOINT, weights_only=True)["callbacks"]["UnlearnCallback"]
    assert JointReport.from_dict(state["report"]) == report


def test_tensorboard_holds_scalars_of_each_concept_and_the_figures(two):
    _, report, folder = two
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    for concept, single in report.concepts.items():
        assert [(e.step, e.value) for e in events.Scalars(f"{concept}/strength/forget_loss")] == [
            (round(10_000 * point["strength"]), pytest.approx(point["forget"]["loss"])) for point in single.strengths
        ]
        trials = [t for t in single.trace if t["layer"] == single.layer and not t.get("together")]
        told = sorted((round(10_000 * t["relative_step"]), t["forget"]) for t in trials)
        assert [(e.step, e.value) for e in events.Scalars(f"{concept}/search/forget/{single.layer}")] == [
            (step, pytest.approx(value)) for step, value in told
        ]
        for when in ("before", "after"):
            (event,) = events.Scalars(f"{when}/forget_{concept}")
            assert event.value == pytest.approx(getattr(report, when)["forget"][concept])
        assert f"unlearn/{concept}/front/text_summary" in tags["tensors"]
    assert {"unlearn/collateral", "unlearn/strength", "unlearn/pareto/one", "unlearn/trade_off/two"} <= set(tags["images"])


# ---- what cannot be forgotten


def copy_of(*classes: int) -> DataLoader:
    """The same samples in another dataset, so that nobody sees that they are the same."""
    return DataLoader(TensorDataset(*(torch.stack(column) for column in zip(*of(*classes).dataset, strict=True))), batch_size=16)


@pytest.mark.parametrize("on_infeasible", ["skip", "stop"])
def test_one_that_cannot_be_forgotten_is_skipped_or_stops_all(on_infeasible, tmp_path):
    """`hard` is what is to be kept."""
    asked = {"one": of(1), "hard": copy_of(0, 3), "two": of(2)}
    model, made = forget(TWO, forget=asked, on_infeasible=on_infeasible, output_dir=str(tmp_path / "run"))
    report = made.report
    assert report.status == {"skip": "partly", "stop": "infeasible"}[on_infeasible]
    assert list(report.concepts) == list(asked) and all(single.scores for single in report.concepts.values())
    left = [name for name, single in report.concepts.items() if single.status != "unlearned"]
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    if on_infeasible == "stop":
        assert left == list(asked) and report.patch is None and report.holds is None and report.collateral == {}
        assert saved == {REPORT, "figures"} and report.before == report.after and not changed(model, snapshot(trained()))
    else:
        assert left == ["hard"] and {PATCH, WEIGHTS, CHECKPOINT, "patches"} <= saved
        assert {edit.concept for edit in report.patch.edits} == {"one", "two"} == set(report.collateral)
        made = trained()
        report.patch.apply(made)
        assert not changed(model, snapshot(made))
        found = resolve_loaders(asked, of(0, 3), None)
        expected = {name: mean_loss(model, found.forget[name]["test"]) for name in asked}
        assert report.after["forget"] == {name: pytest.approx(value, rel=1e-4, abs=1e-8) for name, value in expected.items()}
        # As if it had not been asked for.
        _, without = forget(TWO)
        assert without.report.patch_digest is not None
        assert {e.digest for e in without.report.patch.edits} == {e.digest for e in report.patch.edits}
    assert all(report.concepts[name].patch is None and report.concepts[name].holds is None for name in left)
    assert f"Left as they were: {', '.join(left)}" in " ".join(report.to_text().split())


def test_where_nothing_can_be_forgotten_no_bit_changes():
    model, made = forget(TWO, max_evaluations=1, forget_target=1e6)
    report = made.report
    assert report.status == "infeasible" and report.patch is None and report.holds is None and report.tensors == []
    assert not changed(model, snapshot(trained())) and report.before == report.after and report.collateral == {}
    assert "the weights are as they were" in report.to_text() and set(report.figures()) >= {"pareto/one", "trade_off/two"}
    assert made.state_dict()["report"]["status"] == "infeasible"

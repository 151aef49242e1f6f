"""Several concepts in one run inside a Trainer: weights, patches, files and figures are what the report says."""

from __future__ import annotations

import itertools
import os
import time
import weakref
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from _callback import unlearn_callback
from _processes import in_processes
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_several import assert_near
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from _tiny import blobs, changed, snapshot, trained, trainer
from slug_lightning import UnlearnError, UnlearnPatch
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.methods.cross_effects import MAX_CONCEPTS
from slug_lightning.methods.slug.concept_search import ALTERNATIVES, ConceptSearch
from slug_lightning.objective.objective import Objective
from slug_lightning.reports.run_files import CHECKPOINT, PATCH, REPORT, WEIGHTS
from slug_lightning.reports.several import JointReport, report_from_json
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.names import file_name

pytestmark = pytest.mark.uncovered

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
    made = unlearn_callback(**{"forget": concepts(classes), "retain": retain, "retain_tolerance": 1e5, **options})
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
    model, made = forget(TWO, scales=STRENGTHS, output_dir=str(folder / "run"), logger=logger, retain_cache=str(folder / "kept"))
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
    assert all(bitwise_equal(saved[tensor], value) for tensor, value in snapshot(model).items())
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
    bounds = {"retain_tolerance": 5.0}
    model, made = forget(TWO, forget=asked, on_infeasible=on_infeasible, output_dir=str(tmp_path / "run"), **bounds)
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
        _, without = forget(TWO, **bounds)
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


# ---- what concepts share


def test_a_concept_within_another_is_forgotten_beside_it_and_that_is_told():
    model, made = forget({"both": (1, 2), "one": (1,)})
    report = made.report
    assert report.status == "unlearned" and any("'one' lies within 'both'" in note for note in report.notes)
    assert len(report.patch.edits) == 2
    for single in report.concepts.values():
        single.patch.revert(model)
    assert not changed(model, snapshot(trained()))


def test_two_concepts_may_choose_the_same_tensor(two):
    _, report, _ = two
    assert len(set(report.tensors)) == 1 and len(report.patch.edits) == 2
    assert report.layer == report.tensors[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: {"one": of(1), "again": of(1)}, "'one' and 'again' are the same data"),
        (lambda: {"one": of(1), "kept": of(0)}, "'kept'.*the same data as retain, or a part of it"),
        (lambda: {"one": of(1), "One!": of(2)}, "the concepts 'one' and 'One!' would have the same files"),
    ],
)
def test_concepts_that_cannot_be_told_apart_are_refused(asked, message):
    model = trained()
    with pytest.raises(UnlearnError, match=message):
        forget(TWO, model, retain=of(0, 3), forget=asked())
    assert not changed(model, snapshot(trained()))


def test_an_empty_dict_of_concepts_is_refused_at_once():
    with pytest.raises(UnlearnError, match="forget must name at least one concept"):
        unlearn_callback(forget={})


def test_the_same_samples_under_two_names_end_in_an_error_and_change_nothing():
    """Nobody sees that they are the same but by the edit, which would be there twice."""
    model = trained()
    with pytest.raises(UnlearnError, match="'again'|'one'|twice"):
        forget(TWO, model, forget={"one": of(1), "again": copy_of(1)})
    assert not changed(model, snapshot(trained()))


def test_a_single_patch_is_refused_on_another_base(two):
    _, report, _ = two
    other = trained()
    with torch.no_grad():
        dict(other.named_parameters())[report.tensors[0]].mul_(1.5)
    before = snapshot(other)
    for single in report.concepts.values():
        with pytest.raises(UnlearnError, match="not the patch's base"):
            single.patch.apply(other)
    assert not changed(other, before)


# ---- one more, later


WIDE = 2.0
"""A margin for an earlier run, whose edits cannot grow any more when others get in their way."""


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """`one` and `two`, and then `three` beside them."""
    folder = tmp_path_factory.mktemp("later")
    options = {"retain": of(0), "retain_cache": str(folder / "kept")}
    _, first = forget(TWO, output_dir=str(folder / "first"), step_margin=WIDE, **options)
    options["logger"] = TensorBoardLogger(folder, name="", version="events")
    model, made = forget(THREE, earlier=str(folder / "first"), output_dir=str(folder / "run"), **options)
    return model, made.report, folder, first.report


def test_one_more_concept_leaves_the_earlier_edits_as_they_are(later):
    model, report, folder, first = later
    assert report.status == "unlearned" and list(report.concepts) == list(THREE)
    assert {e.digest for e in first.patch.edits} < {e.digest for e in report.patch.edits}
    for name in TWO:
        assert report.concepts[name].patch_digest == first.concepts[name].patch_digest
        assert report.concepts[name].step_size == first.concepts[name].step_size
        found = UnlearnPatch.load(folder / "run" / "patches" / f"{name}.safetensors")
        assert found.digest == first.concepts[name].patch_digest
    made = trained()
    report.patch.apply(made)
    assert not changed(model, snapshot(made))
    for single in report.concepts.values():
        single.patch.revert(model)
    assert not changed(model, snapshot(trained()))
    report.patch.apply(model)


def test_the_retain_gradient_is_taken_from_the_folder(later):
    _, report, *_ = later
    assert any("retain: gradient taken from" in note for note in report.notes)
    assert set(report.collateral) == {"three"}


def test_with_the_same_layer_and_step_the_bits_are_those_of_asking_for_all_at_once(later, monkeypatch):
    model, report, *_ = later
    asked = {name: (single.layer, single.step_size) for name, single in report.concepts.items()}
    own = ConceptSearch.search

    def search(self):
        """As always, and then the step of the run before: which step that is, the interplay with others decides."""
        own(self)
        layer, step = asked[self.name]
        assert layer == self.chosen.layer
        self.set_step(step)

    monkeypatch.setattr(ConceptSearch, "search", search)
    all_at_once, made = forget(THREE)
    assert {name: (single.layer, single.step_size) for name, single in made.report.concepts.items()} == asked
    assert [found["change"] for found in made.report.rounds] == [None]
    assert {e.digest for e in made.report.patch.edits} == {e.digest for e in report.patch.edits}
    assert not changed(all_at_once, snapshot(model))


def test_the_run_after_an_earlier_one_can_be_an_earlier_one(later):
    _, report, folder, _ = later
    _, made = forget({**THREE, "pair": (2, 3)}, retain=of(0), earlier=str(folder / "run"))
    assert {e.digest for e in report.patch.edits} <= {e.digest for e in made.report.patch.edits}


@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_an_earlier_run_of_one_concept_counts_too_however_it_has_grouped_tensors(granularity, tmp_path):
    where = str(tmp_path / "run")
    _, made = forget({"one": (1,)}, retain=of(0, 3), output_dir=where, granularity=granularity, step_margin=WIDE)
    model, again = forget(TWO, earlier=where)
    report = again.report
    assert report.status == "unlearned" and len(report.patch.edits) == 2
    assert report.concepts["one"].patch_digest == made.report.patch_digest and report.concepts["one"].layer == made.report.layer
    report.patch.revert(model)
    assert not changed(model, snapshot(trained()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": {"two": (2,), "three": (3,)}}, "earlier: .* has also forgotten one; give its data in forget, too"),
        ({"classes": TWO}, "has forgotten all of this; name another concept"),
        ({"forget_metric": "val_acc", "forget_target": 0.25, "retain_metric": "val_acc"}, "was forgotten by forget_metric loss"),
        ({"earlier": "nowhere"}, "no report.json in nowhere"),
    ],
)
def test_what_does_not_fit_an_earlier_run_is_refused(options, message, two):
    _, _, folder = two
    options = {"classes": THREE, "earlier": str(folder / "run"), **options}
    model = trained()
    with pytest.raises((UnlearnError, FileNotFoundError), match=message):
        forget(model=model, **options)
    assert not changed(model, snapshot(trained()))


def test_an_earlier_run_on_another_base_is_refused(two):
    _, report, folder = two
    model = trained()
    report.patch.apply(model)  # as that run has left it, for one
    before = snapshot(model)
    with pytest.raises(UnlearnError, match="is not what it was when 'one' was forgotten; run on the model that the earlier run"):
        forget(THREE, model, earlier=str(folder / "run"))
    assert not changed(model, before)


# ---- again


def test_the_same_request_again_changes_nothing(tmp_path):
    model, made = forget(TWO, output_dir=str(tmp_path / "run"))
    after, report = snapshot(model), made.report
    retain = of(0)
    trainer(made).fit(model, retain, retain)
    assert made.report is report and not changed(model, after)
    # And from the checkpoint, with a callback that knows nothing.
    again = unlearn_callback(forget=concepts(TWO), retain=kept_of(TWO), retain_tolerance=1e5)
    other = trained()
    trainer(again).fit(other, retain, retain, ckpt_path=tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert not changed(other, after) and again.report == report


def test_another_set_of_concepts_is_another_request():
    model, made = forget(TWO)
    after = snapshot(model)
    made.forget = concepts({"three": (3,)})
    made.retain = of(0)
    trainer(made).fit(model, of(0), of(0))
    assert made.report.concept == "three" and changed(model, after)


# ---- many


@pytest.fixture
def watched(monkeypatch):
    """Weak references to all gradients that a run computes."""
    refs = []
    own = Objective.gradient

    def gradient(self, kind, parameters, *args, **options):
        found = own(self, kind, parameters, *args, **options)
        refs.extend(weakref.ref(tensor) for tensor in found.tensors.values())
        return found

    monkeypatch.setattr(Objective, "gradient", gradient)
    return refs


def test_a_request_keeps_only_the_layers_that_may_be_edited_and_the_run_none(watched, monkeypatch):
    held = []
    own = ConceptSearch.search

    def search(self):
        own(self)
        kept, gradient = self._kept, self._ways._gradient
        assert self.chosen.way in {way.key for way in kept} and len(kept) <= 1 + ALTERNATIVES
        assert set(gradient) == {name for way in kept for name in way.layer.layer.parameters}
        # Each by itself: a view would keep the whole gradient alive.
        assert all(g.untyped_storage().nbytes() == g.nbytes for g in gradient.values())
        # Of the concepts before nothing is left; of what is kept all, unless this is the last.
        held.append(sum(ref() is not None for ref in watched))

    monkeypatch.setattr(ConceptSearch, "search", search)
    _, made = forget(THREE)
    layers = sum(p.ndim == 2 for p in trained().parameters())
    assert made.report.status == "unlearned" and len(watched) == (1 + len(THREE)) * layers
    assert held == [layers, layers, 0]
    assert all(ref() is None for ref in watched)


class Hundreds(pl.LightningModule):
    """Tells 200 classes apart, by which of 200 inputs is largest."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(6)))
        with torch.no_grad():
            for layer in self.net:
                layer.weight.copy_(1.4 * torch.eye(200) + 0.005 * torch.randn(200, 200, generator=generator))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def samples(labels, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    noise = 0.01 * torch.randn(len(labels), 200, generator=generator)
    return DataLoader(TensorDataset(nn.functional.one_hot(labels, 200) + noise, labels), batch_size=64)


@pytest.mark.slow
def test_two_hundred_concepts_take_bounded_memory_and_time(watched):
    module, retain = Hundreds(), samples(list(range(190, 200)) * 3, 0)
    seconds = {}
    for count in (19, 190):  # the machine may be slow, but the time must not grow faster than the number
        forget = {f"c{i}": samples([i] * 4, i + 1) for i in range(count)}
        made = unlearn_callback(forget=forget, retain=retain, retain_tolerance=5.0, forget_target=3.0)
        before, start = snapshot(module), time.perf_counter()
        trainer(made).fit(module, retain)
        seconds[count] = time.perf_counter() - start
        if count == 19:
            made.report.patch.revert(module)
    report = made.report
    assert len(report.concepts) == 190 and len(report.collateral) == min(MAX_CONCEPTS, len(report.unlearned))
    assert all(ref() is None for ref in watched)
    assert seconds[190] < 2 * 10 * seconds[19]
    report.patch.revert(module)
    assert not changed(module, before)


# ---- several processes


def in_one_of() -> tuple[dict, dict[str, torch.Tensor]]:
    """What one of several processes finds; alone where it is the only one."""
    several = int(os.environ["WORLD_SIZE"])
    made = unlearn_callback(forget=concepts(TWO), retain=kept_of(TWO), retain_tolerance=1e5, scales=[0.5])
    options = {"strategy": DDPStrategy(timeout=timedelta(seconds=30))} if several > 1 else {}
    model = trained()
    trainer(made, devices=several, **options).fit(model, of(0), of(0))
    report = {name: value for name, value in made.report.to_dict().items() if name not in ("cost", "notes", "patch_digest")}
    for single in report["concepts"].values():
        del single["patch_digest"]
    return report, snapshot(model)


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_processes_find_what_one_finds():
    (one, alone), *_ = in_processes(1, in_one_of)
    (report, weights), (other, others) = in_processes(2, in_one_of)
    assert report == other and all(torch.equal(weights[name], others[name]) for name in weights)
    assert_near(report, one)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)

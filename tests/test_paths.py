"""Paths, the contest of ways, the choice by measured damage, and more layers than one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from _tiny import accuracy, changed, fit, loader, snapshot, trained
from slug_lightning.errors import UnlearnError
from slug_lightning.methods.slug import SLUG
from slug_lightning.methods.slug.candidates import REST, measured, pareto
from slug_lightning.methods.slug.choice import LeastDamage, LeastUsage
from slug_lightning.methods.slug.concept_search import ConceptSearch
from slug_lightning.methods.slug.curves import CurveEnd, Tangent, line, path
from slug_lightning.methods.slug.directions import Covariance
from slug_lightning.methods.slug.first_steps import Way
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.methods.slug.step_search import START, interpolation
from slug_lightning.methods.targets import Target
from slug_lightning.methods.trial import RetainDetails, Trial
from slug_lightning.objective.metrics import Metric
from slug_lightning.objective.objective import LOSS, Objective
from slug_lightning.reports.figures import trade_off_figure
from slug_lightning.tensors.layers import Layer

BENDS = [0.05, 0.1, 0.2, 0.4, 0.8]


class Hill:
    """A layer of two numbers, W = (3, 4), and a direction that turns with the place."""

    def __init__(self, losses=None) -> None:
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        self.layer = LayerStatistics(Layer("w", {"w": self.weight}), 5.0, 1.0, 1.0, 0.0)
        self.asked: list[torch.Tensor] = []
        self.losses = losses or [float(number) for number in range(9)]

    def direction(self, change):
        turn = change.norm().item()
        return 7.0 * torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)

    def tangent(self, at=None):
        change = torch.zeros(2, dtype=torch.float64) if at is None else at.step * at.direction["w"]
        self.asked.append(change)
        return Tangent({"w": self.direction(change)}, 7.0, self.losses[len(self.asked) - 1])

    def walked(self, distance, straight_after=math.inf):
        """The same walk, segment by segment."""
        change, gone = torch.zeros(2, dtype=torch.float64), 0.0
        for end in [bend for bend in BENDS if bend < min(distance, straight_after)] + [distance]:
            change = change + (end - gone) * 5.0 * self.direction(change) / 7.0
            gone = end
        return change


@given(st.floats(0.001, 1.5), st.one_of(st.just(math.inf), st.floats(0.001, 1.5)))
def test_a_path_takes_a_new_direction_whenever_the_way_has_doubled(distance, straight_after):
    hill = Hill()
    edit = path(hill.layer, hill.tangent)(distance, straight_after=straight_after)
    torch.testing.assert_close(edit.step * edit.direction["w"], hill.walked(distance, straight_after))
    assert len(hill.asked) == 1 + sum(bend < min(distance, straight_after) for bend in BENDS)


@given(st.lists(st.floats(0.001, 1.5), min_size=1, max_size=6))
def test_the_same_distance_gives_the_same_bits_whatever_was_asked_before(distances):
    hill = Hill()
    point = path(hill.layer, hill.tangent)
    first = [point(distance).direction["w"] for distance in distances]
    asked = len(hill.asked)
    assert all(torch.equal(point(d).direction["w"], before) for d, before in zip(distances, first, strict=True))
    assert len(hill.asked) == asked


def test_a_path_and_a_line_agree_up_to_the_first_bend():
    hill = Hill()
    edits = [curve(hill.layer, hill.tangent)(0.05) for curve in (line, path)]
    changes = [edit.step * edit.direction["w"] for edit in edits]
    torch.testing.assert_close(*changes)


def test_a_path_ends_where_the_loss_has_not_risen_over_two_segments():
    hill = Hill(losses=[1.0, 2.0, 1.9, 2.0, 5.0])
    point = path(hill.layer, hill.tangent)
    point(0.4)  # bends at 0.05, 0.1 and 0.2: losses 2, 1.9, 2
    with pytest.raises(CurveEnd, match="plateau"):
        point(0.5)
    assert len(hill.asked) == 4
    rising = Hill(losses=[1.0, 2.0, 1.9, 2.1, 2.0, 2.2])
    path(rising.layer, rising.tangent)(0.9)


# ---- which trial wins


def trial(name, usage, loss=None, step=0.1, forgotten=True):
    """One whose batches have this usage, 10 samples each."""
    details = RetainDetails({"acc": {number: (value, 10) for number, value in enumerate(usage)}}, loss)
    return Trial(name, 1.0, step, forgotten, sum(usage) / len(usage), 0.0, {}, details=details)


def chosen(*trials):
    return LeastDamage()(trials).trial.layer


def test_a_difference_within_noise_is_a_tie_that_the_loss_decides_and_then_the_step():
    noisy = trial("a", [0.0, 0.4, 0.0, 0.2], loss=3.0), trial("b", [0.3, 0.0, 0.5, 0.1], loss=2.0, step=0.2)
    assert chosen(*noisy) == "b" and LeastUsage()(noisy).trial.layer == "a"
    without = trial("a", [0.0, 0.4, 0.0, 0.2]), trial("b", [0.3, 0.0, 0.5, 0.1], loss=2.0, step=0.05)
    assert chosen(*without) == "b"  # a loss that only one has decides nothing
    # The same mean difference, in every batch: that is no noise.
    assert chosen(trial("a", [0.15] * 4, loss=3.0), trial("b", [0.225] * 4, loss=2.0)) == "a"


def test_a_trial_that_is_worse_on_one_metric_is_no_tie():
    def both(name, style, thing):
        batches = {"style": {0: (style, 9), 1: (style, 9)}, "thing": {0: (thing, 9), 1: (thing, 9)}}
        return Trial(
            name, 1.0, 0.1, True, max(style, thing), 0.0, {}, details=RetainDetails(batches, 1.0 if name == "a" else 0.0)
        )

    assert chosen(both("a", 0.5, 0.1), both("b", 0.1, 0.6)) == "a"
    assert chosen(both("a", 0.5, 0.1), both("b", 0.5, 0.1)) == "b"


def test_no_feasible_trial_asks_for_more_layers():
    assert LeastDamage()([trial("a", [2.0]), trial("b", [0.1], forgotten=False)]) == (None, True)


def test_a_metric_that_is_no_mean_over_batches_is_compared_as_a_whole():
    trials = [Trial("a", 1.0, 0.2, True, 0.5, 0.0, {}), Trial("b", 1.0, 0.1, True, 0.5001, 0.0, {})]
    assert chosen(*trials) == "a"


# ---- which layers are searched


def statistics(name, importance, alignment, known):
    inner = None if alignment is None else alignment * importance
    return LayerStatistics(Layer(name, {}), 1.0, importance, None if inner is None else 1.0, inner, is_known=known)


def test_known_layers_go_every_way_then_the_front_goes_along_the_gradient():
    layers = [statistics("known", 1.0, 0.05, True), statistics("front", 2.0, 0.1, False), statistics("rest", 0.5, 0.5, False)]
    found = [(c.layer, c.round, c.along) for c in measured(layers)]
    published = [("known", 1, "gradient"), ("front", 1, "gradient")]
    assert found == [("known", 0, None), *published, ("front", 2, None), ("rest", 2, None)]
    assert [c.layer for c in pareto(layers)] == ["known", "front"]


def test_without_a_retain_gradient_there_is_no_front_and_the_rest_comes_in_small_rounds():
    layers = [statistics(str(number), 1.0, None, number == 0) for number in range(2 * REST + 2)]
    rounds = [candidate.round for candidate in measured(layers)]
    assert rounds == [0] + [2] * REST + [3] * REST + [4]


def test_what_the_published_procedure_forgets_is_feasible_by_default_though_no_sparing_way_is():
    class Nowhere(Covariance):
        """Leads downhill as far as anybody can see."""

        def __call__(self, layer, forget_gradient):
            return {name: torch.ones_like(g) for name, g in forget_gradient.items()}

    _, _, report = forgetting(direction=Nowhere(), score="measured", max_evaluations=4)
    assert report.status == "unlearned"
    (trial,) = [t for t in report.trace if t["retain"]][-1:]
    assert trial.get("direction", "gradient") == "gradient"


# ---- as a user gets them


def forgetting(metric="val_acc", target=0.0, tolerance=0.02, retain="val_acc", **options):
    """Run the callback on a small classifier; returns the module, its weights before, and the report."""
    module = trained()
    before = snapshot(module)
    data = {"forget": loader(True), "retain": loader(False), "forget_metric": metric, "retain_metric": retain}
    callback = unlearn_callback(**data, forget_target=target, retain_tolerance=tolerance, **options)
    fit(callback, module)
    return module, before, callback.report


def test_directions_and_curves_compete_and_the_report_says_which_won():
    contest = {"direction": ["covariance", "gradient"], "curve": "both", "score": "measured", "choice": "least_damage"}
    module, before, report = forgetting(**contest)
    ways = {(t["layer"], t.get("direction", "gradient"), t.get("curve", "line")) for t in report.trace}
    assert {(direction, curve) for _, direction, curve in ways} >= {("covariance", "line"), ("gradient", "line")}
    assert report.status == "unlearned" and changed(module, before) == {report.layer}
    assert accuracy(module, forget=True) < 0.1 and accuracy(module, forget=False) > 0.95
    moved = module.state_dict()[report.layer] - before[report.layer]
    assert report.relative_step == pytest.approx((moved.norm() / before[report.layer].norm()).item(), rel=1e-5)


def test_paths_are_followed_where_each_line_costs_something():
    rules = {"direction": "covariance", "curve": "both", "choice": "least_damage", "layers": "net.0.weight"}
    for retain, curves in (("val_loss", {"line", "path"}), ("val_acc", {"line"})):
        _, _, report = forgetting(**rules, retain=retain, tolerance=1.0)
        (least, *_) = [t["constraint_usage"] for t in report.trace if t["forgotten"] and t["retain"]]
        assert (least > 0) == ("path" in curves)
        assert {t.get("curve", "line") for t in report.trace} == curves


@pytest.mark.parametrize("direction", ["kfac", "batch", "engram", "retain_null_space"])
def test_every_direction_forgets_by_its_name(direction):
    module, before, report = forgetting(direction=direction, layers="net.6.weight", tolerance=1.0)
    assert report.status == "unlearned" and changed(module, before) == {"net.6.weight"}
    assert {t["direction"] for t in report.trace} == {direction}


def test_recordings_are_let_go_where_no_direction_turns(monkeypatch):
    held, search = [], ConceptSearch.search

    def searched(self):
        search(self)
        held.append(self.objective.evaluator.batches)

    monkeypatch.setattr(ConceptSearch, "search", searched)
    forgetting(direction="engram", curve="both", score="measured", tolerance=1.0)
    assert held == [{}]


def test_a_path_is_the_same_bits_with_replay_and_without():
    found = [forgetting(curve="path", replay=replay) for replay in (True, False)]
    (first, before, _), (second, _, _) = found
    assert found[0][2].trace == found[1][2].trace and changed(first, before)
    assert not changed(first, snapshot(second))


def test_where_one_layer_is_not_enough_another_is_added_and_the_patch_undoes_both():
    options = {"metric": "val_loss", "target": None, "max_step": 0.3}
    _, _, alone = forgetting(**options)
    assert alone.status == "infeasible" and any("max_step" in t.get("ended", "") for t in alone.trace)
    module, before, report = forgetting(max_layers=3, **options)
    edited = changed(module, before)
    assert report.status == "unlearned" and len(edited) == 2
    assert set(report.layer.split(" + ")) == edited
    assert any("another layer is searched" in note for note in report.notes)
    weights = [torch.cat([tensors[name].flatten() for name in sorted(edited)]) for tensors in (module.state_dict(), before)]
    assert report.relative_step == pytest.approx(((weights[0] - weights[1]).norm() / weights[1].norm()).item(), rel=1e-5)
    report.patch.revert(module)
    assert not changed(module, before)


def test_without_the_front_the_retain_set_is_only_passed_forward(monkeypatch):
    kinds = []
    own = Objective.gradient

    def gradient(self, kind, *args, **options):
        kinds.append(kind)
        return own(self, kind, *args, **options)

    monkeypatch.setattr(Objective, "gradient", gradient)
    module, before, report = forgetting(direction="covariance", score="measured", front=False)
    assert set(kinds) == {"forget"} and report.status == "unlearned" and changed(module, before)
    assert all(row["alignment"] is None for row in report.scores)


def test_paper_is_what_it_says_and_the_default_is_not():
    paper = SLUG.paper(max_evaluations=3)
    assert (paper.direction, paper.curve, paper.score, paper.choice) == ("gradient", "line", "pareto", "least_usage")
    assert paper.max_evaluations == 3 and paper.request()["step_margin"] == 0.0 and not paper.binds_near()
    spared = SLUG()
    assert (spared.direction, spared.curve, spared.score, spared.choice) == ("covariance", "both", "measured", "least_damage")
    assert spared.request()["step_margin"] == 0.5 and spared.binds_near()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"direction": "uphill"}, "direction must be 'gradient'"),
        ({"direction": []}, "at least one"),
        ({"direction": ["kfac", "kfac"]}, "different names"),
        ({"direction": None}, "direction must be 'gradient'"),
        ({"direction": ["gradient", Covariance]}, "or an object, got <class"),
        ({"max_step": 0.0}, "max_step must be a number > 0"),
        ({"max_step": "2"}, "max_step must be a number > 0, got '2'"),
        ({"max_layers": 0}, "max_layers must be a whole number >= 1"),
        ({"max_layers": 1.5}, "max_layers must be a whole number >= 1, got 1.5"),
        ({"curve": ["line", "path"]}, "curve must be 'line' or 'path' or 'both'"),
        ({"source": "retain"}, "source must be 'forget' or 'anchored'"),
        ({"front": False, "score": "pareto"}, "score='measured'"),
        ({"curve": "circle"}, "curve must be"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, problem):
    with pytest.raises(UnlearnError, match=problem):
        SLUG(**options)


def test_no_layer_left_to_add_is_infeasible_and_no_error():
    options = {"metric": "val_loss", "target": None, "max_step": 0.05, "max_layers": 3, "layers": "net.6.weight"}
    module, before, report = forgetting(**options)
    assert report.status == "infeasible" and not changed(module, before)
    assert max(t["relative_step"] for t in report.trace) == pytest.approx(0.05)  # the limit itself is tried
    assert not any("stays at" in note for note in report.notes)


def test_further_layers_share_one_tolerance():
    """What the first edit has cost counts with what the second costs."""
    _, _, report = forgetting(metric="val_loss", target=None, max_step=0.3, max_layers=3, tolerance=0.02)
    last = [t for t in report.trace if t["forgotten"] and t["constraint_usage"] is not None][-1]
    lost = (report.search_before["retain"]["val_acc"] - last["retain"]["val_acc"]) / 0.02
    assert last["constraint_usage"] == pytest.approx(max(lost, 0.0), abs=1e-6)


class Starts:
    """A search that goes nowhere but remembers where ways start; `enough` is the step that each of them needs."""

    def __init__(self, enough: float | None, metric: str = "accuracy", target: float = 0.0, is_contest: bool = True) -> None:
        self.enough, self.found = enough, []
        targets = [Target(Metric(metric, metric != "loss"), target, "given", before=0.0)]
        concept = SimpleNamespace(objective=None, targets=targets, share=lambda trial: trial.forget)
        options = {"max_evaluations": 9, "max_step": 2.0, "is_contest": is_contest}
        self.search = LayerSearch(concept, None, search=self, choice=LeastUsage(), **options)  # type: ignore[arg-type]

    def __call__(self, evaluate, share, most, start):
        self.found.append(start)
        return [] if self.enough is None else [Trial("", 1.0, self.enough, True, None, 0.0, None)]

    def of(self, name, tower, slope, direction="covariance", curve="line", forget_norm=2.0):
        layer = LayerStatistics(Layer(name, {}, tower), 5.0, forget_norm, 1.0, 0.0)
        self.search.search_steps(Way(layer, direction, curve, None, lambda: slope))  # type: ignore[arg-type]
        return self.found[-1]


def test_a_way_starts_where_others_of_its_tower_were_enough_at_first_order():
    starts = Starts(enough=0.3)
    assert starts.of("a", "text", slope=2.0) == START
    assert starts.of("b", "text", slope=3.0) == pytest.approx(0.3 * 2.0 / 3.0)
    assert starts.of("c", "image", slope=3.0) == pytest.approx((0.6 + 0.9) / 2 / 3.0)  # nothing else is known
    assert starts.of("d", "text", slope=1.0, direction="kfac") == pytest.approx(0.3 * (2.0 + 3.0) / 2)
    assert starts.of("e", "text", slope=0.01) == 1.0
    assert starts.of("g", "text", slope=6.0, direction="gradient") == pytest.approx((0.6 + 0.3) / 2 / 6.0)
    assert starts.of("f", "text", slope=-1.0) == START  # downhill: nothing is promised
    assert starts.of("a", "text", slope=2.0, curve="path") == pytest.approx(0.8 * 0.3)


def test_lines_of_the_gradient_alone_start_where_the_layer_before_was_enough():
    starts = Starts(enough=0.3, is_contest=False)
    assert starts.of("a", "text", slope=10.0, direction="gradient") == START  # ‖θ‖ ‖g_f‖ is 5 · 2
    assert starts.of("b", "image", slope=20.0, direction="gradient", forget_norm=4.0) == pytest.approx(0.3 * 10.0 / 20.0)


def test_a_path_that_begins_beyond_its_plateau_is_tried_from_the_start(monkeypatch):
    # The line needs 1.8; the path reaches a flat top at 0.05, beyond which nothing rises.
    hill = Hill(losses=[0.0] + [1.0] * 20)
    targets = [Target(Metric("accuracy", True), 0.0, "given", before=1.0)]
    concept = SimpleNamespace(objective=None, targets=targets, share=lambda trial: trial.forget)
    options = {"max_evaluations": 9, "max_step": 2.0, "is_contest": True}
    search = LayerSearch(concept, None, search=interpolation, choice=LeastUsage(), **options)  # type: ignore[arg-type]

    def measured(way, advance, distance, straight_after=math.inf):
        way.point(distance)
        share = min(distance / 0.09, 1.04) if way.curve == "path" else distance / 1.8
        return Trial(
            "w", 1.0, distance, share >= 1, None, share, None, direction="covariance", curve=way.curve, distance=distance
        )

    monkeypatch.setattr(search, "_forget", measured)
    for name, curve in (("line", line), ("path", path)):
        search.search_steps(Way(hill.layer, "covariance", name, curve(hill.layer, hill.tangent), lambda: 1.0))
    assert search.smallest["w", "covariance", "line"].relative_step >= 1.8
    assert 0.09 <= search.smallest["w", "covariance", "path"].relative_step <= 0.1


def test_of_a_loss_what_is_missing_says_where_to_start():
    starts = Starts(enough=None, metric=LOSS, target=1.5)
    assert starts.of("a", "text", slope=3.0) == pytest.approx(1.5 / 3.0)
    assert starts.of("b", "text", slope=10.0, direction="gradient") == pytest.approx(1.5 / 10.0)


def test_the_trade_off_figure_has_a_line_for_each_way_and_marks_the_one_that_was_taken():
    ways = [("gradient", "line", 0.4), ("covariance", "line", 0.2), ("covariance", "path", 0.1)]
    trials = [
        Trial(
            "w", 1.0, step, True, 0.5, 0.0, {"acc": 0.9}, direction=d, curve=c, distance=None if c == "line" else step
        ).to_dict()
        for d, c, step in ways
    ]
    metrics = {"forget": {"acc": 1.0}, "retain": {"acc": 1.0}}
    figure = trade_off_figure(trials, metrics, metrics, ("w", 0.1), {"acc": 0.25}, {"acc": 0.8})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert {"w", "w (covariance, line)", "w (covariance, path)"} <= lines.keys()
    assert [name for name, line in lines.items() if line.get_color() == "black"] == ["w (covariance, path)"]


def test_a_direction_that_leads_nowhere_ends_its_way_and_not_the_run():
    class Fading:
        """Uphill at first, and after the first bend nowhere."""

        needs = frozenset()
        asked = 0

        def __call__(self, layer, gradient):
            Fading.asked += 1
            return {name: g if Fading.asked == 1 else torch.zeros_like(g) for name, g in gradient.items()}

    _, _, report = forgetting(direction=[Fading(), "gradient"], curve="path", layers="net.6.weight")
    assert report.status == "unlearned" and Fading.asked == 2
    assert report.layer == "net.6.weight" and any("along gradient, path" in note for note in report.notes)

"""A report survives JSON, reads as text and can be drawn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from _amounts import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.single import UnlearnReport

pytestmark = [pytest.mark.figures, pytest.mark.uncovered]

TRIALS = [("a.weight", 0.1, 0.8, None), ("a.weight", 0.2, 0.1, 0.89), ("b.weight", 0.2, 0.05, 0.5), ("b.weight", 0.1, 0.7, None)]


def score(layer: str, importance: float, alignment: float, on_front: bool, tower: str = "model") -> dict:
    return {
        "layer": layer, "tower": tower, "importance": importance, "alignment": alignment,
        "forget_norm": importance, "weight_norm": 1.0, "on_front": on_front,
    }  # fmt: skip


def unlearned(**changes) -> UnlearnReport:
    report = UnlearnReport(
        status="unlearned", concept="cats", layer="a.weight", tensors=["a.weight"], step_size=0.7, relative_step=0.2,
        bounds={
            "forget_metric": "acc", "forget_target": 0.125, "forget_target_reason": "given", "retain_metrics": ["acc", "ce"],
            "retain_tolerance": 0.02, "higher_is_better": {"acc": True, "ce": False},
        },
        scores=[score("a.weight", 2.0, 0.1, True), score("b.weight", 3.0, 0.4, True), score("c.weight", 1.0, 0.9, False)],
        trace=[
            {"layer": name, "step": step, "relative_step": step, "forgotten": kept is not None, "constraint_usage": None,
             "forget": forget, "retain": None if kept is None else {"acc": kept, "ce": 1.0}}
            for name, step, forget, kept in TRIALS
        ],
        before={"forget": {"acc": 0.9375}, "retain": {"acc": 0.8125, "ce": 1.5}},
        after={"forget": {"acc": 0.0625}, "retain": {"acc": 0.8025, "ce": 1.525}},
        search_before={"forget": {"acc": 0.95}, "retain": {"acc": 0.9, "ce": 0.5}},
        search_after={"forget": {"acc": 0.1}, "retain": {"acc": 0.89, "ce": 0.6}},
        holds=True, cost={"seconds": {"search": 3.0, "gradients": 1.0}, "evaluations": 4},
    )  # fmt: skip
    return replace(report, **changes)


def infeasible() -> UnlearnReport:
    before = unlearned()
    return replace(
        before, status="infeasible", layer=None, tensors=[], step_size=None, relative_step=None, holds=None,
        after=before.before, search_after=before.search_before,
    )  # fmt: skip


# ---- plain data

floats = st.floats(allow_nan=False, allow_infinity=False)
measured = st.fixed_dictionaries({"forget": st.dictionaries(st.text(), floats), "retain": st.dictionaries(st.text(), floats)})
plain = st.recursive(
    st.none() | st.booleans() | floats | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=12
)
tables = st.lists(st.dictionaries(st.text(), plain, max_size=4), max_size=3)
reports = st.builds(
    UnlearnReport, status=st.sampled_from(["unlearned", "infeasible"]), concept=st.text(), layer=st.none() | st.text(),
    tensors=st.lists(st.text()), step_size=st.none() | floats, relative_step=st.none() | floats,
    bounds=st.dictionaries(st.text() | st.just("patch"), plain, max_size=4), scores=tables, trace=tables,
    before=measured, after=measured, search_before=measured, search_after=measured, holds=st.none() | st.booleans(),
    cost=st.dictionaries(st.text(), plain, max_size=3), notes=st.lists(st.text()), versions=st.dictionaries(st.text(), st.text()),
    patch_digest=st.none() | st.text(), patch=st.none(),
)  # fmt: skip


@examples(50, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(report=reports)
def test_json_gives_back_the_same_report(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    report.to_json(path)
    assert UnlearnReport.from_json(path) == report
    assert json.loads(path.read_text()) == report.to_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_as_null_at_every_depth(bad, tmp_path):
    report = unlearned(after={"forget": {"acc": bad}, "retain": {"acc": 0.5, "ce": bad}}, trace=[{"retain": {"acc": bad}}])
    report.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    data = json.loads(text)
    assert data["after"] == {"forget": {"acc": None}, "retain": {"acc": 0.5, "ce": None}}
    assert data["trace"] == [{"retain": {"acc": None}}]


def test_a_report_read_back_with_null_in_it_still_reads_as_text(tmp_path):
    unlearned(after={"forget": {"acc": 0.1}, "retain": {"acc": math.nan, "ce": 1.0}}).to_json(tmp_path / "report.json")
    assert "acc" in UnlearnReport.from_json(tmp_path / "report.json").to_text()


def test_fields_of_a_newer_version_are_left_out():
    assert UnlearnReport.from_dict(unlearned().to_dict() | {"invented_later": 1, "patch": "nonsense"}) == unlearned()


def test_the_patch_is_not_in_the_data_and_stays_with_the_report():
    patch = UnlearnPatch({"w": torch.ones(2)}, [Edit("cats", 0.5, {"w": torch.ones(2)})])
    report = unlearned(patch=patch)
    assert "patch" not in report.to_dict()
    assert report.patch is patch
    assert report == unlearned()


# ---- text


def row(report: UnlearnReport, start: str) -> list[str]:
    (line,) = [line for line in report.to_text().splitlines() if line.strip(" │").startswith(start)]
    return [cell.strip() for cell in line.strip(" │").split("│")]


def test_the_table_shows_each_metric_before_and_after_with_its_bound():
    report = unlearned()
    assert "cats: unlearned" in report.to_text()
    assert row(report, "forget: acc") == ["forget: acc", "0.9375", "0.0625", "≤ 0.1250"]
    assert row(report, "retain: acc") == ["retain: acc", "0.8125", "0.8025", "≥ 0.7925"]
    assert row(report, "retain: ce") == ["retain: ce", "1.5000", "1.5250", "≤ 1.5300"]


def test_the_table_shows_layer_step_and_cost():
    lines = unlearned().to_text().splitlines()
    assert "edited: a.weight, relative step 0.2000" in lines
    assert any(line.startswith("4 evaluations; ") and "search 3.0 s (75%)" in line for line in lines)


def test_the_bound_of_a_loss_to_forget_is_from_below():
    bounds = unlearned().bounds | {"higher_is_better": {"acc": False, "ce": False}}
    assert row(unlearned(bounds=bounds), "forget: acc")[-1] == "≥ 0.1250"


def test_the_verdict_says_what_happened():
    assert unlearned().to_text().endswith("Both bounds hold on the test split as well.")
    assert unlearned(holds=False).to_text().endswith("A bound does not hold on the test split.")
    text = " ".join(replace(infeasible(), trace=[]).to_text().split())
    assert "the weights are as they were. None reaches the forget target" in text
    assert "edited" not in text


def test_an_infeasible_run_says_how_near_it_came():
    trial = {"layer": "a.weight", "step": 1.0, "relative_step": 0.25, "forget": 0.0, "retain": {"acc": 0.5}, "forgotten": True}
    trace = [
        trial | {"constraint_usage": 7.5},
        trial | {"constraint_usage": 3.0, "relative_step": 0.125},
        trial | {"constraint_usage": None, "forgotten": False},
    ]
    text = " ".join(replace(infeasible(), trace=trace).to_text(width=300).split())
    nearest = "Nearest: a.weight reaches the forget target at relative step 0.1250, "
    assert nearest + "but violates retain_tolerance: acc=0.5000 (bound ≥ 0.8800)." in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_wider_than_asked(width):
    report = unlearned(layer="encoder.layers.11.attention.projection." * 4 + "weight")
    assert max(len(line) for line in report.to_text(width).splitlines()[:-1]) <= width


@pytest.mark.parametrize("concept", ["cat [animal]", "a :cat: here", "x [/x]"])
def test_brackets_and_colons_in_a_name_are_shown_as_they_are(concept):
    assert f"{concept}: unlearned" in unlearned(concept=concept).to_text()


# ---- figures


@pytest.mark.parametrize("report", [
    unlearned(), infeasible(), replace(unlearned(), scores=unlearned().scores[:1], trace=unlearned().trace[:2]),
], ids=["unlearned", "infeasible", "one layer"])  # fmt: skip
def test_both_figures_can_be_drawn(report, tmp_path):
    figures = report.figures()
    assert list(figures) == ["pareto", "trade_off"]
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def labelled(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_the_pareto_figure_shows_all_layers_the_front_of_each_tower_and_the_edited_one():
    report = unlearned()
    report.scores.append(score("d.weight", 5.0, 0.2, True, tower="vision"))
    (axes,) = report.figures()["pareto"].axes
    assert "importance" in axes.get_xlabel() and "cos" in axes.get_ylabel() and axes.get_xscale() == "log"
    assert "cats" in axes.get_title()
    # One set of points a tower: the layers off its front.
    assert sorted(len(c.get_offsets()) for c in axes.collections) == [0, 1]
    lines = labelled(axes)
    assert points(lines["front"]) == [(2.0, 0.1), (3.0, 0.4)]
    assert points(lines["front of the vision tower"]) == [(5.0, 0.2)]
    assert points(lines["1  a.weight  (edited)"]) == [(2.0, 0.1)]
    assert points(lines["2  b.weight"]) == [(3.0, 0.4)] and points(lines["3  d.weight"]) == [(5.0, 0.2)]
    assert sorted(t.get_text() for t in axes.texts) == ["1", "2", "3"]
    assert not any("edited" in label for label in labelled(infeasible().figures()["pareto"].axes[0]))


def test_the_trade_off_figure_shows_search_data_with_both_bounds():
    left, right = unlearned().figures()["trade_off"].axes
    assert "relative step" in left.get_xlabel() and right.get_xlabel() == "retain: acc"
    assert left.get_ylabel() == right.get_ylabel() == "forget: acc"
    assert points(labelled(left)["a.weight"]) == [(0.0, 0.95), (0.1, 0.8), (0.2, 0.1)]
    assert points(labelled(left)["b.weight"]) == [(0.0, 0.95), (0.1, 0.7), (0.2, 0.05)]
    for axes in (left, right):
        assert set(labelled(axes)["forget target"].get_ydata()) == {0.125}
    assert list(labelled(right)["retain bound"].get_xdata()) == pytest.approx([0.88, 0.88])
    assert points(labelled(right)["before"]) == [(0.9, 0.95)]
    assert points(labelled(right)["chosen"]) == [(0.89, 0.1)]
    assert "chosen" not in labelled(infeasible().figures()["trade_off"].axes[1])


def test_a_retain_loss_is_bounded_from_above():
    def only_ce(values):
        return {"forget": values["forget"], "retain": {"ce": values["retain"]["ce"]}}

    report = unlearned(search_before=only_ce(unlearned().search_before), search_after=only_ce(unlearned().search_after))
    right = report.figures()["trade_off"].axes[1]
    assert list(labelled(right)["retain bound"].get_xdata()) == pytest.approx([0.51, 0.51])

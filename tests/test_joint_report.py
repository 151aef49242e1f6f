"""The report of several concepts: nothing is lost on the way through JSON, and everything can be shown."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
from _amounts import sample
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_loggers import a_report, an_infeasible_report

from slug_lightning.reports.figures import SHOWN
from slug_lightning.reports.loggers import publish
from slug_lightning.reports.several import JointReport, report_from_dict, report_from_json
from slug_lightning.reports.single import UnlearnReport

pytestmark = pytest.mark.figures


def joint(*names: str, left: tuple[str, ...] = ()) -> JointReport:
    """A report of which every number but those of the collateral is made up."""
    concepts = {}
    for name in names:
        concepts[name] = an_infeasible_report() if name in left else a_report()
        concepts[name].concept = name
        concepts[name].bounds["retain_metrics"] = ["acc"]
    values = {when: {"forget": dict.fromkeys(names, v), "retain": {"acc": 0.75}} for when, v in (("before", 0.9), ("after", 0.3))}
    done = [name for name in names if name not in left]
    collateral = {edit: {name: 0.25 if name == edit else 0.875 for name in done} for edit in done}
    status = "unlearned" if not left else "partly" if done else "infeasible"
    return JointReport(status, concepts, [], collateral if done else {}, holds=True if done else None, **values)


def names(count: int) -> list[str]:
    return [f"concept number {i}" for i in range(count)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json_and_the_rest_comes_back(value, tmp_path):
    report = joint("cats", "dogs")
    report.collateral["cats"]["dogs"] = report.after["forget"]["dogs"] = value
    report.concepts["dogs"].trace[0]["constraint_usage"] = value
    report.to_json(tmp_path / "report.json")
    again = report_from_json(tmp_path / "report.json")
    assert again.collateral["cats"]["dogs"] is None and again.after["forget"]["dogs"] is None
    assert again.concepts["dogs"].trace[0]["constraint_usage"] is None
    for one in (again, report):
        one.collateral["cats"]["dogs"] = one.after["forget"]["dogs"] = one.concepts["dogs"].trace[0]["constraint_usage"] = 0.0
    assert again == report


def test_a_report_of_either_kind_is_read_as_what_it_is(tmp_path):
    for report in (a_report(), joint("cats")):
        report.to_json(tmp_path / "report.json")
        assert report_from_json(tmp_path / "report.json") == report == report_from_dict(report.to_dict())
    assert isinstance(report_from_dict(a_report().to_dict()), UnlearnReport)


def test_what_a_newer_version_added_is_left_out():
    data = json.loads(json.dumps(joint("cats").to_dict()))
    data["news"] = data["concepts"]["cats"]["more"] = 1
    assert JointReport.from_dict(data) == joint("cats")


@pytest.mark.parametrize("count", [1, 2, SHOWN, SHOWN + 1, 30])
def test_text_names_every_concept_and_keeps_to_its_width(count):
    for width in (80, 180):
        text = joint(*names(count), left=(names(count)[-1],)).to_text(width)
        assert max(map(len, text.splitlines())) <= width
        joined = " ".join(text.split())
        assert width == 80 or all(name in joined for name in names(count))
    assert ("each edit alone" in text) == (2 < count <= SHOWN + 1)


def verdict(report) -> str:
    return report.to_text(400).splitlines()[-1]


def test_the_last_line_says_how_it_ended():
    assert verdict(joint("a", "b")) == "All bounds hold on the test split as well."
    assert verdict(joint("a", "b", left=("b",))) == "Left as they were: b. All bounds hold on the test split as well."
    report = joint("a", "b", left=("a", "b"))
    assert verdict(report) == "Left as they were: a, b. Nothing was edited; the weights are as they were."
    report = joint("a", "b")
    report.holds = False
    assert verdict(report) == "A retain bound does not hold on the test split."
    report.after["forget"]["b"] = 0.9
    assert verdict(report) == "The forget bound does not hold on the test split for: b."


def test_what_was_unlearned_is_told_apart():
    report = joint("a", "b", "c", left=("b",))
    assert list(report.unlearned) == ["a", "c"] and report.concept == "a, b, c"
    assert (report.layer, report.tensors) == ("a.weight", ["a.weight"])
    assert (joint("a", left=("a",)).layer, joint("a", left=("a",)).tensors) == (None, [])


@pytest.mark.parametrize(
    ("count", "value"), sample(product([1, 2, 30], [0.5, math.nan, None]), [(1, None), (2, math.nan), (30, 0.5)])
)
def test_figures_draw(count, value):
    report = joint(*names(count))
    report.collateral[names(count)[0]][names(count)[-1]] = value
    for single in report.concepts.values():
        single.strengths = [{"strength": s, "forget": {"acc": s}, "retain": {"acc": 1.0}} for s in (0.0, 1.0)]
    figures = report.figures()
    shown = min(count, SHOWN)
    assert set(figures) == {"collateral", "strength"} | {
        f"{kind}/concept-number-{i}" for kind in ("pareto", "trade_off") for i in range(shown)
    }
    for name in ("collateral", "strength", "pareto/concept-number-0"):
        figures[name].canvas.draw()
    matrix = figures["collateral"].axes[0].images[0].get_array()
    assert matrix.shape == (count + 2, count)
    assert (float(matrix[1, -1]) == value) if value is not None and value == value else math.isnan(matrix.data[1, -1])


def test_concepts_called_like_the_other_rows_have_rows_of_their_own():
    called = ("none", "all", "no edit", "all edits")
    report = joint(*called)
    image = report.figures()["collateral"].axes[0].images[0]
    assert image.get_array().shape == (6, 4)
    text = report.to_text(200)
    table = text[text.index("each concept") :]
    assert all(sum(line.split("│")[1:2] == [f" {name:<9} "] for line in table.splitlines()) >= 1 for name in called)
    assert sum("│ none " in line for line in table.splitlines()) == sum("│ all  " in line for line in table.splitlines()) == 2


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_report_that_was_read_back_can_be_published(kind, tmp_path):
    """As one with what an earlier run has forgotten, in which a trial has broken the model."""
    report = joint("cats", "dogs")
    report.concepts["cats"].trace[0] |= {"forget": math.nan, "retain": {"acc": math.inf}}
    report.concepts["cats"].strengths = [{"strength": 2.0, "forget": {"acc": math.nan}, "retain": {"acc": 1.0}}]
    report.after["forget"]["cats"] = math.nan
    report.to_json(tmp_path / "report.json")
    logger = kind(tmp_path, name="run", version=0)
    publish(report_from_json(tmp_path / "report.json"), [logger])

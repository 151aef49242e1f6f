"""The report of a run over passages: JSON, table, figures, and the table of completions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slug_lightning.reports.passages import PassagesReport, samples_table

pytestmark = pytest.mark.figures

MA, EL = "memorization_accuracy", "extraction_likelihood"
numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from([MA, EL, "bleu", "perplexity", "mine"])
values = st.dictionaries(names, numbers)


def measures(x: float) -> dict[str, float]:
    return {MA: x, EL: x / 2, "bleu": x / 3, "perplexity": 1 + x, "diversity": 1.0}


def a_report(**options: Any) -> PassagesReport:
    counts = [
        {"epoch": i, "step": i, "trained": 2, "remembered": 2 - i, "other_perplexity": 9.0 if i else None} for i in range(3)
    ]
    passage = {"number": 0, "remembered": False, "epochs": 2, "returns": 1, "values": {"bleu": 0.0}}
    given = {
        "status": "unlearned",
        "method": "ICU",
        "reason": "every passage is forgotten",
        "thresholds": {MA: 0.1234, EL: 0.02},
        "bounds": {"bleu": 0.01},
        "decided": [MA, EL],
        "passages": [passage, passage | {"number": 1, "remembered": True}],
        "trace": [entry | measures(1 - i / 2) for i, entry in enumerate(counts)],
        "before": {"forget": measures(0.9), "unseen": measures(0.1), "other": {"perplexity": 7.5}},
        "after": {"forget": measures(0.3), "unseen": measures(0.2), "other": {"perplexity": math.inf}},
        "cost": {"seconds": {"training": 3.0, "validation": 1.0, "report": 0.5}, "ratio of validation to training": 1 / 3},
        "notes": ["[markup] is no markup " * 9],
    }
    return PassagesReport(**{**given, **options})


@settings(deadline=None)
@given(
    st.builds(
        PassagesReport,
        status=st.sampled_from(["unlearned", "unfinished"]),
        method=st.text(),
        thresholds=values,
        bounds=values,
        before=st.dictionaries(st.text(), values),
        passages=st.lists(st.dictionaries(st.text(), st.one_of(numbers, st.booleans(), values))),
        samples=st.lists(st.dictionaries(st.text(), st.text())),
        notes=st.lists(st.text()),
    )
)
def test_a_report_comes_back_as_it_was(tmp_path_factory, report):
    path = tmp_path_factory.getbasetemp() / "report.json"
    report.to_json(path)
    assert PassagesReport.from_json(path) == report == PassagesReport.from_dict(report.to_dict())


def test_what_is_not_finite_is_null_and_can_still_be_shown(tmp_path):
    a_report().to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["after"]["other"]["perplexity"] is None
    read = PassagesReport.from_json(tmp_path / "report.json")
    assert "–" in read.to_text()
    assert read.figures()


def test_what_a_newer_version_added_is_left_out():
    report = a_report()
    assert PassagesReport.from_dict(report.to_dict() | {"colour": "green"}) == report


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_says_what_decided_and_fits(width):
    lines = a_report().to_text(width).splitlines()
    assert max(map(len, lines)) <= width
    (accuracy,) = (line for line in lines if "forget" in line and "0.9000" in line)
    assert {"0.9000", "0.3000", "0.1234"} <= set(accuracy.split())  # before, after, bound
    assert sum("≤" in line for line in lines) == 2  # of the passages to forget, by accuracy and likelihood
    assert "every passage is forgotten; 1 of 2 passages still remembered, 2 had come back" in " ".join(map(str.strip, lines))
    assert "[markup]" in " ".join(lines)


def test_the_figure_shows_the_curves_and_the_levels_to_fall_below():
    figure = a_report().figures()["forgetting"]
    figure.canvas.draw()
    left, middle, right = figure.axes
    curves = [line for line in left.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in curves] == [
        [1, 0.5, 0],
        [0.5, 0.25, 0],
        [pytest.approx(1 / 3), pytest.approx(1 / 6), 0],
    ]
    levels = {line.get_color(): line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "--"}
    assert levels == {line.get_color(): level for line, level in zip(curves, (0.1234, 0.02, 0.01), strict=True)}
    assert list(middle.lines[0].get_ydata()) == [2, 1, 0]
    assert list(right.lines[0].get_ydata()) == [None, 9, 9]


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({name: st.text() for name in ("prompt", "truth", "before", "after")})))
def test_each_sample_is_one_row_of_four_cells_whatever_it_says(samples):
    rows = samples_table(samples).split("\n")
    assert len(rows) == 2 + len(samples)
    assert all(row.count("|") == 5 for row in rows)

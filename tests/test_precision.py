"""What a precision cannot tell is said, and nothing else: against the rule written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slug_lightning.metrics import Metric
from slug_lightning.precision import close_calls, damage_error, rounding
from slug_lightning.scores import Score
from slug_lightning.search import Trial


def scored(layer, importance, alignment, on_front, tower="t"):
    return Score(layer, tower, importance, alignment, importance, 1.0, 1.0, on_front)


def tried(layer, damage, forgotten=True):
    return Trial(layer, 0.1, 0.1, forgotten, damage, 0.0, None if damage is None else {"acc": 0.5})


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("16-true", torch.float16),
        ("transformer-engine", torch.bfloat16),
        ("transformer-engine-float16", None),
    ],
)
def test_the_unit_roundoff_is_half_of_what_lies_between_one_and_the_next_number(precision, dtype):
    assert rounding(precision) == (torch.finfo(dtype).eps / 2 if dtype else rounding("transformer-engine"))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "32", "64", 32, 64])
def test_others_are_what_the_rest_is_compared_to(precision):
    assert rounding(precision) == 0
    scores = [scored("a", 1.0, 0.5, True), scored("b", 1.0, 0.5, False)]
    best = tried("a", 0.5)
    assert close_calls(precision, scores, [best, tried("b", 0.5)], best, 1.0) == []


def test_the_error_of_the_damage_is_that_of_both_values_as_a_share_of_the_tolerance():
    accuracy, loss = Metric("acc", True), Metric("loss", False)
    unit = 2.0**-8
    assert damage_error({"acc": accuracy}, {"acc": 0.8}, 0.02, unit) == pytest.approx(2 * unit * 0.8 / 0.02)
    assert damage_error({"acc": accuracy}, {"acc": -0.8}, 0.02, unit) == pytest.approx(2 * unit * 0.8 / 0.02)
    # A loss's tolerance is a share of the loss itself.
    assert damage_error({"loss": loss}, {"loss": 123.0}, 0.02, unit) == pytest.approx(2 * unit / 0.02)
    both = {"acc": accuracy, "loss": loss}
    assert damage_error(both, {"acc": 0.8, "loss": 123.0}, 0.02, unit) == pytest.approx(2 * unit / 0.02)
    assert damage_error(both, {"acc": 3.0, "loss": 123.0}, 0.02, unit) == pytest.approx(6 * unit / 0.02)
    assert damage_error(both, {"acc": 0.8, "loss": 123.0}, 0.02, 0.0) == 0
    assert damage_error({"loss": loss}, {"loss": 1.0}, 0.0, unit) == 2 * unit


@settings(deadline=None, max_examples=60)
@given(
    trials=st.lists(
        st.builds(
            tried,
            st.sampled_from("abcd"),
            st.one_of(st.none(), st.integers(-8, 12).map(lambda n: n / 8)),
            st.booleans(),
        ),
        max_size=8,
    ),
    error=st.integers(0, 4).map(lambda n: n / 8),
)
def test_rivals_are_the_feasible_ones_within_the_error(trials, error):
    feasible = [t for t in trials if t.forgotten and t.damage is not None and t.damage <= 1]
    best = min(feasible, key=lambda t: t.damage, default=None)
    notes = close_calls("bf16-mixed", [], trials, best, error)
    near = [t.layer for t in feasible if t.layer != best.layer and t.damage <= best.damage + error]
    assert len(notes) == bool(near)
    for note in notes:
        assert note.startswith("precision: in bf16-mixed, what an edit of")
        named = note.removeprefix("precision: in bf16-mixed, what an edit of ").split(" would cost")[0]
        assert set(named.split(" and ")[0].split(", ")) <= set(near)


def test_a_rival_is_named_once_however_often_it_was_tried():
    best = tried("a", 0.5)
    (note,) = close_calls("bf16-mixed", [], [best, tried("b", 0.5), tried("b", 0.55), tried("b", 0.51)], best, 0.1)
    assert "an edit of b would" in note


places = st.integers(1, 40).map(lambda n: n / 40)


@settings(deadline=None, max_examples=80)
@given(points=st.lists(st.tuples(places, places, st.sampled_from("tu")), min_size=1, max_size=7), near=st.sampled_from([0, 1, 4]))
def test_a_layer_off_the_front_is_named_if_rounding_may_have_kept_it_off(points, near):
    """Off the front is who is dominated; it counts as near if a little more importance and less alignment would change that."""
    unit = rounding("bf16-mixed")
    # Close pairs: beside each layer one that is barely worse, by some units.
    points = [(i, a, t) for i, a, t in points] + [(i * (1 - near * unit), a, t) for i, a, t in points[:2]]

    def dominated(i, a, others):
        return any(x >= i and y <= a and (x, y) != (i, a) for x, y in others)

    scores, wanted = [], []
    for number, (i, a, tower) in enumerate(points):
        others = [(x, y) for x, y, t in points if t == tower]
        scores.append(scored(f"layer{number}", i, a, not dominated(i, a, others), tower))
    for score in scores:
        front = [(s.importance, s.alignment) for s in scores if s.tower == score.tower and s.on_front]
        better = score.importance * (1 + 2 * unit), max(score.alignment - 2 * unit, 0.0)
        if not score.on_front and not dominated(*better, front):
            wanted.append(score.layer)
    notes = close_calls("bf16-mixed", scores, [], None, 0.0)
    assert len(notes) == bool(wanted)
    if wanted:
        assert all(name in notes[0] for name in wanted[:5])
        assert not any(f"{s.layer} " in notes[0] or f"{s.layer}," in notes[0] for s in scores if s.layer not in wanted)
        assert (f"and {len(wanted) - 5} more" in notes[0]) == (len(wanted) > 5)


@pytest.mark.parametrize(("lower", "said"), [(1.0, True), (1.9, True), (2.1, False)])
def test_the_margin_is_two_units(lower, said):
    unit = rounding("16-mixed")
    importance = [scored("best", 1.0, 0.0, True), scored("near", 1 - lower * unit, 0.0, False)]
    alignment = [scored("best", 1.0, 0.25, True), scored("near", 1.0, 0.25 + lower * unit, False)]
    note = "precision: in 16-mixed, it cannot be told whether near should have been tried, too"
    assert close_calls("16-mixed", importance, [], None, 0.0) == ([note] if said else [])
    # A little more importance than its equal lets it onto the front, whatever its alignment then is.
    assert close_calls("16-mixed", alignment, [], None, 0.0) == [note]

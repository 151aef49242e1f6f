"""What a precision cannot tell is said, and nothing else: against the rule written out."""

from __future__ import annotations

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st

from slug_lightning.methods.slug.precision_check import close_calls, close_scores, rounding, rounding_errors, usage_error
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.metrics import Metric
from slug_lightning.tensors.layers import Layer


def scored(layer, importance, alignment, tower="t"):
    parameters = {layer: torch.nn.Parameter(torch.ones(1))}
    return LayerStatistics(Layer(layer, parameters, tower), 1.0, importance, 1.0, alignment * importance)


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


def test_the_error_of_the_damage_is_that_of_both_values_as_a_share_of_the_tolerance():
    accuracy, loss = Metric("acc", True), Metric("loss", False)
    unit = 2.0**-8
    assert usage_error({"acc": accuracy}, {"acc": 0.8}, 0.02, unit) == pytest.approx(2 * unit * 0.8 / 0.02)
    assert usage_error({"acc": accuracy}, {"acc": -0.8}, 0.02, unit) == pytest.approx(2 * unit * 0.8 / 0.02)
    # A loss's tolerance is a share of the loss itself.
    assert usage_error({"loss": loss}, {"loss": 123.0}, 0.02, unit) == pytest.approx(2 * unit / 0.02)
    both = {"acc": accuracy, "loss": loss}
    assert usage_error(both, {"acc": 0.8, "loss": 123.0}, 0.02, unit) == pytest.approx(2 * unit / 0.02)
    assert usage_error(both, {"acc": 3.0, "loss": 123.0}, 0.02, unit) == pytest.approx(6 * unit / 0.02)
    assert usage_error(both, {"acc": 0.8, "loss": 123.0}, 0.02, 0.0) == 0
    assert usage_error({"loss": loss}, {"loss": 1.0}, 0.0, unit) == 2 * unit


@examples(60)
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
    feasible = [t for t in trials if t.forgotten and t.constraint_usage is not None and t.constraint_usage <= 1]
    best = min(feasible, key=lambda t: t.constraint_usage, default=None)
    notes = close_calls("bf16-mixed", trials, best, error)
    near = [t.layer for t in feasible if t.layer != best.layer and t.constraint_usage < best.constraint_usage + error]
    assert len(notes) == bool(near)
    for note in notes:
        assert note.startswith("precision: in bf16-mixed, what an edit of")
        named = note.removeprefix("precision: in bf16-mixed, what an edit of ").split(" would cost")[0]
        assert set(named.split(" and ")[0].split(", ")) <= set(near)


def test_a_rival_is_named_once_however_often_it_was_tried():
    best = tried("a", 0.5)
    (note,) = close_calls("bf16-mixed", [best, tried("b", 0.5), tried("b", 0.55), tried("b", 0.51)], best, 0.1)
    assert "an edit of b would" in note


def test_the_errors_are_those_of_a_sample_and_at_least_what_is_usual():
    exact = [
        scored("a", 1.0, 0.5),
        scored("b", 2.0, 0.1),
        scored("c", 4.0, 0.2),
        scored("gone", 1.0, 0.0),
    ]
    rounded = [scored("a", 1.1, 0.5), scored("b", 1.98, 0.13), scored("c", 4.0, 0.19)]
    errors = rounding_errors(exact, rounded)  # importance: 0.1, 0.01, 0; alignment: 0, 0.03, 0.01
    assert errors == {
        "a": pytest.approx((0.1, 0.01)),
        "b": pytest.approx((0.01, 0.03)),
        "c": pytest.approx((0.01, 0.01)),
    }
    assert rounding_errors([], rounded) == {}


places = st.integers(1, 16).map(lambda n: n / 16)  # so that products, and with them ties, are exact
slips = st.tuples(st.sampled_from([0.0, 0.03, 0.2]), st.sampled_from([0.0, 0.03, 0.2]))


@examples(100)
@given(points=st.lists(st.tuples(places, places, st.sampled_from("tu"), slips), min_size=1, max_size=7), chosen=st.integers(0, 6))
def test_a_layer_is_named_if_an_error_of_its_score_would_move_it_onto_or_off_its_front(points, chosen):
    def dominated(i, a, others):
        return any(x >= i and y <= a and (x, y) != (i, a) for x, y in others)

    scores, errors, wanted = [], {}, []
    for number, (i, a, tower, slip) in enumerate(points):
        others = [(x, y) for place, (x, y, t, _) in enumerate(points) if t == tower and place != number]
        on_front = not dominated(i, a, others)
        scores.append(scored(f"layer{number}", i, a, tower))
        errors[f"layer{number}"] = slip
        way = -1 if on_front else 1
        if dominated(i * (1 + way * slip[0]), max(a - way * slip[1], 0.0), others) == on_front:
            wanted.append(f"layer{number}")
    best = tried(f"layer{chosen}", 0.5)
    notes = close_scores("bf16-mixed", scores, errors, best)
    assert len(notes) == bool(wanted)
    if wanted:
        wanted.sort(key=lambda layer: layer != best.layer)
        said = "precision: in bf16-mixed, these may or may not be on the front: " + ", ".join(wanted[:3])
        assert notes == [said + (f" and {len(wanted) - 3} more" if len(wanted) > 3 else "")]

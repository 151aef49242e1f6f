"""Several edits together: settled by their steps, by other layers, or by leaving some out."""

from __future__ import annotations

import math
import re

import pytest
from _amounts import examples
from _worlds import Table, joint_of, objective_of, searched, steps_of
from hypothesis import given
from hypothesis import strategies as st

from slug_lightning.methods.slug.several import AFTER_LEAVING_OUT, GENTLY, GROW, SEARCHES, SHRINK


def alone(concept, steps):
    """Each concept is forgotten by a step of 0.1 along the layer of its own name, whatever else is there."""
    return steps[concept] / 0.1


def settled(world, taken=(), max_rounds=10):
    """The joint after settling, what it returns, and every request by name with its step before."""
    requests = searched(world, objective_of(world))
    for name in taken:
        if requests[name].chosen:  # what no step forgets within the bounds, no earlier run has forgotten
            requests[name].concept.edit = requests[name].edit
    before = {name: request.chosen for name, request in requests.items()}
    joint = joint_of(requests.values(), max_rounds)
    edits = joint.settle()
    assert all(p.item() == 1 for p in world.parameters())
    return joint, {request.name: request for request in edits}, requests, before


def changes(joint):
    return [found.change for found in joint.rounds]


def assert_within_bounds(world, edits):
    """By the table, not by what the joint has measured."""
    steps = steps_of(edits.values(), world)
    assert all(world.share(name, steps) >= 1 - 1e-5 for name in edits)
    assert world.constraint_usage(steps) <= 1 + 1e-6


# ---- steps


def test_edits_that_are_fine_together_are_measured_once_and_not_touched():
    world = Table({"a": "a", "b": "b", "c": "c"}, alone, lambda steps: 3 * sum(steps.values()))
    joint, edits, _, before = settled(world)
    assert list(edits) == ["a", "b", "c"] and changes(joint) == [None]
    assert {name: request.chosen for name, request in edits.items()} == before
    (found,) = joint.rounds
    assert found.constraint_usage == pytest.approx(3 * sum(t.step for t in before.values()), rel=1e-6)
    assert found.retain == {"kept_loss": pytest.approx(1 + 0.25 * found.constraint_usage)} and found.remembered == []
    assert found.forget == {name: pytest.approx(0.9 - 4 * trial.step) for name, trial in before.items()}
    assert found.steps == {name: trial.relative_step for name, trial in before.items()}
    assert_within_bounds(world, edits)


def test_what_is_remembered_beside_others_grows_and_the_others_stay():
    def share(concept, steps):
        return steps[concept] / 0.1 - (3 * steps["a"] if concept == "b" else 0)

    world = Table({"a": "a", "b": "b"}, share, lambda steps: sum(steps.values()))
    joint, edits, _, before = settled(world)
    assert edits["a"].chosen == before["a"]
    grown = edits["b"].chosen.step / before["b"].step
    times = round(math.log(grown, GROW))
    assert times >= 1 and grown == pytest.approx(GROW**times)
    assert edits["b"].chosen.relative_step / before["b"].relative_step == pytest.approx(grown)
    assert changes(joint) == ["steps larger: b"] * times + [None]
    assert [found.remembered for found in joint.rounds] == [["b"]] * times + [[]]
    assert_within_bounds(world, edits)


def test_edits_that_cost_too_much_shrink_where_they_help_each_other_to_forget():
    world = Table({"a": "a", "b": "b"}, lambda name, steps: 10 * sum(steps.values()), lambda steps: 6 * sum(steps.values()))
    joint, edits, _, before = settled(world)
    assert changes(joint)[0] == "steps smaller: a, b" and joint.rounds[0].constraint_usage > 1 and changes(joint)[-1] is None
    for name, request in edits.items():
        assert request.chosen.step < before[name].step * max(SHRINK, 1 - GENTLY * (joint.rounds[0].constraint_usage - 1)) + 1e-9
    assert_within_bounds(world, edits)


def test_a_step_that_costs_too_much_shrinks_half_the_way_to_one_that_did_not_forget():
    """Beside `a`, `b` needs 0.104 and not only 0.1, and from 0.106 on costs too much."""

    def share(concept, steps):
        return 1.5 if concept == "a" and steps["a"] else steps[concept] / (0.104 if steps["a"] else 0.1)

    world = Table({"a": "a", "b": "b"}, share, lambda steps: 1.1 if steps["b"] > 0.106 else 5 * steps["b"])
    joint, edits, *_ = settled(world)
    first, second, *others = [found.steps["b"] for found in joint.rounds]
    assert (first, second) == pytest.approx((0.1, 0.11)) and all(0.1 < step < 0.11 for step in others)
    assert_within_bounds(world, edits)


@pytest.mark.parametrize("broken", ["forget", "retain"])
def test_steps_under_which_the_model_breaks_shrink(broken):
    """0.1 alone is fine; together from 0.15 on the model gives NaN, while edits help each other."""

    def breaks(steps, kind):
        return broken == kind and sum(steps.values()) > 0.15

    def share(concept, steps):
        return math.nan if breaks(steps, "forget") else 10 * sum(steps.values())

    world = Table({"a": "a", "b": "b"}, share, lambda steps: math.nan if breaks(steps, "retain") else sum(steps.values()))
    joint, edits, _, before = settled(world)
    assert list(edits) == ["a", "b"] and all(edits[name].chosen.step < before[name].step for name in edits)
    assert set(changes(joint)) == {"steps smaller: a, b", None}
    assert_within_bounds(world, edits)


# ---- layers


def test_layers_are_searched_again_where_steps_do_not_help_and_the_rounds_tell_what_became_what():
    """The layer that is best for `a` alone gets in the way of `b`."""
    layers = {"a": ["one", "two"], "b": ["b"]}

    def share(concept, steps):
        return 10 * (steps["b"] if concept == "b" else steps["one"] + steps["two"])

    def constraint_usage(steps):
        clash = 300 * steps["one"] * steps["b"]
        return 5 * steps["one"] + 6 * steps["two"] + 2 * steps["b"] + clash

    world = Table(layers, share, constraint_usage)
    joint, edits, requests, before = settled(world, max_rounds=3)
    assert before["a"].layer == "layers.one" and edits["a"].chosen.layer == "layers.two"
    assert changes(joint)[-1] is None and list(edits) == ["a", "b"]
    told, *_ = [change for change in changes(joint) if change and change.startswith("a:")]
    assert re.fullmatch(r"a: layers\.one at relative step 0\.\d{4} became layers\.two at relative step 0\.\d{4}", told)
    assert told.endswith(f"{edits['a'].chosen.relative_step:.4f}")
    trials = [trial.to_dict() for trial in requests["a"].outcome.trials]
    together = [t for t in trials if t.get("together")]
    assert together and trials[-len(together) :] == together  # they come after those of the search alone
    assert_within_bounds(world, edits)


def test_where_no_layer_forgets_in_the_presence_of_others_the_step_stays_and_that_is_said():
    """`a` and `b` each undo the other, whatever the step."""

    def share(concept, steps):
        other = "b" if concept == "a" else "a"
        return 0.0 if steps[other] else 10 * steps[concept]

    world = Table({"a": "a", "b": "b"}, share, lambda steps: 5 * steps["a"] + 4 * steps["b"])
    joint, edits, requests, _ = settled(world, max_rounds=2)
    said = [change for change in changes(joint) if change and "no step of its layers" in change]
    assert said == [f"{name}: no step of its layers forgets it in the presence of the others" for name in "ab"]
    assert len(edits) <= 1
    assert [request for request in requests.values() if request.chosen] == list(edits.values())


# ---- leaving out


def test_what_cannot_be_settled_is_left_out_the_costliest_first_and_the_others_go_through():
    costs = {"a": 2.0, "b": 6.5, "c": 3.0}
    world = Table(dict(zip("abc", "abc", strict=True)), alone, lambda steps: sum(costs[name] * steps[name] for name in costs))
    joint, edits, requests, _ = settled(world)
    assert list(edits) == ["a", "c"] and requests["b"].chosen is None
    (told,) = [change for change in changes(joint) if change and "left out" in change]
    assert told == "b: left out, as not all bounds hold together"
    assert changes(joint)[-1] is None and joint.rounds[-1].forget.keys() == {"a", "c"}
    assert_within_bounds(world, edits)


def test_not_all_are_left_out_where_edits_cost_far_more_together_than_the_sum_of_each():
    """Each costs little; `c` and `d` clash, while the others are the ones that are searched again."""

    def constraint_usage(steps):
        return 2 * (steps["a"] + steps["b"]) + steps["c"] + steps["d"] + 500 * steps["c"] * steps["d"]

    world = Table(dict(zip("abcd", "abcd", strict=True)), alone, constraint_usage)
    _, edits, *_ = settled(world, max_rounds=2)
    assert edits
    assert_within_bounds(world, edits)


def test_edits_with_which_nothing_works_are_left_out_one_by_one():
    """With `a` and any other the model breaks, however small the steps; `a` costs most."""

    def constraint_usage(steps):
        return math.nan if steps["a"] and (steps["b"] or steps["c"]) else 5 * steps["a"] + 2 * steps["b"] + 2 * steps["c"]

    world = Table(dict(zip("abc", "abc", strict=True)), alone, constraint_usage)
    _, edits, *_ = settled(world, max_rounds=2)
    assert list(edits) == ["b", "c"]


# ---- edits of an earlier run


def test_an_edit_that_was_taken_over_never_changes_but_the_others_do():
    def share(concept, steps):
        return steps[concept] / 0.1 - (3 * steps["a"] if concept == "b" else 0)

    world = Table({"a": "a", "b": "b"}, share, lambda steps: 9 * steps["a"] + steps["b"] / 10)
    _, edits, _, before = settled(world, taken=["a"])
    assert edits["a"].chosen == before["a"] and edits["b"].chosen.step > before["b"].step


def test_a_new_edit_that_brings_back_what_an_earlier_run_has_forgotten_is_left_out():
    def share(concept, steps):
        return 0.0 if concept == "a" and steps["b"] else 10 * steps[concept]

    world = Table({"a": "a", "b": "b"}, share, lambda steps: 9 * steps["a"] + steps["b"] / 10)
    joint, edits, requests, before = settled(world, taken=["a"])
    assert list(edits) == ["a"] and edits["a"].chosen == before["a"] and requests["b"].chosen is None
    assert any(change == "b: left out, as not all bounds hold together" for change in changes(joint))


def test_earlier_edits_that_do_not_go_together_any_more_are_all_left_out():
    world = Table({"a": "a", "b": "b"}, alone, lambda steps: 8 * sum(steps.values()))
    joint, edits, requests, _ = settled(world, taken=["a", "b"])
    assert not edits and changes(joint) == ["a, b: left out, as not all bounds hold together"]
    assert all(request.chosen is None for request in requests.values())


def test_nothing_is_settled_where_nothing_was_found():
    world = Table({"a": "a"}, lambda *_: 0.0, lambda _: 0.0)
    joint, edits, *_ = settled(world)
    assert not edits and joint.rounds == []


# ---- always

numbers = st.integers(-8, 8).map(lambda n: n / 8)


@st.composite
def tables(draw):
    """Concepts with one or two layers that help, undo and harm each other at random; some break the model."""
    count = draw(st.integers(1, 4))
    names = "abcd"[:count]
    layers = {name: [name, name.upper()] if draw(st.booleans()) else [name] for name in names}
    flat = [layer for members in layers.values() for layer in members]
    need = {layer: draw(st.sampled_from([0.05, 0.1, 0.7])) for layer in flat}
    cost = {layer: draw(st.integers(-1, 8)) / 8 for layer in flat}
    undo = {(name, layer): draw(numbers) for name in names for layer in flat}
    clash = {(one, two): draw(st.sampled_from([0, 0, 0, 0.5, 2, -0.5])) for one in flat for two in flat if one < two}
    breaks = draw(st.sampled_from([math.inf, math.inf, 2.5, 1.5]))

    def went(steps):
        return {layer: steps[layer] / need[layer] for layer in flat}

    def share(concept, steps):
        gone = went(steps)
        if sum(gone.values()) > breaks:
            return math.nan
        own = sum(gone[layer] for layer in layers[concept])
        return own + sum(undo[concept, layer] * min(gone[layer], 2) for layer in flat if layer not in layers[concept])

    def constraint_usage(steps):
        gone = went(steps)
        if sum(gone.values()) > 1.2 * breaks:
            return math.inf
        return sum(cost[layer] * gone[layer] ** 2 for layer in flat) + sum(
            value * min(gone[one] * gone[two], 9) for (one, two), value in clash.items()
        )

    taken = [name for name in names if draw(st.integers(0, 3)) == 0]
    return layers, share, constraint_usage, taken, draw(st.integers(1, 6))


@examples(30)
@given(tables())
def test_it_ends_and_what_it_returns_meets_both_bounds(drawn):
    layers, share, constraint_usage, taken, max_rounds = drawn
    world = Table(layers, share, constraint_usage)
    joint, edits, requests, before = settled(world, taken, max_rounds)
    able = [name for name, trial in before.items() if trial]
    assert len(joint.rounds) <= max_rounds + (AFTER_LEAVING_OUT + 1) * len(able) + SEARCHES + 1
    assert list(edits) == [name for name in able if requests[name].chosen]  # in the order asked for
    if edits:
        assert_within_bounds(world, edits)
        assert changes(joint)[-1] is None and joint.rounds[-1].steps.keys() == edits.keys()
        forget = {name: 0.9 - 0.4 * share(name, steps_of(edits.values(), world)) for name in edits}
        assert joint.rounds[-1].forget == pytest.approx(forget, abs=1e-9)
    assert all(change for change in changes(joint)[: -1 if edits else None])
    for name in edits:
        assert name not in taken or edits[name].chosen == before[name]
    # What goes well alone is never given up for nothing: with one concept, alone is together.
    assert len(able) > 1 or list(edits) == able

"""What edits do to other concepts, and what more or less of them would do, by a table that says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from _worlds import Table, objective_of, searched, steps_of

from slug_lightning.methods import cross_effects as collateral_module
from slug_lightning.methods.cross_effects import collateral, strength_curves


def share(concept, steps):
    """`a` and `b` have a layer in common; `c` is undone by `a`'s."""
    return {"a": steps["x"], "b": steps["x"] * 1.5, "c": steps["y"] - steps["x"] / 2}[concept] / 0.1


def constraint_usage(steps):
    return 2 * steps["x"] + 30 * steps["y"] ** 2


@pytest.fixture
def table():
    world = Table({"a": "x", "b": "x", "c": "y"}, share, constraint_usage)
    searches = list(searched(world, objective_of(world)).values())
    context = searches[0].context
    edits = {search.name: search.edit for search in searches}
    return SimpleNamespace(world=world, context=context, concepts=context.concepts, edits=edits, requests=searches)


def value(concept, steps):
    return {"forget_acc": pytest.approx(0.9 - 0.4 * share(concept, steps), abs=1e-9)}


def test_each_concept_is_measured_under_each_edit_alone(table):
    found = collateral(table.concepts, table.edits, table.context)
    assert list(found) == ["a", "b", "c"]
    for edit in table.requests:
        steps = steps_of([edit], table.world)
        assert found[edit.name] == {c: value(c, steps)["forget_acc"] for c in "abc"}
    assert all(p.item() == 1 for p in table.world.parameters())


def test_of_many_only_the_first_are_measured(table, monkeypatch):
    monkeypatch.setattr(collateral_module, "MAX_CONCEPTS", 2)
    found = collateral(table.concepts, table.edits, table.context)
    assert {edit: list(row) for edit, row in found.items()} == {"a": ["a", "b"], "b": ["a", "b"]}


def test_without_an_edit_there_is_nothing_to_measure(table):
    before = table.world.evaluations
    assert collateral([], {}, table.context) == {}
    assert table.world.evaluations == before


@pytest.mark.parametrize("strengths", [[1.0], [0.0, 0.5, 2.0, 0.5], [-1.0, 1.0]])
def test_strength_curves_hold_the_others_at_full_strength(table, strengths):
    curves = strength_curves(table.concepts, table.edits, table.context, strengths)
    assert list(curves) == ["a", "b", "c"]
    for request in table.requests:
        curve = curves[request.name]
        assert [point["strength"] for point in curve] == sorted({1.0, *strengths})
        for point in curve:
            steps = steps_of([other for other in table.requests if other is not request], table.world)
            steps[request.edit.layer.name.removeprefix("layers.")] += point["strength"] * request.chosen.step
            assert point["forget"] == value(request.name, steps)
            assert point["retain"] == {"kept_loss": pytest.approx(1 + 0.25 * constraint_usage(steps), abs=1e-9)}
    assert all(p.item() == 1 for p in table.world.parameters())

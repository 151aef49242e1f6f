"""The layers compete: forgetting is measured first, what is kept only where the outcome depends on it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from _amounts import examples
from _competition import (
    FORGETTING,
    KEEPING,
    TOLERANCE,
    World,
    competition,
    forgets_at,
    never,
    passes_of,
    rows,
    score_of,
)
from _search import best_trial, context_of, smallest_of
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from _tiny import PlainRunner, blobs, changed, loader, snapshot, trained
from slug_lightning.methods.base import recorded
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.choice import LeastUsage
from slug_lightning.methods.slug.curves import Tangent, line
from slug_lightning.methods.slug.first_steps import Way, first_step
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.statistics import layer_statistics
from slug_lightning.methods.slug.step_search import START, interpolation
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.evaluators import WholeForward
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.objective.objective import LOSS, Objective
from slug_lightning.objective.replay.replay import Replay
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import Layer, find_layers
from slug_lightning.utils.progress import Progress


class Failure(Exception):
    pass


# ---- in which order, and how often


def test_all_layers_forget_first_then_those_that_can_are_measured_once_the_most_promising_first():
    ways = {"a": forgets_at(0.1), "b": never, "c": forgets_at(0.2), "d": forgets_at(0.1), "e": forgets_at(0.8)}
    world = World(ways, dict.fromkeys([None, *ways], rows(0.75)))
    # λ·|<g_f, g_r>| is 0.1·3·0.5 for a, 0.2·1·0.3 for c, 0.1·1·0.9 for d and 0.8·1·0.25 for e.
    scores = [score_of("a", retain_norm=3.0), score_of("b")]
    scores += [score_of(name, alignment=value) for name, value in (("c", 0.3), ("d", 0.9), ("e", 0.25))]
    made, scores = competition(world, scores=scores)
    _, before = made.run(scores)
    trials = made.trials
    passes = passes_of(world)
    forgetting = [name for kind, name in passes if kind == FORGETTING]
    assert passes == [(FORGETTING, name) for name in forgetting] + [(KEEPING, name) for name in (None, "c", "d", "a", "e")]
    assert list(dict.fromkeys(forgetting)) == [None, *"abcde"]
    assert [t.layer for t in trials] == forgetting[1:]  # every trial, in order
    assert before == {"acc": 0.75}


def test_the_prediction_knows_that_a_larger_gradient_needs_a_smaller_step():
    ways = {"a": forgets_at(0.1), "b": forgets_at(0.1)}
    world = World(ways, dict.fromkeys([None, *ways], rows(1.0)))
    # λ = 0.1·‖θ‖/‖g_f‖, so that λ·‖g_f‖·‖g_r‖·cos is 0.1·‖θ‖·‖g_r‖·cos whatever ‖g_f‖.
    scores = [score_of("a", forget_norm=9.0, retain_norm=2.0), score_of("b", forget_norm=0.1, retain_norm=1.5)]
    made, scores = competition(world, scores=scores)
    made.run(scores)
    assert [name for kind, name in passes_of(world) if kind == KEEPING] == [None, "b", "a"]


def test_only_the_smallest_step_of_a_layer_is_measured_on_what_is_kept():
    world = World({"a": forgets_at(0.37, 3.0)}, {None: rows(1.0), "a": rows(0.875)})
    made, scores = competition(world)
    made.run(scores)
    trials = made.trials
    measured = [t for t in trials if t.retain is not None]
    assert measured == [min((t for t in trials if t.forgotten), key=lambda t: t.relative_step)]
    assert measured[0].retain == {"acc": 0.875} and measured[0].constraint_usage == pytest.approx(0.5, rel=1e-6)
    assert all(t.constraint_usage is None for t in trials if t is not measured[0])


def test_where_no_layer_forgets_nothing_of_what_is_kept_is_measured_but_the_state_before():
    world = World({"a": never, "b": never}, {None: rows(0.5)})
    made, scores = competition(world, max_evaluations=4)
    _, before = made.run(scores)
    trials = made.trials
    assert len(trials) == 8 and best_trial(trials) is None and before == {"acc": 0.5}
    assert [name for kind, name in passes_of(world) if kind == KEEPING] == [None]


def test_the_budget_is_of_each_layer():
    ways = {"a": forgets_at(1e-9, 0.1), "b": forgets_at(50.0, 8.0), "c": never}
    world = World(ways, dict.fromkeys([None, *ways], rows(1.0)))
    made, scores = competition(world, max_evaluations=5)
    made.run(scores)
    trials = made.trials
    assert all(1 <= [t.layer for t in trials].count(name) <= 5 for name in ways)


def test_steps_and_relative_steps_are_those_of_the_layers_norms():
    world = World({"a": forgets_at(0.3)}, {None: rows(1.0), "a": rows(1.0)})
    made, scores = competition(world, scores=[score_of("a", forget_norm=4.0, weight_norm=1.0)])
    made.run(scores)
    trials = made.trials
    assert all(t.step == pytest.approx(t.relative_step / 4) for t in trials)
    # The number 1 moved by λ·g = relative step.
    assert [t.forget for t in trials] == pytest.approx([0.9 - 0.4 * t.relative_step / 0.3 for t in trials])
    assert [t.forgotten for t in trials] == [t.relative_step >= 0.3 for t in trials]


# ---- who is broken off


def test_a_hopeless_layer_is_broken_off_and_never_wins():
    ways = {"a": forgets_at(0.1), "b": forgets_at(0.2)}
    kept = {None: rows(1.0, 1.0, 1.0, 1.0), "a": rows(1.0, 0.75, 1.0, 1.0), "b": rows(0.5, 1.0, 1.0, 1.0)}
    world = World(ways, kept)
    made, scores = competition(world, counts=(4, 4, 4, 4))
    made.run(scores)
    trials = made.trials
    best, other = best_trial(trials), smallest_of(trials, "b")
    assert best.layer == "a" and best.retain == {"acc": 0.9375}
    # After one batch of four samples b has lost half of them: 0.125 of all for certain, a only 0.0625.
    assert [batch for kind, name, batch in world.seen if (kind, name) == (KEEPING, "b")] == [0]
    assert other.dropped and other.retain is None and other.constraint_usage is None and not other.feasible
    assert other.forgotten and [t.dropped for t in trials].count(True) == 1


def test_a_layer_that_may_still_win_is_measured_to_the_end():
    ways = {"a": forgets_at(0.1), "b": forgets_at(0.2)}
    kept = {None: rows(1.0, 1.0), "a": rows(0.75, 1.0), "b": rows(0.75, 1.0)}
    made, scores = competition(World(ways, kept), counts=(2, 2))
    made.run(scores)
    trials = made.trials
    assert not any(t.dropped for t in trials)
    assert best_trial(trials).layer == "a"  # equal damage: the smaller relative step


def test_each_layer_is_compared_with_the_best_so_far_and_not_with_the_last():
    ways = dict.fromkeys("abcd", forgets_at(0.1))
    # What goes below 0 has no bound, so that b is measured to the end, and c after it; d is between a and c.
    kept = {"a": rows(1.0, 1.0), "b": rows(-1.0, 1.0), "c": rows(0.0, 1.0), "d": rows(0.5, 1.0)}
    made, scores = competition(World(ways, {None: rows(1.0, 1.0)} | kept), counts=(2, 2))
    made.run(scores)
    trials = made.trials
    assert smallest_of(trials, "b").constraint_usage > 1 and smallest_of(trials, "d").dropped
    assert best_trial(trials).layer == "a"


def test_a_metric_without_a_bound_is_measured_to_the_end():
    ways = {"a": forgets_at(0.1), "b": forgets_at(0.2)}
    kept = {None: [{"recall": 90.0}] * 3, "a": [{"recall": 90.0}] * 3, "b": [{"recall": 10.0}] * 3}
    made, scores = competition(World(ways, kept), counts=(1, 1, 1))
    made.run(scores)
    trials = made.trials
    assert smallest_of(trials, "b").retain == {"recall": 10.0} and best_trial(trials).layer == "a"


# Sums of a few eighths are exact, so that ties are ties.
eighths = st.integers(0, 8).map(lambda n: n / 8)
kept_batch = st.fixed_dictionaries({"acc": eighths, "loss": st.integers(0, 12).map(lambda n: n / 4)})
thresholds = st.sampled_from([0.03, 0.1, 0.1, 0.5, 3.0, 1e9])


@st.composite
def worlds(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    table = st.lists(kept_batch, min_size=len(counts), max_size=len(counts))
    names = [*"abcd"][: draw(st.integers(1, 4))]
    kept = {name: draw(table) for name in [None, *names]}
    ways = {name: forgets_at(draw(thresholds), draw(st.sampled_from([0.7, 1.0, 2.0]))) for name in names}
    scores = [score_of(name, retain_norm=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))) for name in names]
    return ways, kept, counts, scores


def means(table, counts):
    return {name: sum(row[name] * n for row, n in zip(table, counts, strict=True)) / sum(counts) for name in table[0]}


@examples(100)
@given(worlds())
def test_breaking_off_never_changes_who_wins(drawn):
    ways, kept, counts, scores = drawn
    made, scores = competition(World(ways, kept), counts, scores)
    _, before = made.run(scores)
    trials = made.trials
    metrics = made.objective.metrics_of("retain")
    assert before == means(kept[None], counts)
    whole = []
    for t in trials:
        if t == smallest_of(trials, t.layer):
            t = replace(t, retain=means(kept[t.layer], counts), dropped=False)
            t = replace(t, constraint_usage=constraint_usage(metrics, before, t.retain, TOLERANCE))
        whole.append(t)
    best = best_trial(whole)
    assert best_trial(trials) == best
    for t, true in zip(trials, whole, strict=True):
        assert t == true or (
            t.dropped and true.constraint_usage > min(o.constraint_usage for o in trials if o.retain is not None)
        )


@examples(30)
@given(worlds())
def test_no_bit_of_any_layer_is_changed_in_the_end(drawn):
    ways, kept, counts, scores = drawn
    world = World(ways, kept)
    made, scores = competition(world, counts, scores)
    made.run(scores)
    assert all(p.item() == 1 and p.grad is None and p.requires_grad for p in world.parameters())


# ---- broken models


def breaks_at(threshold, forgotten_at):
    return lambda step: math.nan if step >= threshold else (step / forgotten_at) ** 4


def test_a_model_that_gives_nan_is_too_large_a_step_and_never_the_result():
    world = World({"a": breaks_at(0.35, forgotten_at=0.3)}, {None: rows(1.0), "a": rows(1.0)})
    made, scores = competition(world)
    made.run(scores)
    trials = made.trials
    broken = [t for t in trials if math.isnan(t.forget)]
    assert broken and all(t.forgotten and t.constraint_usage == math.inf and t.retain is None and not t.feasible for t in broken)
    assert 0.3 <= best_trial(trials).relative_step < 0.35


def test_a_layer_that_only_ever_breaks_is_not_measured_on_what_is_kept():
    ways = {"a": breaks_at(0.0, 1.0), "b": forgets_at(0.1)}
    world = World(ways, dict.fromkeys([None, *ways], rows(1.0)))
    made, scores = competition(world)
    made.run(scores)
    trials = made.trials
    assert (KEEPING, "a") not in passes_of(world)
    assert best_trial(trials).layer == "b" and smallest_of(trials, "a") is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_that_ruins_what_is_kept_is_not_feasible_and_stops_nobody_else(bad):
    ways = {"a": forgets_at(0.1), "b": forgets_at(0.2)}
    kept = {None: rows(1.0, 1.0), "a": rows(1.0, bad), "b": rows(1.0, 0.875)}
    made, scores = competition(World(ways, kept), counts=(1, 1))
    made.run(scores)
    trials = made.trials
    assert smallest_of(trials, "a").constraint_usage == math.inf
    assert best_trial(trials).layer == "b"


# ---- where a search begins

norms = st.floats(1e-3, 1e3)


@given(gain=st.floats(-10, 10), forget=norms, weight=norms)
def test_the_first_step_raises_the_loss_by_the_gain_at_first_order_within_limits(gain, forget, weight):
    relative = first_step(gain, forget * weight)
    step = relative * weight / forget
    if START / 100 < relative < 1:
        assert step * forget**2 == pytest.approx(gain)
    elif relative == 1:
        assert step * forget**2 <= gain * (1 + 1e-9)
    else:
        assert relative == START / 100 and step * forget**2 >= gain * (1 - 1e-9)


def first_steps(trials):
    return {t.layer: t.relative_step for t in reversed(trials)}


def test_by_the_loss_the_first_layer_begins_at_first_order_and_the_next_where_the_last_one_ended():
    ways = {"a": forgets_at(0.3, 2.0), "b": forgets_at(0.01)}
    scores = [score_of("a", forget_norm=8.0), score_of("b", forget_norm=20.0)]
    made, scores = competition(World(ways, dict.fromkeys([None, *ways], rows(1.0)), by_loss=True), scores=scores)
    assert made.concept.targets[0].metric.name == LOSS
    made.run(scores)
    trials = made.trials
    found = smallest_of(trials, "a")
    # The loss is to rise by 2, and ‖θ‖ is 1; later by what the last layer's linear model says of its step.
    assert first_steps(trials) == pytest.approx({"a": 2 / 8, "b": found.step * 8**2 / 20})


def test_by_a_score_the_first_layer_begins_at_the_start_and_the_next_where_the_last_that_forgot_ended():
    ways = {"a": never, "b": forgets_at(0.3), "c": never, "d": forgets_at(0.2)}
    scores = [score_of(name, forget_norm=norm) for name, norm in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 3.0))]
    made, scores = competition(World(ways, dict.fromkeys([None, *ways], rows(1.0))), scores=scores)
    made.run(scores)
    trials = made.trials
    gain = smallest_of(trials, "b").step * 2**2
    assert first_steps(trials) == pytest.approx({"a": START, "b": START, "c": gain / 4, "d": gain / 3})


# ---- the smallest step

listed = st.lists(
    st.builds(
        Trial,
        st.sampled_from("ab"),
        st.just(1.0),
        st.sampled_from([0.1, 0.2, 0.3]),
        st.booleans(),
        st.just(None),
        st.sampled_from([0.5, math.nan, math.inf]),
        st.just(None),
    ),
    max_size=6,
)


@given(listed, st.sampled_from(["a", "b", None]))
@example([Trial("a", 1.0, 0.1, True, math.inf, math.nan, None), Trial("a", 1.0, 0.2, True, None, 0.5, None)], "a")
def test_the_smallest_step_forgets_and_leaves_a_model_that_works(trials, layer):
    found = smallest_of(trials, layer)
    working = [t for t in trials if t.forgotten and t.forget == 0.5 and (layer is None or t.layer == layer)]
    assert (found is None) == (not working)
    if found is not None:
        assert found in working and found.relative_step == min(t.relative_step for t in working)


# ---- recording


class SpyReplay:
    def __init__(self):
        self.calls = []

    def run(self, where, number, batch, step, record=(), edited=None):
        if record or edited:
            self.calls.append(("record", where, tuple(record)) if record else ("evaluate", where, edited))
        step()

    def forget(self):
        self.calls.append(("forget",))


@pytest.mark.parametrize("fail", [False, True])
def test_what_is_recorded_is_let_go_at_the_end(fail):
    world = World({"a": never}, {None: rows(0.5), "a": rows(0.25)})
    made, _ = competition(world)
    made.objective.evaluator = SpyReplay()
    layers, where = [Layer("a", {"a": world.layers["a"]})], ("retain", "val")
    with pytest.raises(Failure) if fail else nullcontext(), recorded(made.objective, *where, layers) as before:
        assert before == {"acc": 0.5}
        if fail:
            raise Failure
    assert made.objective.evaluator.calls == [("record", ("validation_step", *where), ("a",)), ("forget",)]


def test_before_recording_the_layers_count_as_written_to_and_keep_their_bits():
    world = World({"a": never, "b": never}, {None: rows(0.5)})
    made, _ = competition(world)
    special = nn.Parameter(torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45]))
    kept, other, version = special.detach().clone(), world.layers["b"]._version, special._version
    with recorded(made.objective, "retain", "val", [Layer("a", {"a": special})]):
        assert special._version > version and world.layers["b"]._version == other
    assert bitwise_equal(special, kept)


def test_forgetting_is_recorded_for_the_front_and_keeping_for_those_that_forget():
    ways = {"a": forgets_at(0.1), "b": never}
    made, scores = competition(World(ways, dict.fromkeys([None, *ways], rows(1.0))))
    spy = made.objective.evaluator = SpyReplay()
    made.run(scores)
    records = [call for call in dict.fromkeys(spy.calls) if call[0] != "evaluate"]
    forgetting, keeping = ("validation_step", "forget", "val"), ("validation_step", "retain", "val")
    assert records == [("record", forgetting, ("a", "b")), ("forget",), ("record", keeping, ("a",))]
    assert spy.calls[-1] == ("forget",)
    assert {call for call in spy.calls if call[0] == "evaluate"} == {
        ("evaluate", forgetting, "a"), ("evaluate", forgetting, "b"), ("evaluate", keeping, "a"),
    }  # fmt: skip


# ---- what is said


def test_whoever_watches_is_told_what_became_of_each_layer(monkeypatch):
    ways = {"a": forgets_at(0.1), "b": never, "c": forgets_at(0.2), "d": forgets_at(0.3)}
    kept = {None: rows(1.0, 1.0), "a": rows(0.5, 0.5), "b": rows(1.0, 1.0), "c": rows(1.0, 1.0), "d": rows(0.0, 0.0)}
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    made, scores = competition(World(ways, kept), counts=(1, 1), max_evaluations=6)
    made.run(scores)
    endings = [line.split(", ", 1)[1] for line in said]
    assert [line.split(":")[0] for line in said] == ["a", "b", "c", "d"]
    assert endings[0] == "reaches the forget target at step 0.1000, acc=0.5000 (violates retain_tolerance)"
    assert endings[1] == "does not reach the forget target" and said[1].startswith("b: 6 evaluations")
    assert endings[2].endswith("acc=1.0000")
    assert endings[3].endswith("retain metrics not measured to the end: it cannot win")


# ---- with a model


def compete_for_real(replay):
    module = trained().eval()
    loaders = {kind: {split: loader(kind == "forget") for split in ("train", "val")} for kind in ("forget", "retain")}
    layers = find_layers(module)
    objective = Objective(module, loaders, PlainRunner(), retain_metric=["val_acc", "val_loss"])
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    gradients = {kind: objective.gradient(kind, parameters).tensors for kind in ("forget", "retain")}
    scores = layer_statistics(layers, gradients["forget"], gradients["retain"])
    objective.evaluator = Replay(module, layers) if replay else WholeForward()
    forget = gradients["forget"]
    made = LayerSearch(
        Concept.measured("it", objective, 4.0),
        context_of(objective, 0.5),
        search=interpolation,
        choice=LeastUsage(),
        max_evaluations=12,
    )
    kept = snapshot(module)
    _, retain_before = made.run(
        [Way(s, "gradient", "line", line(s, lambda at=None, s=s: Tangent(forget, s.forget_norm))) for s in scores]
    )
    trials = made.trials
    assert not changed(module, kept)
    return objective, gradients["forget"], trials, retain_before


def test_every_value_of_a_trial_is_that_of_a_plain_evaluation_of_the_edited_model():
    objective, gradient, trials, before = compete_for_real(replay=False)
    module = objective.module
    x, y = blobs().tensors

    def values(forget):
        chosen = (y == 2) == forget
        with torch.no_grad():
            logits = module.net(x[chosen])
        return cross_entropy(logits, y[chosen]).item(), (logits.argmax(1) == y[chosen]).float().mean().item()

    assert before == pytest.approx(dict(zip(("val_loss", "val_acc"), values(False), strict=True)), rel=1e-5)
    assert {t.layer for t in trials} == {"net.0.weight", "net.4.weight", "net.6.weight"}
    for t in trials:
        parameter = dict(module.named_parameters())[t.layer]
        kept = parameter.detach().clone()
        parameter.data = kept + t.step * gradient[t.layer]
        loss, accuracy = values(False)
        assert t.forget == pytest.approx(values(True)[0], rel=1e-4) and t.forgotten == (t.forget >= 4 - 1e-5)
        assert t.relative_step == pytest.approx(t.step * gradient[t.layer].norm().item() / kept.norm().item(), rel=1e-5)
        if t.retain is not None:
            assert t.retain == pytest.approx({"val_loss": loss, "val_acc": accuracy}, rel=1e-4)
        parameter.data = kept
    assert any(t.retain is not None for t in trials)


def test_with_replay_the_competition_is_the_same_to_the_last_bit():
    _, _, plain, before = compete_for_real(replay=False)
    objective, _, replayed, same = compete_for_real(replay=True)
    assert plain == replayed and before == same
    assert objective.evaluator.skipped_calls > 0 and not objective.evaluator.notes()

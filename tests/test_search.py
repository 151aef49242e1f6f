"""The step that just forgets, found from yes and no alone; and the choice among the trials."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from slug_lightning.gradients import mean_gradient
from slug_lightning.layers import Layer
from slug_lightning.patch import edited
from slug_lightning.scores import score_layer
from slug_lightning.search import FINE, START, Trial, best_trial, search_step

thresholds = st.floats(1e-3, 100)
budgets = st.integers(1, 16)


def trial(step: float, forgotten: bool = True, damage: float | None = 0.5, layer: str = "w") -> Trial:
    return Trial(layer, step, step, forgotten, damage, 0.0, {})


def search(threshold: float, budget: int) -> list[Trial]:
    return search_step(lambda step: trial(step, step >= threshold), budget)


@given(thresholds, budgets)
def test_the_bracket_holds_the_threshold_and_the_budget_is_kept(threshold, budget):
    trials = search(threshold, budget)
    assert 1 <= len(trials) <= budget
    assert trials[0].step == START
    assert all(t.step > 0 for t in trials)
    assert len({t.step for t in trials}) == len(trials)
    high = min((t.step for t in trials if t.forgotten), default=math.inf)
    low = max((t.step for t in trials if not t.forgotten), default=0.0)
    assert low < threshold <= high


@given(thresholds, budgets)
def test_the_smallest_forgotten_step_is_as_near_as_the_bisection_allows(threshold, budget):
    trials = search(threshold, budget)
    first = next((i for i, t in enumerate(trials) if t.forgotten), None)
    assume(first is not None)
    width = trials[first].step * (0.5 if first else 1.0)  # between the last "not yet" and the first "forgotten"
    bracket = width / 2 ** (len(trials) - first - 1)
    high = min(t.step for t in trials if t.forgotten)
    assert high - threshold <= bracket * (1 + 1e-9)
    assert len(trials) == budget or bracket <= FINE * high * (1 + 1e-9)


@given(thresholds)
def test_it_stops_once_the_bracket_is_narrow(threshold):
    trials = search(threshold, 10_000)
    assert len(trials) < 40
    assert min(t.step for t in trials if t.forgotten) <= threshold / (1 - FINE) * (1 + 1e-9)


@given(budgets)
def test_what_is_never_forgotten_is_doubled_to_the_end(budget):
    assert [t.step for t in search(math.inf, budget)] == [START * 2**n for n in range(budget)]


@given(budgets)
def test_what_is_forgotten_at_once_is_halved_to_the_end(budget):
    assert [t.step for t in search(0.0, budget)] == pytest.approx([START / 2**n for n in range(budget)])


def test_every_trial_is_returned_in_order():
    asked = []

    def evaluate(step):
        asked.append(trial(step, step >= 0.3))
        return asked[-1]

    assert search_step(evaluate, 8) == asked


# ---- against a threshold that is known


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), factor=st.floats(1.5, 30))
def test_on_a_quadratic_loss_it_finds_the_step_known_in_closed_form(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 4), (20, 1)))
    weight = nn.Parameter(torch.randn(4, 1, generator=generator, dtype=torch.float64))
    layer = Layer("w", {"w": weight})
    gradient, loss, _ = mean_gradient(lambda b, _: ((x[b] @ weight - y[b]).square().mean(), len(b)), [range(20)], {"w": weight})
    score = score_layer(layer, gradient, gradient)
    target = factor * loss

    def evaluate(relative: float) -> Trial:
        step = relative * score.weight_norm / score.forget_norm
        moved = edited(weight.detach(), [(gradient["w"], step)])
        value = (x @ moved - y).square().mean().item()
        return Trial("w", step, relative, value >= target, 0.0, value, {})

    # L(w + λg) = L + λ g·g + λ²/n |Xg|², which is the target at the positive root.
    slope, curve = gradient["w"].square().sum().item(), (x @ gradient["w"]).square().mean().item()
    exact = (-slope + math.sqrt(slope**2 + 4 * curve * (target - loss))) / (2 * curve)
    found = best_trial(search_step(evaluate, 60)).step
    tried = [t.step for t in search_step(evaluate, 60) if t.forgotten]
    assert min(tried) >= exact * (1 - 1e-9)
    assert min(tried) <= exact / (1 - FINE) * (1 + 1e-9)
    assert found == min(tried)  # equal damage everywhere: the smallest step that forgets


# ---- the choice

damages = st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0000001, 2.0, math.inf, math.nan])
trials_lists = st.lists(
    st.builds(
        trial, st.sampled_from([0.1, 0.2, 0.4, 0.8]), st.booleans(), damages, st.sampled_from("abc")
    ),
    max_size=8,
)  # fmt: skip


@given(trials_lists)
def test_the_best_trial_is_feasible_and_no_other_is_better(trials):
    best = best_trial(trials)
    feasible = [t for t in trials if t.forgotten and t.damage is not None and t.damage <= 1]
    if not feasible:
        assert best is None
        return
    assert best in feasible
    assert all((best.damage, best.relative_step) <= (t.damage, t.relative_step) for t in feasible)


def test_ties_go_to_the_smaller_relative_step_not_to_the_smaller_lambda():
    a = Trial("a", 1.0, 0.4, True, 0.5, 0.0, {})
    b = Trial("b", 9.0, 0.2, True, 0.5, 0.0, {})
    assert best_trial([a, b]) is best_trial([b, a]) is b


def test_less_damage_wins_over_a_smaller_step():
    assert best_trial([trial(0.1, damage=0.9), trial(0.8, damage=0.1)]).step == 0.8


@pytest.mark.parametrize("damage", [None, math.nan, math.inf, 1.001])
def test_damage_unknown_not_finite_or_beyond_the_bound_is_never_feasible(damage):
    assert not trial(0.1, damage=damage).feasible
    assert best_trial([trial(0.1, damage=damage)]) is None


def test_what_does_not_forget_is_never_feasible():
    assert best_trial([trial(0.1, forgotten=False, damage=-5.0)]) is None

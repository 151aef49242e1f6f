"""The step that just forgets, found by interpolation in a bracket; and the choice among the trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from _amounts import examples
from _search import best_trial
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from slug_lightning.distributed.batch_sharding import IndexedBatch
from slug_lightning.methods.slug.statistics import layer_statistics
from slug_lightning.methods.slug.step_search import FINE, OVERSHOOT, SLACK, START, interpolation
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.gradients import mean_gradient
from slug_lightning.patches.edit import edited
from slug_lightning.tensors.layers import Layer

Way = Callable[[float], float]
"""How much of the way to the target a relative step goes; the target is 1."""

ENOUGH = 60
thresholds = st.floats(1e-3, 100)
behind_the_start = st.floats(START * 1.01, 100)
budgets = st.integers(1, 16)
powers = st.floats(0.5, 4)


def power_law(threshold: float, power: float) -> Way:
    return lambda step: (step / threshold) ** power


def exponential(threshold: float, power: float) -> Way:
    return lambda step: math.expm1(min(power * step / threshold, 700)) / math.expm1(power)


def saturating(threshold: float, power: float) -> Way:
    return lambda step: math.expm1(-power * step / threshold) / math.expm1(-power)


def jump(threshold: float, power: float) -> Way:
    return lambda step: power if step >= threshold else 0.0


def break_down(threshold: float, power: float) -> Way:
    """A model that still knows all, or gives NaN."""
    return lambda step: math.nan if step >= threshold else -power


smooth = [power_law, exponential, saturating]
kinds = st.sampled_from([*smooth, jump, break_down])


def trial(step: float, forgotten: bool = True, constraint_usage: float | None = 0.5, layer: str = "w") -> Trial:
    return Trial(layer, step, step, forgotten, constraint_usage, 0.0, {})


def search(way: Way, budget: int = ENOUGH, **options: float) -> list[Trial]:
    """Search with a metric that falls from 0.9 to the target of 0.4; a model that breaks counts as forgotten."""

    def evaluate(step: float) -> Trial:
        value = 0.9 - 0.5 * way(step)
        return Trial("w", step, step, not math.isfinite(value) or value <= 0.4 + 1e-12, None, value, None)

    return interpolation(evaluate, lambda t: share(t.forget), budget, **options)


def share(value: float) -> float:
    return (value - 0.9) / -0.5 if math.isfinite(value) else math.inf


def steps_of(trials: list[Trial]) -> list[float]:
    return [t.step for t in trials]


def bracket(trials: list[Trial]) -> tuple[float, float]:
    """The largest step that does not forget, and the smallest that does."""
    low = max((t.step for t in trials if not t.forgotten), default=0.0)
    return low, min((t.step for t in trials if t.forgotten), default=math.inf)


def is_done(trials: list[Trial]) -> bool:
    """Whether a step is found that forgets, and not much more than that or than one that doesn't."""
    low, high = bracket(trials)
    if high == math.inf:
        return False
    gone = next(share(t.forget) for t in trials if t.step == high)
    return gone <= 1 + OVERSHOOT or high - low <= FINE * (1 + SLACK) * high


@given(kinds, thresholds, powers.map(lambda p: p + 1), budgets)
def test_the_bracket_holds_the_threshold_and_the_budget_is_kept(kind, threshold, power, budget):
    trials = search(kind(threshold, power), budget)
    assert 1 <= len(trials) <= budget
    assert trials[0].step == START
    assert all(t.step > 0 for t in trials)
    assert len({t.step for t in trials}) == len(trials)
    low, high = bracket(trials)
    assert low < threshold * (1 + 1e-9) and threshold * (1 - 1e-9) <= high


@given(kinds, thresholds, powers.map(lambda p: p + 1))
def test_it_ends_at_a_step_that_forgets_and_hardly_a_smaller_one_does_and_not_before(kind, threshold, power):
    trials = search(kind(threshold, power))
    assert is_done(trials) and len(trials) < ENOUGH
    assert not any(is_done(trials[:count]) for count in range(1, len(trials)))
    assert steps_of(trials)[:7] == steps_of(search(kind(threshold, power), 7))  # a smaller budget ends the same search earlier


@given(st.lists(st.floats(-1, 2) | st.floats(), min_size=1, max_size=20))
def test_whatever_the_metric_does_every_step_is_tried_once_within_the_bracket(ways):
    left = iter(ways)
    trials = search(lambda _: next(left), len(ways))
    for count in range(1, len(trials)):
        low, high = bracket(trials[:count])
        assert low < trials[count].step < high and math.isfinite(trials[count].step)
        if high == math.inf:
            assert 1.2 * low <= trials[count].step * (1 + 1e-9) and trials[count].step <= 2 * low
    assert len(trials) == len(ways) or is_done(trials)


@given(kinds, thresholds, powers.map(lambda p: p + 1))
def test_once_there_is_a_bracket_two_evaluations_halve_it_at_least(kind, threshold, power):
    trials = search(kind(threshold, power))
    brackets = [bracket(trials[:count]) for count in range(1, len(trials) + 1)]
    widths = [high - low for low, high in brackets if high < math.inf]
    assert all(after <= before / 2 * (1 + 1e-9) for before, after in zip(widths, widths[2:], strict=False))


@given(behind_the_start, powers)
def test_a_power_law_is_met_at_the_second_interpolation_at_the_latest(threshold, power):
    trials = search(power_law(threshold, power))
    first = [t.forgotten for t in trials].index(True)
    assert len(trials) <= first + 3


@given(st.sampled_from(smooth), behind_the_start, powers)
def test_whatever_is_smooth_takes_at_most_five_evaluations_once_there_is_a_bracket(kind, threshold, power):
    trials = search(kind(threshold, power))
    first = [t.forgotten for t in trials].index(True)
    assert len(trials) <= first + 6


def test_the_interpolation_lies_just_beyond_the_target():
    trials = search(power_law(0.31, 2.0))
    assert steps_of(trials) == pytest.approx([0.1, 0.2, 0.4, 0.31 * math.sqrt(1.025)])


def test_near_the_target_the_step_is_not_doubled():
    trials = search(lambda step: 0.0 if step < 0.15 else 0.8 if step < 0.25 else 0.99 if step < 0.3 else 1.01)
    assert steps_of(trials) == pytest.approx([0.1, 0.2, 0.2 * 1.1 / 0.8, 0.2 * 1.1 / 0.8 * 1.2])


@given(budgets, st.floats(-1, 0.55))
def test_what_is_never_forgotten_is_doubled_to_the_end(budget, gone):
    assert steps_of(search(lambda _: gone, budget)) == pytest.approx([START * 2**n for n in range(budget)])


@given(budgets, st.floats(0.56, 0.999))
def test_what_nearly_forgets_grows_by_a_fifth_at_least(budget, gone):
    steps = steps_of(search(lambda _: gone, budget))
    assert all(1.2 <= after / before * (1 + 1e-9) <= 2 for before, after in itertools.pairwise(steps))


@pytest.mark.parametrize("gone", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_broken_at_once_is_halved_to_the_end(gone):
    assert steps_of(search(lambda _: gone, 9)) == pytest.approx([START / 2**n for n in range(9)])


def test_a_model_that_breaks_just_behind_the_target_is_narrowed_by_halves():
    steps = steps_of(search(lambda step: 0.5 * step / 0.4 if step < 0.5 else math.nan, 7))
    assert steps == pytest.approx([0.1, 0.2, 0.4, 0.8, 0.6, 0.5, 0.45])


@given(thresholds, powers, st.floats(1e-3, 1))
def test_it_begins_where_it_is_told_to(threshold, power, start):
    trials = search(power_law(threshold, power), start=start)
    assert trials[0].step == start and is_done(trials)


def test_a_start_that_just_forgets_is_all_that_is_tried():
    assert steps_of(search(power_law(0.7, 1.0), start=0.72)) == [0.72]


def test_every_trial_is_returned_in_order():
    asked = []

    def evaluate(step):
        asked.append(trial(step, step >= 0.3))
        return asked[-1]

    found = interpolation(evaluate, lambda _: math.inf if asked[-1].forgotten else 0.0, 6)
    assert len(found) == 6 and all(one is other for one, other in zip(found, asked, strict=True))


# ---- against a threshold that is known


@examples(15)
@given(seed=st.integers(0, 1000), factor=st.floats(1.5, 30))
def test_on_a_quadratic_loss_it_finds_the_step_known_in_closed_form(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 4), (20, 1)))
    weight = nn.Parameter(torch.randn(4, 1, generator=generator, dtype=torch.float64))
    layer = Layer("w", {"w": weight})
    gradient, loss, _ = mean_gradient(
        lambda b, _: ((x[b] @ weight - y[b]).square().mean(), len(b)), [IndexedBatch(0, range(20))], {"w": weight}
    )
    (score,) = layer_statistics([layer], gradient, gradient)
    target = factor * loss

    def loss_at(step: float) -> float:
        return (x @ edited(weight.detach(), [(gradient["w"], step)]) - y).square().mean().item()

    def evaluate(relative: float) -> Trial:
        step = relative * score.weight_norm / score.forget_norm
        return Trial("w", step, relative, loss_at(step) >= target, 0.0, loss_at(step), {})

    # L(w + λg) = L + λ g·g + λ²/n |Xg|², which is the target at the positive root.
    slope, curve = gradient["w"].square().sum().item(), (x @ gradient["w"]).square().mean().item()
    exact = (-slope + math.sqrt(slope**2 + 4 * curve * (target - loss))) / (2 * curve)
    trials = interpolation(evaluate, lambda t: (t.forget - loss) / (target - loss), 60)
    smallest = min(t.step for t in trials if t.forgotten)
    assert smallest >= exact * (1 - 1e-9)
    assert smallest <= exact / (1 - FINE) * (1 + 1e-9) or loss_at(smallest) - target <= OVERSHOOT * (target - loss) * (1 + 1e-9)
    assert best_trial(trials).step == smallest  # equal damage everywhere: the smallest step that forgets


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
    feasible = [t for t in trials if t.forgotten and t.constraint_usage is not None and t.constraint_usage <= 1]
    if not feasible:
        assert best is None
        return
    assert best in feasible
    assert all((best.constraint_usage, best.relative_step) <= (t.constraint_usage, t.relative_step) for t in feasible)


def test_ties_go_to_the_smaller_relative_step_not_to_the_smaller_lambda():
    a = Trial("a", 1.0, 0.4, True, 0.5, 0.0, {})
    b = Trial("b", 9.0, 0.2, True, 0.5, 0.0, {})
    assert best_trial([a, b]) is best_trial([b, a]) is b


def test_less_damage_wins_over_a_smaller_step():
    assert best_trial([trial(0.1, constraint_usage=0.9), trial(0.8, constraint_usage=0.1)]).step == 0.8


@pytest.mark.parametrize("constraint_usage", [None, math.nan, math.inf, 1.001])
def test_constraint_usage_unknown_not_finite_or_beyond_the_bound_is_never_feasible(constraint_usage):
    assert not trial(0.1, constraint_usage=constraint_usage).feasible
    assert best_trial([trial(0.1, constraint_usage=constraint_usage)]) is None


def test_what_does_not_forget_is_never_feasible():
    assert best_trial([trial(0.1, forgotten=False, constraint_usage=-5.0)]) is None


def test_a_trial_whose_measurement_was_broken_off_is_never_the_best():
    dropped = replace(trial(0.1, constraint_usage=None), dropped=True)
    assert not dropped.feasible
    assert best_trial([dropped]) is None
    assert best_trial([dropped, trial(0.8, constraint_usage=0.9)]).step == 0.8


@examples(200)
@given(power=st.floats(0.5, 5), reach=st.floats(0.05, 20), start=st.sampled_from([0.1, 1.0]), kink=st.floats(0.1, 1))
@example(power=0.5, reach=1.0, start=0.1, kink=0.2)  # on the target, where either is right
def test_a_hairs_breadth_in_the_metric_does_not_change_the_path(power, reach, start, kink):
    """What adds up in another order on several devices must not end the search one step earlier or later."""

    def searched(error: float) -> list[Trial]:
        def evaluate(r):
            share = (r / reach) ** power * (1 + error)
            share = share if share < kink else share**2 / kink
            return Trial("w", r, r, share >= 1, None, share, None)

        return interpolation(evaluate, lambda t: t.forget, 12, start)

    exact, near = searched(0.0), searched(1e-9)
    # Where a step lands on the target itself, either answer is right.
    if all(abs(trial.forget - 1) > 1e-6 for trial in exact + near):
        assert [trial.step for trial in near] == pytest.approx([trial.step for trial in exact], rel=1e-5)

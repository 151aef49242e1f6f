"""Several forget metrics, and targets with two sides."""

import math

import pytest
import torch
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from _tiny import CLASSES, Classifier, fit, loader, trained
from slug_lightning import UnlearnError, UnlearnReport
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.methods.targets import Target, share_of
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.metrics import Metric

ACCURACY, LOSS = Metric("accuracy", True), Metric("loss", False)
values = st.floats(0.01, 0.99)


@given(values, values, values)
def test_the_share_is_0_before_and_1_at_the_goal_and_linear_between(before, goal, part):
    for metric in (ACCURACY, LOSS):
        target = Target(metric, goal, "given", before)
        if target.was_met:
            assert target.share(before) == math.inf
            continue
        assert target.share(before) == 0 and target.share(goal) == pytest.approx(1)
        assert target.share(before + part * (goal - before)) == pytest.approx(part)


@given(st.lists(values, min_size=3, max_size=3, unique=True), values)
def test_an_interval_is_entered_at_its_nearer_end_and_left_at_the_other(ends, value):
    low, high, before = sorted(ends)
    target = Target(ACCURACY, [low, high], "given", before)
    if target.was_met:  # nearer than the slack
        return
    inside, outside = low <= value <= high, value < low - 1e-5
    assert target.is_met(value) or not inside
    if inside:
        assert target.share(value) >= 1 and math.isfinite(target.share(value)) and not target.is_beyond(value)
    if outside:
        assert target.is_beyond(value) and target.share(value) == math.inf and not target.is_met(value)
    if value > high + 1e-5:
        assert target.share(value) < 1 and not target.is_beyond(value)


def test_the_metric_with_the_least_of_its_way_counts_and_what_was_met_counts_only_once_it_is_lost():
    targets = [Target(ACCURACY, 0.2, "given", 1.0), Target(LOSS, 3.0, "given", 1.0)]
    assert share_of(targets, {"accuracy": 0.6, "loss": 1.5}) == 0.25
    met = [targets[0], Target(LOSS, 3.0, "given", 4.0)]
    assert share_of(met, {"accuracy": 0.6, "loss": 3.5}) == 0.5
    assert share_of(met, {"accuracy": 0.1, "loss": 2.9}) == 0.0


def test_beyond_one_interval_is_too_far_whatever_the_others_say():
    targets = [Target(ACCURACY, (0.6, 0.8), "given", 1.0), Target(LOSS, (3.0, 4.0), "given", 1.0)]
    assert share_of(targets, {"accuracy": 0.5, "loss": 1.5}) == math.inf


@given(st.floats(0.05, 4), st.floats(0.05, 0.5))
def test_the_search_finds_an_interval_that_it_has_stepped_over(threshold, width):
    """A metric that falls by 1 in all, and lies in the interval over a part of the way only."""
    target = Target(ACCURACY, (0.5 - width, 0.5), "given", 1.0)

    def evaluate(step):
        value = math.exp(-math.log(2) * step / threshold)
        return Trial("w", step, step, target.is_met(value), None, value, None)

    trials = interpolation(evaluate, lambda trial: target.share(trial.forget), 40)
    assert any(trial.forgotten for trial in trials)
    smallest = min(trial.relative_step for trial in trials if trial.forgotten)
    assert smallest == pytest.approx(threshold, rel=0.2)


class TwoWordings(Classifier):
    """Answers two ways of asking; the second is the harder to forget: the right class is among its two best."""

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        best = logits.topk(2, dim=1).indices == batch[1][:, None]
        self.log("first_accuracy", best[:, 0].float().mean())
        self.log("second_accuracy", best.any(1).float().mean())
        self.log("loss", cross_entropy(logits, batch[1]))


def run(metrics, targets, **options):
    model = trained(TwoWordings)
    callback = unlearn_callback(
        loader(True),
        loader(False),
        forget_metric=metrics,
        forget_target=targets,
        retain_metric="first_accuracy",
        retain_tolerance=0.2,
        **options,
    )
    fit(callback, model)
    return callback.report


def test_all_wordings_must_be_forgotten():
    one, both = run("first_accuracy", 0.2), run(["first_accuracy", "second_accuracy"], 0.2)
    assert one.status == both.status == "unlearned"
    assert both.after["forget"]["second_accuracy"] <= 0.2 < 1 == both.before["forget"]["second_accuracy"]
    assert both.search_after["forget"].keys() == {"first_accuracy", "second_accuracy"}
    for trial in both.trace:
        assert trial["forgotten"] == all(value <= 0.2 + 1e-6 for value in trial["forget_metrics"].values())
        assert trial["forget"] == max(trial["forget_metrics"].values())
    steps = {t["layer"]: t["relative_step"] for t in one.trace if t["forgotten"]}
    harder = {t["layer"]: t["relative_step"] for t in both.trace if t["forgotten"]}
    assert any(harder[layer] > steps[layer] * 1.05 for layer in harder.keys() & steps.keys())
    again = UnlearnReport.from_dict(both.to_dict())
    assert again.goals == {"first_accuracy": 0.2, "second_accuracy": 0.2} and "second_accuracy" in again.to_text()
    assert set(both.figures()) >= {"trade_off"}


def test_a_metric_that_meets_its_target_unedited_must_stay_so():
    report = run(["first_accuracy", "loss"], {"first_accuracy": 0.2, "loss": 0.0})
    assert report.status == "unlearned" and report.goals == {"first_accuracy": 0.2, "loss": 0.0}
    with pytest.raises(UnlearnError, match="nothing to forget of 'the forget set', first_accuracy is 1 .* already; loss is"):
        run(["first_accuracy", "loss"], {"first_accuracy": 1.0, "loss": 0.0})


def test_a_target_for_what_is_no_forget_metric_is_refused():
    with pytest.raises(UnlearnError, match="forget_target: 'third' is not among the forget metrics, first_accuracy"):
        run("first_accuracy", {"third": 0.1})


def test_without_a_target_each_metric_has_its_own():
    report = run(["first_accuracy", "loss"], {"first_accuracy": 1 / CLASSES})
    assert report.goals["loss"] == pytest.approx(report.search_before["forget"]["loss"] + math.log(100))
    assert torch.isfinite(torch.tensor(report.after["forget"]["loss"]))

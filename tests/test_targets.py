"""Several forget metrics, and targets with two sides."""

import math

import pytest
import torch
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from _tiny import CLASSES, Classifier, fit, loader, trained, trainer
from slug_lightning import UnlearnError, UnlearnReport
from slug_lightning.datamodules import SampleDataModule
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
    assert share_of(met, {"accuracy": 0.6, "loss": 2.9}) == math.inf  # lost by going too far


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


# ---- as samples that were never seen


class Memory(Classifier):
    """Knows some samples by heart: each has a feature of its own, which the first layer's weights reward."""

    forget_metric = ("hit_accuracy", "hit_nll")
    retain_metric = "hit_accuracy"

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("hit_accuracy", (logits.argmax(1) == batch[1]).double().mean())
        self.log("hit_nll", cross_entropy(logits, batch[1]))


def samples(count, seed):
    """Points of which the labels are chance: what is known of them is memory."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 8, generator=generator) + torch.nn.functional.one_hot(labels, 8), labels)


def memorising():
    torch.manual_seed(0)  # the model has dropout
    model = trained(Memory)
    x, y = samples(120, 1).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model.net(x), y).backward()
        optimizer.step()
    return model


def test_random_samples_are_brought_into_the_interval_of_samples_never_seen():
    model = memorising().eval()
    x, y = samples(400, 2).tensors
    with torch.no_grad():
        nll = cross_entropy(model.net(x), y, reduction="none").double()
        hit = (model.net(x).argmax(1) == y).double()
    data = SampleDataModule(samples(120, 1), indices=list(range(24)), holdout=samples(400, 2), batch_size=32)
    callback = unlearn_callback(forget_target="as_holdout", retain_tolerance=0.2)
    trainer(callback).fit(model.train(), datamodule=data)
    report = callback.report
    for name, values in (("hit_accuracy", hit), ("hit_nll", nll)):
        half = 1.96 * values.std() / len(values) ** 0.5
        assert report.goals[name] == pytest.approx([float(values.mean() - half), float(values.mean() + half)], rel=1e-5)
    assert report.status == "unlearned" and report.bounds["forget_target_reason"] == "95 % interval of the holdout samples"
    for name, (low, high) in report.goals.items():
        assert low - 1e-5 <= report.after["forget"][name] <= high + 1e-5
    assert UnlearnReport.from_dict(report.to_dict()).to_text() == report.to_text()


def test_too_few_samples_never_seen_cannot_tell():
    data = SampleDataModule(samples(120, 1), indices=[0, 1], holdout=samples(40, 2), batch_size=32)
    with pytest.raises(UnlearnError, match="forget_target: 40 holdout samples cannot tell .* give at least 300"):
        trainer(unlearn_callback(forget_target="as_holdout")).fit(memorising(), datamodule=data)


def test_without_such_samples_the_target_is_refused():
    with pytest.raises(UnlearnError, match="forget_target: 'as_holdout' needs samples .* SampleDataModule"):
        run(["first_accuracy"], "as_holdout")
    with pytest.raises(UnlearnError, match="forget_target must be numbers or 'as_holdout', got 'holdout'"):
        unlearn_callback(forget_target="holdout")


def test_a_metric_that_was_met_and_is_lost_went_too_far():
    """The window lies below the first step: the search must come back, and not go on."""
    targets = [Target(ACCURACY, (0.8, 0.92), "given", 0.9), Target(LOSS, (0.3, 1.5), "given", 0.05)]

    def evaluate(step):
        values = {"accuracy": 0.9 - 1.5 * step, "loss": 0.05 + 5 * step}
        forgotten = all(target.is_met(values[target.metric.name]) for target in targets)
        return Trial("w", step, step, forgotten, None, values["loss"], None, forget_metrics=values)

    trials = interpolation(evaluate, lambda trial: share_of(targets, trial.forget_metrics), 12)
    assert any(trial.forgotten for trial in trials) and not trials[0].forgotten


def test_several_groups_of_samples_come_to_the_level_of_samples_never_seen_together():
    indices = {"ann": list(range(40)), "bob": list(range(40, 80))}
    data = SampleDataModule(samples(120, 1), indices=indices, holdout=samples(400, 2), batch_size=32)
    callback = unlearn_callback(forget_metric="hit_nll", forget_target="as_holdout", retain_tolerance=0.3)
    trainer(callback).fit(memorising(), datamodule=data)
    report = callback.report
    assert report.status == "unlearned"
    for single in report.concepts.values():
        (low, high), (value,) = single.goals["hit_nll"], single.search_after["forget"].values()
        assert low - 1e-5 <= value <= high + 1e-5


def test_so_few_samples_that_no_share_of_them_is_in_the_interval_are_refused():
    data = SampleDataModule(samples(120, 1), indices=[0, 1, 2], holdout=samples(400, 2), batch_size=32)
    callback = unlearn_callback(forget_metric="hit_accuracy", forget_target="as_holdout")
    with pytest.raises(UnlearnError, match="forget_target: no share of 3 forget samples lies within .* forget more samples"):
        trainer(callback).fit(memorising(), datamodule=data)

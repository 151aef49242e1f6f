"""The two bounds, in both directions and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.metrics import Metric, constraint_usage, describe_metric

accuracy, loss = Metric("acc", True, chance=0.1), Metric("loss", False)
values = st.floats(0.01, 100)
tolerances = st.sampled_from([0.0, 0.01, 0.5, 3.0])


def one(metric: Metric, before: float, after: float, tolerance: float) -> float:
    return constraint_usage({metric.name: metric}, {metric.name: before}, {metric.name: after}, tolerance)


@pytest.mark.parametrize(("metric", "value", "expected"), [
    (accuracy, 0.2, True), (accuracy, 0.3, True), (accuracy, 0.31, False), (accuracy, 0.30000001192, True),
    (loss, 0.31, True), (loss, 0.3, True), (loss, 0.2, False),
    (accuracy, math.nan, False), (loss, math.nan, False), (loss, math.inf, True),
])  # fmt: skip
def test_an_accuracy_is_forgotten_at_or_below_and_a_loss_at_or_above_the_target(metric, value, expected):
    assert metric.reaches(value, 0.3) is expected


def test_an_accuracy_is_forgotten_at_chance():
    assert accuracy.default_target(0.9) == (0.1, "chance level of acc")


def test_an_accuracy_without_a_chance_level_has_no_default_target():
    with pytest.raises(UnlearnError, match="'val_acc'.*num_classes"):
        Metric("val_acc", True).default_target(0.9)


@given(st.floats(0, 50))
def test_a_loss_is_forgotten_when_the_data_are_a_hundred_times_less_likely(before):
    target, _ = loss.default_target(before)
    assert math.exp(-target) <= math.exp(-before) / 100 * (1 + 1e-9)
    assert target >= 2 * before
    assert target in (pytest.approx(before + math.log(100)), 2 * before)


def test_a_loss_must_reach_that_of_a_model_that_knows_nothing():
    assert Metric("loss", False, chance=math.log(1000)).default_target(0.1)[0] == math.log(1000)
    assert Metric("loss", False, chance=math.log(2)).default_target(5.0)[0] == 10.0
    assert "knows nothing" in Metric("loss", False, chance=9.0).default_target(0.1)[1]


@given(st.floats(-50, 50))
def test_no_default_target_of_a_loss_is_met_before_the_edit(before):
    assert not loss.reaches(before, loss.default_target(before)[0])


# ---- what is lost


@given(st.floats(0, 1), st.floats(-0.5, 0.5), tolerances)
def test_an_accuracy_may_lose_the_tolerance_in_points(before, change, tolerance):
    if abs(-change - tolerance) > 1e-6:
        assert (one(accuracy, before, before + change, tolerance) <= 1) == (-change <= tolerance)


@given(values, st.floats(-0.5, 0.5), tolerances)
def test_a_loss_may_lose_the_tolerance_as_a_share_of_itself_or_of_a_tenth(before, change, tolerance):
    if abs(change - tolerance) > 1e-6:
        assert (one(loss, before, before + change * max(before, 0.1), tolerance) <= 1) == (change <= tolerance)


@given(st.floats(1e-6, 0.1), st.floats(-0.5, 0.5), tolerances)
def test_an_error_has_no_such_floor_as_its_scale_is_anybodys(before, change, tolerance):
    error = Metric("val_mae", False)
    if abs(change - tolerance) > 1e-3:
        assert (one(error, before, before * (1 + change), tolerance) <= 1) == (change <= tolerance)


@given(st.floats(0.02, 1), st.floats(-0.5, 0.5), tolerances)
def test_an_accuracy_in_per_cent_counts_as_a_share(before, change, tolerance):
    share, percent = Metric("val_acc", True, chance=0.1), Metric("val_acc", True, chance=0.1)
    if abs(-change - tolerance) > 1e-3:
        assert (one(percent, 100 * before, 100 * (before + change), tolerance) <= 1) == (
            one(share, before, before + change, tolerance) <= 1
        )
        assert percent.default_target(100 * before)[0] == pytest.approx(10)


@pytest.mark.parametrize("name", ["val_psnr", "reward", "bleu"])
def test_a_score_of_another_scale_stays_as_it_is(name):
    assert Metric(name, True).loss_of_retain(30.0, 29.0) == 1.0


@given(st.sampled_from([accuracy, loss, Metric("val_mae", False)]), st.floats(0.01, 5), tolerances)
def test_a_limit_is_where_the_tolerance_is_used_up(metric, before, tolerance):
    assert one(metric, before, metric.limit(before, tolerance), tolerance) == pytest.approx(1, abs=1e-3) or tolerance < 1e-5


@pytest.mark.parametrize("name", ["val_mae", "dice_loss", "l1_loss", "cosine_loss", "val_error"])
def test_of_what_is_no_likelihood_a_target_must_be_given(name):
    with pytest.raises(UnlearnError, match=f"forget_target: '{name}' is 0.3 and no negative log-likelihood"):
        Metric(name, False).default_target(0.3)


def test_a_perplexity_must_grow_a_hundredfold():
    assert Metric("val_perplexity", False).default_target(7.0)[0] == 700


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("metric", [accuracy, loss])
def test_nothing_lost_is_no_damage_and_a_gain_is_below_zero(metric, tolerance):
    better = 0.2 if metric.higher_is_better else -0.2
    assert one(metric, 0.5, 0.5, tolerance) == 0
    assert one(metric, 0.5, 0.5 + better, tolerance) < 0
    assert one(metric, 0.5, 0.5 - better, tolerance) > 1


def test_tolerance_zero_allows_rounding_but_no_sample():
    assert one(accuracy, 0.1 + 0.2, 0.3, 0.0) <= 1
    assert one(accuracy, 0.9, 0.9 - 1e-6, 0.0) > 1


def test_losing_exactly_the_tolerance_is_allowed_though_floats_divide_unevenly():
    for n in (3, 7, 100, 999):
        assert one(accuracy, (n - 1) / n, (n - 2) / n, 1 / n) <= 1


def test_losing_more_is_never_less_damage():
    for tolerance in (0.0, 1e-9, 0.01):
        losses = [-0.5, -1e-3, 0.0, 1e-12, 1e-10, 1e-9, 1e-6, 1e-3, 0.5]
        damages = [one(accuracy, 0.0, -lost, tolerance) for lost in losses]
        assert damages == sorted(damages), tolerance


def test_a_negative_loss_is_measured_against_its_size():
    assert loss.loss_of_retain(-2.0, -1.9) == pytest.approx(0.05)
    assert loss.loss_of_retain(0.0, 0.3) == pytest.approx(3.0)  # of a tenth


def test_the_worst_of_several_metrics_counts_each_in_its_own_direction():
    metrics, before = {"acc": accuracy, "loss": loss}, {"acc": 0.9, "loss": 2.0}
    assert constraint_usage(metrics, before, {"acc": 0.95, "loss": 2.2}, 0.05) == pytest.approx(2, rel=1e-6)
    assert constraint_usage(metrics, before, {"acc": 0.8, "loss": 1.0}, 0.05) == pytest.approx(2, rel=1e-6)


def test_a_measurement_that_is_nan_is_beyond_every_bound():
    assert one(accuracy, 0.9, math.nan, 0.5) == math.inf
    assert one(loss, 0.9, math.inf, 0.5) == math.inf
    assert (
        constraint_usage({"acc": accuracy, "loss": loss}, {"acc": 0.9, "loss": 1.0}, {"acc": math.nan, "loss": 1.0}, 0.5)
        == math.inf
    )


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_counts_in_whatever_place_it_stands(bad):
    after = {"acc": 0.9, "loss": bad}
    assert constraint_usage({"acc": accuracy, "loss": loss}, {"acc": 0.9, "loss": 1.0}, after, 0.5) == math.inf


# ---- which way is better, and where chance lies


@pytest.mark.parametrize("name", ["loss", "val_loss", "val/NLL", "test-perplexity", "error_rate", "val_mse", "MAE"])
def test_a_name_of_a_loss_is_a_loss(name):
    assert describe_metric(name, nn.Identity()) == Metric(name, False, None)


@pytest.mark.parametrize("name", ["acc", "val_f1", "recall@1", "auroc"])
def test_any_other_name_is_an_accuracy(name):
    assert describe_metric(name, nn.Identity()) == Metric(name, True, None)


@pytest.mark.parametrize(("logged", "name", "higher"), [
    (torchmetrics.MeanSquaredError(), "val_score", False),
    (torchmetrics.classification.MulticlassAccuracy(num_classes=5), "lossless", True),
])  # fmt: skip
def test_a_torchmetrics_object_knows_better_than_its_name(logged, name, higher):
    assert describe_metric(name, nn.Identity(), logged).higher_is_better is higher


def test_an_object_that_does_not_say_leaves_it_to_the_name():
    logged = torchmetrics.MeanMetric()
    assert logged.higher_is_better is None
    assert not describe_metric("val_loss", nn.Identity(), logged).higher_is_better


class Net(nn.Module):
    def __init__(self, **attributes) -> None:
        super().__init__()
        vars(self).update(attributes)


def test_chance_comes_from_the_object_then_the_module_then_its_hparams():
    logged = torchmetrics.classification.MulticlassAccuracy(num_classes=5)
    assert describe_metric("acc", Net(num_classes=4, hparams={"num_classes": 2}), logged).chance == 1 / 5
    assert describe_metric("acc", Net(num_classes=4, hparams={"num_classes": 2})).chance == 1 / 4
    assert describe_metric("acc", Net(hparams={"num_classes": 2})).chance == 1 / 2
    assert describe_metric("loss", Net(hparams={"num_classes": 2})).chance == math.log(2)


def test_a_declared_chance_comes_first_by_metric_or_for_all():
    assert describe_metric("acc", Net(chance=0.03, num_classes=4)).chance == 0.03
    declared = Net(chance={"acc": 0.0}, num_classes=4)
    assert describe_metric("acc", declared).chance == 0.0
    assert describe_metric("other_acc", declared).chance == 0.25


@pytest.mark.parametrize(
    ("name", "higher"), [("val_ce", False), ("ppl", False), ("valloss", False), ("f1", True), ("val/top1", True)]
)
def test_the_words_of_a_name_say_which_way_is_better(name, higher):
    assert describe_metric(name, Net()).higher_is_better is higher


def test_a_name_that_says_nothing_is_refused_unless_the_module_speaks():
    with pytest.raises(UnlearnError, match="val_x: unknown whether higher is better.*higher_is_better"):
        describe_metric("val_x", Net())
    assert describe_metric("val_x", Net(higher_is_better={"val_x": False})).higher_is_better is False


def test_a_num_classes_that_is_no_count_is_ignored():
    assert describe_metric("acc", Net(num_classes=torch.nn.Identity())).chance is None

"""A module's steps leave no trace, and what they log is read."""

from __future__ import annotations

import random
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from slug_lightning.errors import UnlearnError
from slug_lightning.steps import LogReader, batch_samples, loss_in, read_logs, untouched

PREDICTED, TRUE = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 0])


class Failure(Exception):
    pass


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))


def leave(module: nn.Module, body, fail: bool) -> None:
    """Run `body` inside `untouched`, then leave it by an exception if `fail`."""
    with pytest.raises(Failure) if fail else nullcontext(), untouched(module):
        body()
        if fail:
            raise Failure


@pytest.mark.parametrize("fail", [False, True])
def test_batch_norm_buffers_are_put_back_in_place(fail):
    net = network()
    net(torch.randn(8, 3))
    before = {name: b.clone() for name, b in net.named_buffers()}
    addresses = {name: b.data_ptr() for name, b in net.named_buffers()}

    def body():
        net.train()
        net(torch.randn(8, 3) + 5)
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])

    leave(net, body, fail)
    assert len(before) == 6
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.data_ptr() == addresses[name]


@pytest.mark.parametrize("fail", [False, True])
def test_modes_come_back_one_by_one_though_submodules_differed(fail):
    net = network()
    net.train()
    net[1].eval()
    net[3][0].eval()
    before = [m.training for m in net.modules()]
    leave(net, lambda: None, fail)
    assert [m.training for m in net.modules()] == before
    assert before.count(False) == 2


def test_inside_everything_is_in_evaluation_mode():
    net = network()
    with untouched(net):
        assert not any(m.training for m in net.modules())
        x = torch.randn(4, 3)
        assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("fail", [False, True])
def test_random_numbers_go_on_as_if_nothing_had_been_drawn(fail):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    net, states = network(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    expected = draw()
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])

    def body():
        draw()
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    leave(net, body, fail)
    assert draw() == expected


class WithMetrics(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=3, average="micro")
        self.values = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection(
            {"acc": MulticlassAccuracy(num_classes=3), "f1": MulticlassF1Score(num_classes=3)}, prefix="val_"
        )


@pytest.mark.parametrize("fail", [False, True])
def test_metric_states_and_counts_are_put_back(fail):
    module = WithMetrics()
    module.accuracy.update(PREDICTED, TRUE)
    module.values.update(torch.tensor([1.0, 2.0]))
    accuracy = module.accuracy.compute()

    def body():
        module.accuracy.reset()
        module.accuracy.update(TRUE, TRUE)
        module.values.update(torch.tensor([9.0]))
        module.both.update(TRUE, TRUE)

    leave(module, body, fail)
    assert module.accuracy.update_count == module.values.update_count == 1
    assert module.accuracy.compute() == accuracy == 0.5
    module.accuracy.update(TRUE, TRUE)
    assert module.accuracy.compute() == 0.75
    assert torch.equal(module.values.compute(), torch.tensor([1.0, 2.0]))
    assert all(metric.update_count == 0 for metric in module.both.values())


def test_a_list_state_does_not_grow_from_inside():
    module = WithMetrics()
    module.values.update(torch.tensor([1.0]))
    with untouched(module):
        module.values.value.append(torch.tensor([2.0]))
    assert len(module.values.value) == 1


# ---- reading logs


class Logging(pl.LightningModule):
    """Logs in every way that validation steps log."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=3, average="micro")
        self.both = torchmetrics.MetricCollection([MulticlassAccuracy(num_classes=3), torchmetrics.MeanSquaredError()])

    def validation_step(self, batch, batch_idx):
        predicted, true = batch
        self.accuracy.update(predicted, true)
        self.log("object", self.accuracy, on_epoch=True)
        self.log("mean", (predicted == true).float().mean(), prog_bar=True)
        self.log_dict({"number": float(len(true)), "own_weight": torch.tensor([2.0 * batch_idx])}, batch_size=batch_idx + 1)
        self.both.update(predicted, true)
        self.log_dict(self.both)


def test_every_way_of_logging_gives_the_value_over_all_samples():
    module = Logging()
    module.accuracy.update(TRUE, TRUE)  # left from before, must not count
    batches = [(PREDICTED[:1], TRUE[:1]), (PREDICTED[1:], TRUE[1:])]
    with read_logs(module) as reader:
        for number, batch in enumerate(batches):
            reader.samples = batch_samples(batch)
            module.validation_step(batch, number)
        found = reader.values()
    assert found == pytest.approx({
        "object": 0.5,
        "mean": 0.5,
        "number": (1 * 1 + 3 * 2) / 3,
        "own_weight": (0 * 1 + 2 * 2) / 3,
        "MulticlassAccuracy": (1 / 2 + 1 / 2 + 0) / 3,  # the mean of the classes' recalls
        "MeanSquaredError": (0 + 0 + 1 + 4) / 4,
    })  # fmt: skip


def test_metrics_that_share_a_compute_group_are_both_right():
    module = WithMetrics()
    with read_logs(module) as reader:
        for start in (0, 2):
            module.both.update(PREDICTED[start : start + 2], TRUE[start : start + 2])
            reader.log_dict(module.both)
        found = reader.values()
    whole = WithMetrics().both(PREDICTED, TRUE)
    assert found == pytest.approx({name: value.item() for name, value in whole.items()})


@pytest.mark.parametrize("fail", [False, True])
def test_log_is_shadowed_on_the_instance_alone_and_freed_again(fail):
    module, other = Logging(), Logging()
    original = Logging.log
    with pytest.raises(Failure) if fail else nullcontext(), read_logs(module):
        assert module.log.__func__ is LogReader.log and module.log_dict.__func__ is LogReader.log_dict
        assert Logging.log is original and other.log.__func__ is original
        if fail:
            raise Failure
    assert "log" not in vars(module) and "log_dict" not in vars(module)
    assert module.log.__func__ is original


def test_a_batch_without_samples_of_a_kind_does_not_spoil_the_mean():
    reader = LogReader()
    reader.log("acc", torch.tensor(0.5), batch_size=4)
    reader.log("acc", torch.tensor(float("nan")), batch_size=0)
    assert reader.values() == {"acc": 0.5}


def test_means_of_half_precision_values_are_not_rounded():
    reader = LogReader()
    for value in [1.0] + [0.0] * 999:
        reader.log("acc", torch.tensor(value, dtype=torch.bfloat16))
    assert reader.values()["acc"] == pytest.approx(1e-3, rel=1e-12)


def test_what_is_logged_holds_no_graph():
    reader = LogReader()
    reader.log("loss", torch.ones(1, requires_grad=True) * 2)
    assert not reader.sums["loss"].requires_grad


# ---- what a step returns


@pytest.mark.parametrize("output", [torch.tensor(2.0), torch.tensor([2.0]), {"loss": torch.tensor([[2.0]]), "extra": 1}])
def test_a_loss_is_found_as_a_scalar(output):
    assert loss_in(output).shape == () and loss_in(output) == 2


def test_the_loss_keeps_its_graph():
    assert loss_in({"loss": torch.ones(1, requires_grad=True) * 2}).requires_grad


@pytest.mark.parametrize("output", [None, {}, {"loss": None}, {"predictions": torch.ones(3)}])
def test_no_loss_leaves_the_batch_out(output):
    assert loss_in(output) is None


@pytest.mark.parametrize(("output", "said"), [(torch.ones(3), r"\(3,\)"), (1.5, "float"), ({"loss": [1.0]}, "list")])
def test_anything_else_is_refused_by_what_it_is(output, said):
    with pytest.raises(UnlearnError, match=f"not {said}; or define forget_step"):
        loss_in(output)


@pytest.mark.parametrize("batch", [torch.ones(5, 2), [torch.ones(5), torch.ones(5, 3)], {"image": torch.ones(5, 3, 2, 2)}])
def test_samples_are_counted_along_the_first_dimension(batch):
    assert batch_samples(batch) == 5

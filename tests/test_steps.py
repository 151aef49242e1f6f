"""A module's steps leave no trace, and what they log is read."""

from __future__ import annotations

import random
from collections import UserDict
from contextlib import nullcontext
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from _amounts import examples
from _processes import in_processes
from _simulated import Simulated, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples, loss_in
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.log_capture import Attempt, LogReader, read_logs
from slug_lightning.objective.module_hooks import ModuleHooks

PREDICTED, TRUE = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 0])


class Failure(Exception):
    pass


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))


def leave(module: nn.Module, body, fail: bool) -> None:
    """Run `body` inside `preserve_state`, then leave it by an exception if `fail`."""
    with pytest.raises(Failure) if fail else nullcontext(), preserve_state(module):
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
    with preserve_state(net):
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
    with preserve_state(module):
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
    assert not reader.entries[0].value.requires_grad


logs = st.lists(st.tuples(st.sampled_from("ab"), st.floats(-10, 10, width=32), st.integers(0, 3)), max_size=8)


def read(reader: LogReader, entries) -> LogReader:
    for name, value, weight in entries:
        reader.log(name, value, batch_size=weight)
    return reader


@settings(deadline=None)
@given(logs)
def test_the_values_that_count_are_kept_with_their_weights(entries):
    reader = read(LogReader(), entries)
    for name in "ab":
        counted = [(v, weight) for n, v, weight in entries if n == name and weight]
        assert reader.of(name) == ([v for v, _ in counted], [weight for _, weight in counted])


@settings(deadline=None)
@given(before=logs, undone=logs, after=logs)
def test_what_was_logged_since_is_forgotten_when_the_log_is_restored(before, undone, after):
    reader = read(LogReader(), before)
    state = reader.state()
    for _ in range(2):  # the state outlives its use
        read(reader, undone).log("object", torchmetrics.MeanMetric())
        reader.restore(state)
        assert reader.state() == read(LogReader(), before).state()
    assert read(reader, after).state() == read(LogReader(), before + after).state()


# ---- a step without consequences


class Consequent(WithMetrics):
    """A step that changes all that a step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def validation_step(self, batch, batch_idx):
        drawn = torch.rand(4, 3) + np.random.rand() + random.random()
        self.norm.train()(drawn)
        self.calls += 1
        self.accuracy.update(PREDICTED, TRUE)
        self.values.update(drawn.mean())
        self.both.update(PREDICTED, TRUE)
        self.log("drawn", drawn.mean())
        self.log("accuracy", self.accuracy)


def everything(module: Consequent, reader: LogReader):
    """All that a step can change, as plain data."""
    python, numpy, host = random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()
    metrics = [
        ({k: [t.tolist() for t in v] if isinstance(v, list) else v.tolist() for k, v in m.metric_state.items()}, m.update_count)
        for m in (module.accuracy, module.values, *module.both.values())
    ]
    buffers = {name: buffer.tolist() for name, buffer in module.named_buffers()}
    return python, numpy, host, metrics, buffers, str(reader.state())


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("only_if_it_fails", [False, True])
def test_what_is_undone_has_not_happened_and_what_only_failures_undo_has(fail, only_if_it_fails):
    module = Consequent()
    with read_logs(module) as reader:
        module.validation_step(None, 0)
        reader.log("number", 1.0)
        step = Attempt(module, lambda: module.validation_step(None, 1), reader)
        before = everything(module, reader)
        with pytest.raises(Failure) if fail else nullcontext(), step.undone(only_if_it_fails):
            step()
            reader.log("number", 5.0)
            inside = everything(module, reader)
            if fail:
                raise Failure
        after = everything(module, reader)
    assert all(one != other for one, other in zip(before, inside, strict=True))
    assert after == (inside if only_if_it_fails and not fail else before)


def test_an_undone_step_goes_the_same_way_again():
    module = Consequent()
    with read_logs(module) as reader:
        step = Attempt(module, lambda: module.validation_step(None, 0), reader)
        with step.undone():
            step()
            first, seen = everything(module, reader), step.seen()
        step()
        assert everything(module, reader) == first
        assert repr(seen) == repr(step.seen())


def test_buffers_are_undone_in_place():
    module = Consequent()
    addresses = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    step = Attempt(module, lambda: module.validation_step(None, 0))
    with read_logs(module), step.undone():
        step()
    assert {name: buffer.data_ptr() for name, buffer in module.named_buffers()} == addresses
    assert module.calls == 0


def test_a_step_has_seen_what_it_logged_and_what_its_metric_objects_hold():
    module = Consequent()
    with read_logs(module) as reader:
        step = Attempt(module, lambda: module.validation_step(None, 0), reader)
        reader.samples = 4
        step()
        seen = step.seen()
    assert any(isinstance(value, torch.Tensor) and torch.equal(value, reader.entries[0].value) for value in seen)
    seen = [value for value in seen if isinstance(value, torch.Tensor)]
    assert any(torch.equal(value, state) for value in seen for state in module.values.metric_state["value"])
    assert any(torch.equal(value, module.accuracy.metric_state["tp"]) for value in seen)


def test_undone_steps_may_be_nested():
    net, reader = nn.BatchNorm1d(1), LogReader()
    step = Attempt(net, lambda: (net.running_mean.add_(1), reader.log("a", net.running_mean)), reader)
    with step.undone():
        step()
        with step.undone():
            step()
            assert reader.values() == {"a": 1.5}
        assert reader.values() == {"a": 1.0} and net.running_mean == 1
    assert reader.values() == {} and net.running_mean == 0


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


@dataclass
class Pair:
    text: list[str]
    image: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(5, 2),
        [torch.ones(5), torch.ones(5, 3)],
        {"image": torch.ones(5, 3, 2, 2)},
        {"text": ["a"] * 5, "image": torch.ones(5, 3)},
        [["a", "b"], [["c"], torch.ones(5)], torch.ones(5, 2)],
        {"index": torch.ones(5), "image": [torch.ones(3, size) for size in range(5)]},
        [(torch.ones(8), 1)] * 5,
        [{"image": torch.ones(3, 4, 4), "label": torch.tensor(2)}] * 5,
        {"temperature": torch.tensor(0.1), "image": torch.ones(5, 3)},
        {"anchors": [[10, 13], [16, 30]], "image": torch.ones(5, 3)},
        [[torch.tensor(0.5), torch.tensor(1)]] * 5,
        Pair(["a"] * 5, torch.ones(5)),
        UserDict(input_ids=torch.ones(5, 7), names=np.array(["a"] * 5)),
    ],
)
def test_samples_are_counted_along_the_first_dimension(batch):
    assert batch_samples(batch) == 5


def test_a_scalar_is_one_sample():
    assert batch_samples({"loss": torch.tensor(3.0)}) == 1


@pytest.mark.parametrize(
    "batch",
    [
        {"boxes": torch.ones(7, 4), "image": torch.ones(5, 3)},
        {"x": torch.ones(9, 2), "edge_index": torch.ones(2, 20), "y": torch.ones(5)},
        ([torch.ones(3, 8, 8)] * 5, [{"boxes": torch.ones(count, 4)} for count in (1, 2, 4, 6, 7)]),
        torch.nn.utils.rnn.pack_sequence([torch.ones(4, 2), torch.ones(3, 2), torch.ones(3, 2)]),
        [["a", "b"], [["c"], torch.ones(5)], torch.ones(2)],
    ],
)
def test_first_dimensions_that_disagree_are_refused_unless_the_module_counts(batch):
    class Counting:
        def batch_size(self, batch):
            return 5

    class Plain:
        batch_size = 32

    with pytest.raises(UnlearnError, match=r"first dimensions .* disagree.*define a method batch_size\(batch\)"):
        ModuleHooks(Plain()).samples(batch)
    assert ModuleHooks(Counting()).samples(batch) == 5


@pytest.mark.parametrize("count", [-1, 2.5])
def test_a_module_must_count_in_whole_numbers(count):
    class Counting:
        def batch_size(self, batch):
            return count

    with pytest.raises(UnlearnError, match=r"batch_size\(batch\) must return the number of samples, got"):
        ModuleHooks(Counting()).samples(torch.ones(5))


@pytest.mark.parametrize("batch", [["a", "b"], {"text": ["a"], "length": 3}, np.ones(4), None, Pair])
def test_a_batch_without_a_tensor_is_refused_with_the_remedy(batch):
    with pytest.raises(UnlearnError, match=r"holds no tensor.*let the loader add one"):
        batch_samples(batch)


# ---- what several processes log is what one would have logged

entries = st.lists(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(-1e6, 1e6, width=32), st.integers(0, 5)), max_size=3),
    max_size=8,
)


def fill(reader, number, batch):
    reader.number = number
    for name, value, weight in batch:
        reader.log(name, torch.tensor(value), batch_size=weight)


def some_or_none(reader):
    """Values to the last bit, which tells 0 from -0, too."""
    return {name: value.hex() for name, value in reader.values().items()}, reader.logged(), reader.entries_as_told()


class Told(LogReader):
    def entries_as_told(self):
        return [(entry.number, entry.name, float(entry.value), entry.weight) for entry in self.entries]


@examples(60)
@given(batches=entries, shares=st.integers(1, 4), every=st.integers(1, 9))
def test_shared_logs_are_those_of_one_process_to_the_last_bit(batches, shares, every):
    """However often they are shared on the way, and with stand-ins for those who have nothing left."""
    alone = Told()
    for number, batch in enumerate(batches):
        fill(alone, number, batch)

    def run(processes):
        reader = Told(processes=processes)
        told = []
        for place, first in enumerate(range(0, len(batches), shares)):
            number = first + processes.data_rank
            if number < len(batches):
                fill(reader, number, batches[number])
            if place % every == 0:
                reader.share()
                so_far = Told()
                for known, batch in enumerate(batches[: first + shares]):
                    fill(so_far, known, batch)
                told.append(some_or_none(reader) == some_or_none(so_far))
        reader.share()
        return told, some_or_none(reader)

    for told, found in simulate(shares, run):
        assert all(told)
        assert found == some_or_none(alone)


def test_what_is_shared_once_is_not_sent_again():
    sent = []

    class Watching(Simulated):
        def all_gather_object(self, what, item, each_data_rank=False):
            sent.append(len(item[0]))
            return super().all_gather_object(what, item, each_data_rank)

    def run(processes):
        processes.__class__ = Watching
        sent.clear()
        reader = LogReader(processes=processes)
        for number in range(3):
            fill(reader, 2 * number + processes.data_rank, [("a", 1.0, 1)])
            reader.share()
        return len(reader.entries)

    assert simulate(2, run) == [6, 6]
    assert sent == [1, 1, 1]


class ListMetric(torchmetrics.Metric):
    """A median, which no mean over processes could give."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx="cat")

    def update(self, values):
        self.seen.append(values)

    def compute(self):
        return torchmetrics.utilities.dim_zero_cat(self.seen).median()


class Nested(torchmetrics.Metric):
    """A metric that holds others, as wrappers and compositions do."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = ListMetric()
        self.mean = torchmetrics.MeanMetric()

    def update(self, values):
        self.inner.update(values)
        self.mean.update(values)

    def compute(self):
        return self.inner.compute() + self.mean.compute()


class ManyMetrics(nn.Module):
    def __init__(self, names=("mean", "maximum", "total", "median", "cat", "accuracy", "f1", "nested")) -> None:
        super().__init__()
        every = {
            "mean": torchmetrics.MeanMetric(),
            "maximum": torchmetrics.MaxMetric(),
            "total": torchmetrics.SumMetric(),
            "median": ListMetric(),
            "cat": torchmetrics.CatMetric(),
            "accuracy": MulticlassAccuracy(3, average="macro"),
            "f1": MulticlassF1Score(3),
            "nested": Nested(),
        }
        self.metrics = nn.ModuleDict({name: every[name] for name in names})

    def step(self, reader, values, classes):
        for name, metric in self.metrics.items():
            metric.update(*((classes, classes.flip(0)) if name in ("accuracy", "f1") else (values,)))
            if name != "cat":  # many values
                reader.log(name, metric)


def batches_of(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    return [(torch.randn(n, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


@examples(12)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), shares=st.integers(2, 4))
def test_metric_objects_give_what_one_process_gives_that_saw_everything(sizes, shares):
    """Also where a process has not updated them at all."""

    def run(processes, names):
        module = ManyMetrics(names)
        with read_logs(module, processes) as reader:
            for number, batch in enumerate(batches_of(sizes)):
                if number % processes.data_world_size == processes.data_rank:
                    module.step(reader, *batch)
            reader.share()
            return reader.values(), reader.logged()

    names = ("mean", "maximum", "total", "median", "accuracy", "f1", "nested")
    expected, logged = run(Processes(), names)
    assert sorted(expected) == sorted(names)
    found = simulate(shares, lambda processes: run(processes, names))
    for result in found:
        if isinstance(result, Exception):
            raise result
        # abs: in fp32, sums of several numbers near 1 that nearly cancel
        assert result[0] == pytest.approx(expected, rel=1e-6, abs=1e-6) and sorted(result[1]) == sorted(logged)
    assert all(result == found[0] for result in found)


def two_steps_of_metrics():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    module = ManyMetrics(("mean", "median", "accuracy"))
    before = [(metric.dist_sync_fn, metric.distributed_available_fn) for metric in module.metrics.values()]
    found = []
    with read_logs(module, Processes(rank, 3)) as reader:
        for number, batch in enumerate(batches_of([3, 2, 4, 1])):
            if number % 3 == rank and rank < 2:
                module.step(reader, *batch)
            if number == 2:
                reader.share()
                found.append(reader.values())
        reader.share()
        found.append(reader.values())
        held = float(module.metrics["mean"].weight)
    after = [(metric.dist_sync_fn, metric.distributed_available_fn) for metric in module.metrics.values()]
    return found, held, before == after


def test_metric_objects_of_real_processes_are_shared_and_go_on_with_their_own():
    module = ManyMetrics(("mean", "median", "accuracy"))
    expected = []
    with read_logs(module) as reader:
        for number, batch in enumerate(batches_of([3, 2, 4, 1])):
            if number % 3 < 2:
                module.step(reader, *batch)
            if number >= 2:
                for metric in module.metrics.values():
                    metric._computed = None
                expected.append(reader.values())
    found = in_processes(3, two_steps_of_metrics)
    for place, (values, held, restored) in enumerate(found):
        assert values == [pytest.approx(wanted, rel=1e-6) for wanted in expected]
        assert held == [4, 2, 0][place], "its own samples, not those of all"
        assert restored


class Unusual(nn.Module):
    """Objects that share their states, that others are made of, or that would not be shared by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torchmetrics.MetricCollection({"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})
        self.accuracy = MulticlassAccuracy(3)
        self.error = 1 - self.accuracy
        self.own = torchmetrics.MeanMetric(sync_on_compute=False)

    def step(self, reader, values, classes):
        self.both.update(classes, classes.flip(0))
        self.accuracy.update(classes, classes.flip(0))
        self.own.update(values)
        reader.log_dict(self.both)
        reader.log("error", self.error)
        reader.log("own", self.own)


def test_unusual_metric_objects_are_shared_too():
    def run(processes):
        module = Unusual()
        with read_logs(module, processes) as reader:
            for number, batch in enumerate(batches_of([5, 4, 6, 2])):
                if number % processes.data_world_size == processes.data_rank:
                    module.step(reader, *batch)
            reader.share()
            return reader.values()

    expected = run(Processes())
    assert sorted(expected) == ["accuracy", "error", "f1", "own"]
    for found in simulate(2, run):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_metric_object_that_is_no_attribute_is_refused_by_its_name():
    def run(processes):
        module = ManyMetrics(("mean",))
        with read_logs(module, processes) as reader:
            reader.log("hidden", torchmetrics.MeanMetric())
            reader.share()

    for error in simulate(2, run):
        assert isinstance(error, UnlearnError)
        assert "'hidden'" in str(error) and "must be an attribute of the module" in str(error)
    reader = LogReader()
    reader.log("hidden", metric := torchmetrics.MeanMetric())
    metric.update(3.0)
    reader.share()
    assert reader.values() == {"hidden": 3.0}  # alone, there is nothing to share

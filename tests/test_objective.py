"""What a module's own steps say of forgetting and keeping: measured to the end, or only as far as it matters."""

from __future__ import annotations

import copy
import math
import random
from collections import UserDict
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from _amounts import examples
from _simulated import simulate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from _tiny import FORGET, PlainRunner, blobs, loader, outside, trained
from slug_lightning.distributed.batch_sharding import shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.distributed.strategy import only_differentiating
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.data_checks import digest_of_data, fingerprint, rehearse
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.log_capture import LogReader
from slug_lightning.objective.objective import Objective


class Failure(Exception):
    pass


class Scripted(pl.LightningModule):
    """Logs in each pass what it is told to; batch i of a pass logs `passes[pass][i]`."""

    def __init__(self, *passes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = outside(passes=list(passes), steps=0)

    def now(self, batch_idx):
        if batch_idx == 0 and self.seen().steps:
            self.seen().passes.pop(0)
        self.seen().steps += 1
        return self.seen().passes[0][batch_idx]

    def validation_step(self, batch, batch_idx):
        self.log_dict(self.now(batch_idx))

    def training_step(self, batch, batch_idx):
        loss = self.now(batch_idx)
        return None if loss is None else loss * self.weight


def batches_of(*counts):
    return [torch.zeros(count) for count in counts]


def objective(module, retain_metric=None, batches=None, **options) -> Objective:
    loaders = {kind: dict.fromkeys(("train", "val", "test"), batches) for kind in ("forget", "retain")}
    return Objective(module, loaders, PlainRunner(), None, retain_metric, **options)


# ---- what a pass can still become


def bounds_after_each_batch(before, after, counts, names):
    """Measure twice; gives the bounds after each batch of the second pass, and how it ended."""
    measuring = objective(Scripted(before, after, after), names, batches_of(*counts))
    measuring.measured("retain", "val")
    bounds = []

    def look(reader: LogReader) -> bool:
        bounds.append(measuring.at_best("retain", "val", reader))
        return False

    return bounds, measuring.measure("retain", "val", stop=look)


shares = st.floats(0, 1)
amounts = st.floats(0, 1e6)
passes = st.lists(st.tuples(st.integers(1, 9), shares, shares, amounts, amounts), min_size=1, max_size=6)


@examples(60)
@given(passes)
def test_a_pass_never_ends_better_than_it_could_after_any_of_its_batches(rows):
    counts = [row[0] for row in rows]
    before = [{"acc": row[1], "loss": row[3]} for row in rows]
    after = [{"acc": row[2], "loss": row[4]} for row in rows]
    bounds, end = bounds_after_each_batch(before, after, counts, ["acc", "loss"])
    assert len(bounds) == len(rows)
    accuracies, losses = [b["acc"] for b in bounds], [b["loss"] for b in bounds]
    assert all(end["acc"] <= bound + 1e-12 for bound in accuracies)
    assert all(end["loss"] >= bound * (1 - 1e-12) for bound in losses)
    # The more is known, the nearer the bound is to the end, where it is the value itself.
    assert accuracies == pytest.approx(sorted(accuracies, reverse=True)) and losses == pytest.approx(sorted(losses))
    assert (accuracies[-1], losses[-1]) == (end["acc"], end["loss"])


def test_at_best_all_that_is_left_is_right_and_costs_nothing():
    rows = [{"acc": 0.9, "loss": 1.0}] * 3
    after = [{"acc": 0.5, "loss": 4.0}, {"acc": 0.25, "loss": 1.0}, {"acc": 0.0, "loss": 9.0}]
    bounds, end = bounds_after_each_batch(rows, after, [2, 4, 4], ["acc", "loss"])
    assert bounds[0] == {"acc": pytest.approx((1 + 8) / 10), "loss": pytest.approx(8 / 10)}
    assert bounds[1] == {"acc": pytest.approx((1 + 1 + 4) / 10), "loss": pytest.approx(12 / 10)}
    assert bounds[2] == end == {"acc": pytest.approx(0.2), "loss": pytest.approx(4.8)}


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["acc", "loss"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_metric_that_was_below_zero_or_not_finite_has_no_bound(name, bad, where):
    rows = {"before": [{"acc": 0.5, "loss": 0.5} for _ in range(3)], "after": [{"acc": 0.5, "loss": 0.5} for _ in range(3)]}
    rows[where][1][name] = bad
    bounds, _ = bounds_after_each_batch(rows["before"], rows["after"], [1, 1, 1], ["acc", "loss"])
    other = "loss" if name == "acc" else "acc"
    assert [math.isfinite(found.get(name, math.nan)) for found in bounds] == [where == "after", False, False]
    assert all(other in found for found in bounds)


def test_a_score_beyond_one_has_no_bound_and_a_loss_may_be_of_any_size():
    rows = [{"acc": 1.01, "loss": 500.0}, {"acc": 0.5, "loss": 0.0}]
    bounds, _ = bounds_after_each_batch(rows, rows, [1, 1], ["acc", "loss"])
    assert [sorted(found) for found in bounds] == [["loss"], ["loss"]]
    percent = [{"acc": 97.0}, {"acc": 88.0}]
    assert bounds_after_each_batch(percent, percent, [1, 1], "acc")[0] == [{}, {}]


def test_a_score_of_exactly_zero_or_one_has_a_bound():
    rows = [{"acc": 0.0}, {"acc": 1.0}]
    assert bounds_after_each_batch(rows, rows, [1, 1], "acc")[0] == [{"acc": 0.5}, {"acc": 0.5}]


def test_a_pass_over_more_samples_than_the_last_has_no_bound():
    measuring = objective(Scripted([{"acc": 1.0}] * 2), "acc", batches_of(2, 2))
    measuring.measured("retain", "val")
    reader = LogReader()
    reader.log("acc", 1.0, batch_size=4)
    assert measuring.at_best("retain", "val", reader) == {"acc": 1.0}
    reader.log("acc", 1.0, batch_size=1)
    assert measuring.at_best("retain", "val", reader) == {}


def test_before_anything_is_logged_nothing_is_known():
    measuring = objective(Scripted([{"acc": 1.0}]), "acc", batches_of(2))
    measuring.measured("retain", "val")
    assert measuring.at_best("retain", "val", LogReader()) == {}


class WithObject(pl.LightningModule):
    """Logs a torchmetrics object, in the second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.accuracy = BinaryAccuracy()
        self.seen = outside(steps=0)

    def validation_step(self, batch, batch_idx):
        self.seen().steps += 1
        self.accuracy.update(torch.ones(4), torch.tensor([1, 1, 1, 0]))
        if batch_idx == 1:
            self.log("accuracy", self.accuracy)


def test_a_metric_object_has_no_bound():
    measuring = objective(WithObject(), "accuracy", batches_of(4, 4))
    assert measuring.measured("retain", "val") == {"accuracy": 0.75}
    bounds = []
    measuring.measure("retain", "val", stop=lambda reader: bounds.append(measuring.at_best("retain", "val", reader)))
    assert bounds == [{}, {}]


# ---- what tells data apart


class Drawing(TensorDataset):
    """Augmented by every source of random numbers that there is."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] + torch.rand(1) + np.random.rand() + random.random()


def digest_of(batches, processes=None):
    with preserve_state(nn.Identity()):
        return digest_of_data(Objective(Scripted(), {"retain": {"train": batches}}, PlainRunner(processes)), "retain", "train")


@examples(25)
@given(
    count=st.integers(1, 9), size=st.integers(1, 4), processes=st.integers(2, 3), shuffle=st.booleans(), seed=st.integers(0, 99)
)
def test_a_digest_is_that_of_one_process_and_comes_again_by_the_same_seeds(count, size, processes, shuffle, seed):
    def data(**how):
        return DataLoader(Drawing(torch.arange(float(count))[:, None]), batch_size=size, shuffle=shuffle, **how)

    torch.manual_seed(seed)
    alone = digest_of(data())
    assert simulate(processes, lambda each: digest_of(data(), each)) == [alone] * processes
    assert alone == digest_of(list(take_turns_of(data())))


def take_turns_of(data):
    with preserve_state(nn.Identity()):
        return [turn.batch for turn in shard_batches(data, Processes())]


X = torch.arange(6.0)
DIFFERENT = [
    [X], [X.flip(0)], [X.double()], [X.view(2, 3)], [X[:3], X[3:]], [X[:2], X[2:]], [torch.cat([-X[:1], X[1:]])], [[X]], [(X,)],
    [{"x": X}], [{"y": X}], [{"x": X, "n": 1}], [{"x": X, "n": 1.0}], [{"x": X, "n": True}], [{"x": X, "n": "1"}], [[X, X]],
    [UserDict(x=X)], [UserDict(x=[X])], [UserDict(y=X)], [X.numpy()[:3]], [{"x": X, "n": np.int64(1)}], [{"x": X, "n": None}], [],
]  # fmt: skip


def test_a_digest_sees_content_names_kinds_order_and_how_things_are_put_together():
    digests = [digest_of(batches) for batches in DIFFERENT]
    assert None not in digests and len(set(digests)) == len(DIFFERENT)
    assert digests == [digest_of(copy.deepcopy(batches)) for batches in DIFFERENT]


@pytest.mark.parametrize("strange", [object(), torch.eye(2).to_sparse(), np.array([{}])])
def test_of_what_nobody_can_look_into_there_is_no_digest_and_a_fingerprint_all_the_same(strange):
    assert digest_of([X, [X, strange]]) is None
    reads = [{"forget": {"val": [[x, object()]]}} for x in (X, X, X + 1)]
    told = [fingerprint(Objective(Scripted(), loaders, PlainRunner()), "forget", "val") for loaders in reads]
    assert told[0] == told[1] != told[2]


def test_a_fingerprint_is_of_the_first_batch_in_whatever_container():
    def told(*batches):
        return fingerprint(Objective(Scripted(), {"forget": {"val": list(batches)}}, PlainRunner()), "forget", "val")

    assert told(UserDict(x=X), X) == told(UserDict(x=X.clone()), X + 1) != told(UserDict(x=X + 1), X)
    assert told() == told() != told(X)


def test_data_are_read_as_they_are_measured():
    stages = []

    class Runner(PlainRunner):
        @contextmanager
        def validating(self):
            stages.append("in")
            yield
            stages.append("out")

    measuring = Objective(Scripted(), {"retain": {split: [X] for split in ("train", "val", "test")}}, Runner())
    assert len({digest_of_data(measuring, "retain", split) for split in ("train", "val", "test")}) == 1
    assert stages == ["in", "out"] * 2


# ---- the first loss


# ---- to the end or not


def test_a_measurement_is_the_mean_over_samples_and_counts_them():
    measuring = objective(Scripted([{"acc": 1.0, "other": 9.0}, {"acc": 0.5}]), "acc", batches_of(3, 1))
    assert measuring.measured("retain", "val") == {"acc": 0.875}
    assert (measuring.forward_samples, measuring.backward_samples) == (4, 0)


def test_a_measurement_that_is_given_up_has_no_result_and_leaves_nothing_behind():
    module = Scripted([{"acc": 1.0}] * 3, [{"acc": 0.0}] * 3)
    measuring = objective(module, "acc", batches_of(5, 6, 7))
    measuring.measured("retain", "val")
    whole, asked = measuring.complete["retain", "val"], []

    def stop(reader: LogReader) -> bool:
        asked.append(reader.values())
        return len(asked) == 2

    assert measuring.measure("retain", "val", stop=stop) is None
    assert asked == [{"acc": 0.0}, {"acc": 0.0}] and module.seen().steps == 3 + 2
    assert measuring.forward_samples == 18 + 11
    assert measuring.complete["retain", "val"] is whole
    assert "log" not in vars(module)


def test_giving_up_after_the_last_batch_is_giving_up_all_the_same():
    measuring = objective(Scripted([{"acc": 1.0}]), "acc", batches_of(2))
    assert measuring.measure("retain", "val", stop=lambda _: True) is None


def test_what_was_not_logged_by_then_is_no_mistake_of_a_measurement_that_is_given_up():
    measuring = objective(Scripted([{}, {"acc": 1.0}]), "acc", batches_of(2, 2))
    assert measuring.measure("retain", "val", stop=lambda _: True) is None


@pytest.mark.parametrize(("record", "edited"), [(["a", "b"], None), ([], "a"), ([], None)])
def test_an_evaluator_runs_every_batch_of_its_pass(record, edited):
    seen = []

    class Spy:
        def run(self, where, number, batch, step, to_record=(), layer=None):
            assert where == ("validation_step", "retain", "val") and to_record == record and layer == edited
            seen.append(number)
            step()

    measuring = objective(Scripted([{"acc": 1.0}, {"acc": 0.0}]), "acc", batches_of(2, 2))
    measuring.evaluator = Spy()
    assert measuring.measured("retain", "val", record=record, edited=edited) == {"acc": 0.5}
    assert seen == [0, 1]


def test_every_pass_draws_the_same_random_numbers():
    class Drawing(Scripted):
        def validation_step(self, batch, batch_idx):
            self.log("acc", (torch.rand(()).item() + np.random.rand() + random.random()) / 3)

    measuring = objective(Drawing(), "acc", batches_of(1, 1))
    first = measuring.measured("retain", "val")
    torch.rand(7), np.random.rand(7), random.random()
    assert measuring.measured("retain", "val") == first


# ---- rehearsals


def rehearsing(module, metric, batches):
    measuring = objective(module, metric, batches)
    measuring.loaders = {kind: dict.fromkeys(("val", "test"), batches) for kind in ("forget", "retain")}
    return measuring


@pytest.mark.parametrize(("rows", "steps"), [
    ([{"acc": 1.0, "loss": 0.0}, {}, {}], 1),
    ([{}, {"acc": 1.0, "loss": 0.0}, {}], 2),
    ([{"acc": 1.0}, {"acc": 1.0}, {"loss": 1.0}, {}], 3),
    ([{"loss": 1.0}, {"other": 1.0}, {}, {"acc": 1.0}], 4),
])  # fmt: skip
def test_a_rehearsal_ends_with_the_batch_that_has_logged_the_last_name(rows, steps):
    module = Scripted(rows)
    measuring = rehearsing(module, ["acc", "loss"], batches_of(*[2] * len(rows)))
    assert rehearse(measuring, "retain") is None
    assert module.seen().steps == steps
    assert {"acc", "loss"} <= set(measuring.metrics)
    assert not measuring.complete
    rehearse(measuring, "retain")
    assert module.seen().steps == steps  # nothing is in doubt any more


def test_a_rehearsal_ends_with_the_batch_that_logs_a_metric_object():
    module = WithObject()
    rehearse(rehearsing(module, "accuracy", batches_of(4, 4, 4)), "retain")
    assert module.seen().steps == 2


@pytest.mark.parametrize(("module", "metric", "batches", "message"), [
    (lambda: Scripted([{"acc": 1.0}, {"loss": 1.0}]), "f1", batches_of(1, 1), r"logs no \['f1'\], only \['acc', 'loss'\]"),
    (lambda: Scripted([{"acc": 1.0}, {}]), ["acc", "f1"], batches_of(1, 1), r"logs no \['f1'\], only \['acc'\]"),
    (lambda: Scripted([None, None]), None, batches_of(1, 1), "retain_metric: the step returns no loss"),
    (lambda: pl.LightningModule(), "acc", batches_of(1), "LightningModule has no validation_step"),
    (lambda: Scripted([{"guess": 1.0}]), "guess", batches_of(1), "guess: unknown whether higher is better"),
])  # fmt: skip
def test_a_rehearsal_stumbles_over_the_same_things_as_a_measurement(module, metric, batches, message):
    with pytest.raises(UnlearnError, match=message):
        rehearsing(module(), metric, batches).measure("retain", "test")
    with pytest.raises(UnlearnError, match=message):
        rehearse(rehearsing(module(), metric, batches), "retain")


@pytest.mark.parametrize("kind", ["forget", "retain"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_set_is_found_before_anything_is_computed(kind, split):
    module = Scripted([{"acc": 1.0}])
    measuring = rehearsing(module, "acc", batches_of(1))
    measuring.loaders[kind][split] = []
    with pytest.raises(UnlearnError, match=f"{kind}: the {split} set is empty"):
        rehearse(measuring, kind)
    assert module.seen().steps == 0


# ---- gradients


def test_the_gradient_is_that_of_the_modules_own_loss_over_the_training_split():
    module = trained().eval()
    module.requires_grad_(True)
    parameters = {name: p for name, p in module.named_parameters() if name.endswith("weight") and p.ndim == 2}
    measuring = Objective(module, {"forget": {"train": loader(True), "val": None}, "retain": {}}, PlainRunner())
    found = measuring.gradient("forget", parameters)
    x, y = blobs().tensors
    chosen = y == FORGET
    expected = torch.autograd.grad(cross_entropy(module.net(x[chosen]), y[chosen]), list(parameters.values()))
    for ours, theirs in zip(found.tensors.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert measuring.forward_samples == measuring.backward_samples == found.samples == int(chosen.sum())


def test_of_the_layers_in_front_of_the_first_that_is_differentiated_no_graph_is_kept():
    seen = {}

    class Watching(Scripted):
        def __init__(self):
            super().__init__()
            self.front, self.last = nn.Linear(2, 2), nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            hidden = self.front(batch)
            seen.update(hidden=hidden.requires_grad, front=self.front.weight.requires_grad)
            return self.last(hidden).mean()

    module = Watching()
    loaders = {"retain": {"train": [torch.ones(3, 2)]}}
    Objective(module, loaders, PlainRunner()).gradient("retain", {"last.weight": module.last.weight})
    assert seen == {"hidden": False, "front": False}
    Objective(module, loaders, PlainRunner()).gradient("retain", {"front.weight": module.front.weight})
    assert seen == {"hidden": True, "front": True}
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_a_loss_without_a_graph_is_refused():
    module = Scripted([1.0])
    module.training_step = lambda batch, batch_idx: torch.tensor(1.0)
    with pytest.raises(UnlearnError, match="forget: the loss of the step has no graph"):
        objective(module, batches=batches_of(1)).gradient("forget", {"weight": module.weight})


@pytest.mark.parametrize("fail", [False, True])
def test_only_what_is_differentiated_requires_it_and_what_was_frozen_stays_so(fail):
    module = pl.LightningModule()
    module.a, module.b, module.c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    module.tied = module.b
    module.c.requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    with pytest.raises(Failure) if fail else nullcontext(), only_differentiating(module, {"tied.weight": module.tied.weight}):
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["b.weight"]
        if fail:
            raise Failure
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert list(before.values()).count(False) == 2


def test_a_gradient_that_fails_leaves_the_flags_and_the_log_as_they_were():
    module = trained()
    module.net[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    bad = [(torch.full((2, 8), math.nan), torch.zeros(2, dtype=torch.long))]
    measuring = Objective(module, {"forget": {"train": bad}, "retain": {}}, PlainRunner())
    with pytest.raises(UnlearnError, match="forget, batch 0: the loss is nan"):
        measuring.gradient("forget", {"net.6.weight": module.net[6].weight})
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert "log" not in vars(module) and module.net[6].weight.grad is None


def test_a_reentrant_checkpoint_that_hides_its_layers_is_refused():
    class Hiding(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.words, self.block = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4)

        def training_step(self, batch, batch_idx):
            hidden = checkpoint(self.block, self.words(batch), use_reentrant=True)
            return cross_entropy(hidden + self.block.bias, batch)

    module = Hiding()
    measuring = Objective(module, {"forget": {"train": [torch.arange(4)]}, "retain": {}}, PlainRunner())
    with pytest.raises(UnlearnError, match="use_reentrant=False"):
        measuring.gradient("forget", {"block.weight": module.block.weight, "block.bias": module.block.bias})

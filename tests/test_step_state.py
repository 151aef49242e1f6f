"""What a module's steps write is as before after every pass, and what they tell reaches nobody."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from _amounts import examples
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from _tiny import Classifier, changed, fit, loader, outside, snapshot, trained
from slug_lightning import UnlearnError
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.objective.stand_ins import Silent
from slug_lightning.objective.step_state import StepState

INFEASIBLE = {"forget_target": 1e9, "retain_tolerance": 0.0}


def callback(**options: Any) -> UnlearnCallback:
    data = {"forget": loader(True), "retain": loader(False)}
    return unlearn_callback(**{**data, "retain_tolerance": 20.0, "max_evaluations": 5, **options})


# ---- one block


@dataclasses.dataclass(eq=False)
class Statistics:
    mean: torch.Tensor
    count: int = 0
    seen: list = dataclasses.field(default_factory=list)


class Slotted:
    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0


class Everything(nn.Module):
    """Holds state of every kind that steps write to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("queue", torch.zeros(8, 3))
        self.center = torch.zeros(3)
        self.statistics = Statistics(torch.zeros(3))
        self.slotted = Slotted()
        self.outputs: list = []
        self.nested = {"shadow": OrderedDict(a=torch.ones(2), b=[torch.zeros(1)]), "names": {"first"}}
        self.counts: Any = Counter(x=1)
        self.grouped: Any = defaultdict(list, a=[1])
        self.recent: deque = deque([1, 2, 3], maxlen=3)
        self.table = np.zeros((4, 2))
        self.raw = bytearray(b"abc")
        self.generators = [torch.Generator().manual_seed(3), random.Random(3), np.random.default_rng(3)]
        self.accuracy = torchmetrics.MeanMetric()
        self.values = torchmetrics.CatMetric()
        self.number, self.nothing = 0.5, None


def _data_assigned(m: Everything) -> None:
    m.teacher.weight.data = m.teacher.weight.data * 0.9 + m.net.weight.data * 0.1


def _replaced(m: Everything) -> None:
    m.teacher = copy.deepcopy(m.net)
    m.queue = torch.ones(8, 3)


def _switched(m: Everything) -> None:
    m.norm.train()
    m.norm(torch.randn(5, 3))


@torch.no_grad()
def _lerped(m: Everything) -> None:
    for own, other in zip(m.teacher.parameters(), m.net.parameters(), strict=True):
        own.lerp_(other + 1, 0.1)


@torch.no_grad()
def _at_once(m: Everything) -> None:
    torch._foreach_mul_(list(m.net.parameters()), 0.5)


def _slots(m: Everything) -> None:
    m.slotted.count += 1
    m.slotted.last = 3


def _attributes(m: Everything) -> None:
    m.number, m.fresh = 1.5, "added"
    vars(m).pop("nothing", None)


def _statistics(m: Everything) -> None:
    m.statistics.mean.add_(1)
    m.statistics.count += 1
    m.statistics.seen.append(torch.ones(1))


def _nested(m: Everything) -> None:
    m.nested["shadow"]["a"].mul_(3)
    m.nested["shadow"]["b"][0].add_(1)
    m.nested["shadow"]["b"].append(torch.ones(1))
    m.nested["shadow"].move_to_end("a")
    m.nested["names"].add("second")


def _containers(m: Everything) -> None:
    m.counts["x"] += 1
    m.grouped["b"].append(2)
    m.recent.append(4)
    m.outputs.append(torch.ones(2))


def _numbers(m: Everything) -> None:
    m.table[1] += 1
    m.raw[0] = 0


def _drawn(m: Everything) -> None:
    torch.rand(3, generator=m.generators[0]), m.generators[1].random(), m.generators[2].random()


def _metrics(m: Everything) -> None:
    m.accuracy.update(torch.ones(3))
    m.values.update(torch.ones(3))
    m.accuracy.compute()


def _inside(m: Everything) -> None:
    m.queue[2:4] = 1
    m.center.mul_(0.9).add_(1)
    m.net.weight.data.add_(1)


def _frozen(m: Everything) -> None:
    m.net.requires_grad_(False)


WRITES = [
    _lerped,
    _data_assigned,
    _replaced,
    _switched,
    _at_once,
    _slots,
    _attributes,
    _statistics,
    _nested,
    _containers,
    _numbers,
    _drawn,
    _metrics,
    _inside,
    _frozen,
]


def described(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """All that an object holds, by value, so that two descriptions can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad, value.detach().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if id(value) in inside:
        return "…"
    inside = (*inside, id(value))
    if isinstance(value, dict):
        return type(value).__name__, [(key, described(item, inside)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [described(item, inside) for item in value]
    if isinstance(value, (set, bytearray)) or not (hasattr(value, "__dict__") or isinstance(value, Slotted)):
        return repr(value)
    if isinstance(value, Slotted):
        return [getattr(value, name, None) for name in value.__slots__]
    if callable(value) and not isinstance(value, nn.Module):
        return "a function"
    return type(value).__name__, described(vars(value), inside)


blocks = st.recursive(
    st.sampled_from(WRITES).map(lambda write: ("write", write)),
    lambda inner: st.tuples(st.sampled_from(["undone", "kept", "failed"]), st.lists(inner, max_size=4)),
    max_leaves=10,
)


class Failure(Exception):
    pass


def run(module: Everything, state: StepState, block: Any) -> None:
    """Run blocks in blocks; of one that is undone nothing must be left when it ends."""
    how, content = block
    if how == "write":
        content(module)
        return
    before = described(module)
    with pytest.raises(Failure) if how == "failed" else nullcontext(), state.undone(only_if_it_fails=how != "undone"):
        for inner in content:
            run(module, state, inner)
        if how == "failed":
            raise Failure
    if how != "kept":
        assert described(module) == before


@examples(150)
@given(st.lists(blocks, min_size=1, max_size=4))
def test_of_an_undone_block_nothing_is_left_whatever_was_undone_or_kept_inside(content):
    module = Everything()
    state = StepState(module)
    for name in ("first", None, "first"):
        before, objects = described(module), {name: id(p) for name, p in module.named_parameters()}
        with state.undone(where=name):
            for block in content:
                run(module, state, block)
        assert described(module) == before and objects == {name: id(p) for name, p in module.named_parameters()}


@pytest.mark.parametrize("write", WRITES)
def test_every_kind_of_state_is_written_to_and_put_back(write):
    module = Everything()
    before = described(module)
    with StepState(module).undone():
        write(module)
        assert described(module) != before, "the test writes nothing"
    assert described(module) == before


def test_only_what_is_written_to_is_copied():
    module = Everything()
    with StepState(module).undone() as scope:
        module.net(torch.ones(1, 3)).sum().backward()
        assert not scope.copies
        module.center.add_(1)
        assert [copied.nbytes() for _, copied in scope.copies.values()] == [3 * 4]


def test_after_a_pass_that_wrote_nothing_the_same_pass_is_not_watched_until_something_is_written():
    module = Everything()
    state = StepState(module)
    for watches in (True, False):
        with state.undone(where="a") as scope:
            assert scope.watches == watches
    with state.undone(where="b") as scope:
        scope.is_whole = False  # given up: its other batches were not seen
    with state.undone(where="b") as scope:
        assert scope.watches
        module.center.add_(1)
    with state.undone(where="a") as scope:
        assert scope.watches


def test_a_write_that_nobody_could_foresee_is_an_error_and_no_silent_change():
    module = Everything()
    state = StepState(module)
    with state.undone(where="a"):
        pass
    with (
        pytest.raises(UnlearnError, match=r"has written to net.weight, net.bias, which .* load them again"),
        state.undone(where="a"),
    ):
        _at_once(module)


def test_what_others_change_between_two_passes_stays():
    module = Everything()
    state = StepState(module)
    for round in range(3):
        with state.undone(where="a"):
            module.outputs.append(1)
        with torch.no_grad():
            module.net.weight.add_(1)
        module.number, module.outputs = round, [round]
        before = described(module)
        with state.undone(where="a"):
            module.outputs.append(1)
            module.number = -1
        assert described(module) == before


# ---- whole runs


class MeanTeacher(Classifier):
    """Moves a teacher and what else such modules have, in training_step."""

    def __init__(self, assigns: bool = False) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.assigns = assigns
        self.losses: list = []
        self.steps, self.center, self.cache = 0, torch.zeros(4), {"last": torch.zeros(4)}
        self.count = torchmetrics.SumMetric()
        self.states = outside(found=[])

    def training_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.training:
            tensors = [*self.teacher.parameters(), self.center, self.cache["last"]]
            self.states().found.append((self.steps, len(self.losses), [float(t.sum()) for t in tensors]))
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                if self.assigns:
                    own.data = own.data * 0.9 + other.data * 0.1
                else:
                    own.lerp_(other, 0.1)
        logits, aim = self.net(batch[0]), self.teacher(batch[0])
        self.center.lerp_(aim.mean(0).detach(), 0.1)
        self.cache["last"] = aim.mean(0).detach()
        loss = cross_entropy(logits, batch[1]) + 0.1 * mse_loss(logits, aim - self.center)
        self.losses.append(loss.detach())
        self.steps += 1
        self.count.update(1.0)
        return loss


def held(module: MeanTeacher) -> Any:
    return [described(one) for one in (module.losses, module.steps, module.center, module.cache, module.count.sum_value)]


def taught(assigns: bool = False) -> MeanTeacher:
    model = MeanTeacher(assigns)
    model.net.load_state_dict(trained().net.state_dict())
    model.teacher.load_state_dict(trained().net.state_dict())
    return model


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("asked", [INFEASIBLE, {}])
def test_a_teacher_that_training_step_moves_is_as_before_and_every_evaluation_finds_it_so(asked, assigns, replay):
    model = taught(assigns)
    before, own = snapshot(model), held(model)
    made = callback(**asked, replay=replay)
    fit(made, model)
    assert made.report.status == ("infeasible" if asked else "unlearned")
    assert changed(model, before) == set(made.report.tensors) and held(model) == own
    found = model.states().found
    assert len(found) > 5 and all(state == found[0] for state in found)
    if not asked:
        made.report.patch.revert(model)
        assert not changed(model, before)
        made.report.patch.apply(model)
        assert changed(model, before) == set(made.report.tensors)


def test_a_run_of_a_module_that_writes_is_the_same_with_and_without_replay():
    found = []
    for replay in (False, True):
        made = callback(replay=replay)
        fit(made, taught())
        report = made.report
        found.append((report.layer, report.step_size, report.trace, report.before, report.after))
    assert found[0] == found[1]


class Keeping(Classifier):
    """Keeps what its epoch's end shall see, as Lightning's own guide tells."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list = []
        self.lengths = outside(found=[])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.lengths().found.append(len(self.outputs))
        self.outputs.append(self.net(batch[0]).argmax(1) == batch[1])
        self.log("val_acc", self.outputs[-1].float().mean())


def test_outputs_that_validation_step_keeps_are_gone_after_each_pass():
    model = trained(Keeping)
    fit(callback(forget_metric="val_acc", retain_metric="val_acc", forget_target=-1.0), model)
    assert model.outputs == [] and len(model.lengths().found) > 5 and set(model.lengths().found) == {0}


# ---- what cannot be copied


class Reading(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.stream = itertools.count()

    def training_step(self, batch, batch_idx):
        next(self.stream)
        return super().training_step(batch, batch_idx)


def test_an_iterator_that_a_step_reads_is_refused_by_its_name_before_it_is_read():
    model = trained(Reading)
    before = snapshot(model)
    with pytest.raises(UnlearnError, match=r"stream: a step takes the next item of this count, which cannot be set back"):
        fit(callback(), model)
    assert next(model.stream) == 0 and not changed(model, before)


def test_the_step_of_the_gradient_is_tried_before_anything_is_searched():
    class Measured(Reading):
        evaluated = outside(batches=0)

        def validation_step(self, batch, batch_idx):
            Measured.evaluated().batches += 1
            super().validation_step(batch, batch_idx)

    named = {"forget_metric": "val_acc", "retain_metric": "val_acc", "forget_target": 0.25}
    with pytest.raises(UnlearnError, match="stream: a step takes"):
        fit(callback(**named), trained(Measured))
    assert Measured.evaluated().batches == 1  # of the validation split, of one batch


def test_an_iterator_that_no_step_reads_is_left_alone():
    model = trained()
    model.stream = stream = iter([1, 2])
    fit(callback(), model)
    assert model.stream is stream and list(stream) == [1, 2]


# ---- what steps tell others


class Telling(Classifier):
    """Tells its loggers, files and terminal of every step, in all the ways that others do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.logger is not None:
            self.logger.log_metrics({"own": loss.item()}, self.global_step)
            for one in (*self.loggers, self.trainer.logger):
                one.log_hyperparams({"lr": 1.0})
                with one.experiment.timer("step") as timer:
                    timer.mark[0] += 1
            if isinstance(self.logger, TensorBoardLogger):
                self.logger.experiment.add_image("seen", torch.zeros(3, 2, 2), self.global_step)
            assert not hasattr(self.logger, "log_image") and str(self.logger.name) == "lightning_logs"
            (Path(self.logger.log_dir) / "batch.txt").write_text("seen")
            self.file.write("seen\n")
        self.print("a step")
        return loss


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_nothing_that_steps_tell_is_seen_and_the_report_is(kind, tmp_path, monkeypatch, capsys):
    told: list[str] = []
    model, logger = trained(Telling), kind(tmp_path)
    real = kind.log_metrics
    monkeypatch.setattr(kind, "log_metrics", lambda self, metrics, step=None: told.extend(metrics) or real(self, metrics, step))
    with open(tmp_path / "own.txt", "w") as model.file:
        file = model.file
        made = callback()
        fit(made, model, logger=logger)
        assert model.file is file and model.logger is logger and model.trainer.loggers == [logger]
    assert made.report.status == "unlearned" and "own" not in told and any(name.startswith("after/") for name in told)
    assert not [*tmp_path.rglob("batch.txt")] and (tmp_path / "own.txt").read_text() == ""
    assert "a step" not in capsys.readouterr().out and "print" not in vars(model)


def test_without_a_logger_there_is_none():
    model = trained(Telling)
    fit(callback(), model)
    assert model.logger is None


def test_a_stand_in_takes_whatever_is_done_with_it():
    one: Any = Silent()
    one.run["a/b"].append(3, step=one.step + 1)
    one.value = 3
    del one["x"]
    assert list(one) == [] and len(one) == 0 and one and "x" not in one and not one.step > 3 and int(one.n) == float(one.n) == 0
    with pytest.raises(AttributeError):
        one.__array__  # noqa: B018
    assert isinstance(Silent(CSVLogger("somewhere")), CSVLogger)

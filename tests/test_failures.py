"""What several processes do when one of them dies, fails or goes its own way: all end, none hangs, no file is half written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from _amounts import sample
from _callback import unlearn_callback
from _processes import Ended, in_processes
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import slug_lightning.patches.patch as patch
import slug_lightning.trainer.run_folder as output
from _tiny import Classifier, loader, outside, part, snapshot, trained, trainer
from slug_lightning import UnlearnModule, UnlearnPatch, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.objective.objective import Objective
from slug_lightning.reports.cost import CostMeter
from slug_lightning.reports.run_files import CHECKPOINT, PATCH, REPORT, WEIGHTS
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import local, shard_like, whole

pytestmark = pytest.mark.uncovered

LIMIT = 30
"""Seconds after which a process counts as hanging."""


class End(NamedTuple):
    """How a process ended that was not killed."""

    error: str
    changed: set[str]
    report: dict[str, Any] | None
    weights: dict[str, torch.Tensor]


# ---- where something goes wrong


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("the failure of one process")


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def during(phase: str, kind: str, act: Callable[[], None]) -> None:
    """Let `act` happen in this process, a fork, with the first batch of one kind in a phase."""
    now: list[str] = []
    entered, evaluate, loss = CostMeter.phase, Objective._evaluate, Objective.loss

    @contextmanager
    def phase_of(self: CostMeter, name: str) -> Iterator[None]:
        now[:] = [name]
        with entered(self, name):
            yield

    def acting(step: Callable[..., Any], self: Objective, of: Any, *args: Any) -> Any:
        found = step(self, of, *args)
        if now == [phase] and of == kind:
            act()
        return found

    CostMeter.phase = phase_of
    Objective._evaluate = lambda *args: acting(evaluate, *args)
    Objective.loss = lambda *args: acting(loss, *args)


def half(act: Callable[[], None], path: Any) -> None:
    Path(path).write_bytes(b'{"half": ')
    act()


def at(place: str, act: Callable[[], None]) -> None:
    """Let `act` happen in this process at a place of the run."""
    phases = {"forget gradient": ("gradients", "forget"), "retain gradient": ("gradients", "retain")}
    phases |= {name: (name, "forget") for name in ("validate", "search", "report")}
    if place in phases:
        during(*phases[place], act)
    elif place == "patch":
        patch.save_file = lambda tensors, path, **_: half(act, path)
    elif place == "weights":
        output.save_file = lambda tensors, path, **_: half(act, path)
    elif place == "checkpoint":
        pl.Trainer.save_checkpoint = act
    elif place == "checkpoint is written":
        DDPStrategy.save_checkpoint = act
    else:
        assert place == REPORT
        UnlearnReport.to_json = lambda self, path: half(act, path)


# ---- what runs in the processes


def rank() -> int:
    return int(os.environ["RANK"])


def strategy(way: str) -> Any:
    if way == "ddp":
        return DDPStrategy(timeout=timedelta(seconds=LIMIT))
    return ModelParallelStrategy(int(os.environ["WORLD_SIZE"]), 1, timeout=timedelta(seconds=LIMIT))


def made(way: str) -> pl.LightningModule:
    if way == "ddp":
        return trained()
    return UnlearnModule(
        trained().net,
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        score=lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        chance=0.25,
    )


def ended(module: pl.LightningModule, callback: UnlearnCallback, data: Any = None, **options: Any) -> End:
    """Fit, and say how it ended."""
    before = snapshot(module)
    fitting = trainer(callback, **{"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy("ddp"), **options})
    error = ""
    try:
        fitting.fit(module, data if data is not None else loader(False), None if data is not None else loader(False))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    report = callback.report.to_dict() if callback.report else None
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    if error:  # the others may be gone, so that nothing can be gathered: each looks at its part
        return End(
            error,
            {key for key in held if not bitwise_equal(local(held[key]), local(shard_like(before[key], held[key])))},
            report,
            {},
        )
    return End(error, set(), report, {name: whole(tensor).clone() for name, tensor in held.items()})


def callback(**options: Any) -> UnlearnCallback:
    return unlearn_callback(**{"forget": loader(True), "retain": loader(False), "retain_tolerance": 0.5, **options})


def broken(place: str, at_rank: int, act: Callable[[], None], folder: Path | None, way: str = "ddp") -> End:
    """One run, in which something happens in one process."""
    if rank() == at_rank:
        at(place, act)
    asked = None if folder is None else str(folder)
    return ended(made(way), callback(output_dir=asked), strategy=strategy(way))


def is_whole(folder: Path) -> set[str]:
    """Check every file of a run that is there; gives the names of those that are."""
    if not folder.exists():
        return set()
    there = {path.name for path in folder.iterdir()}
    if PATCH in there:
        assert UnlearnPatch.load(folder / PATCH).base
    if WEIGHTS in there:
        assert len(load_file(folder / WEIGHTS)) == len(made("ddp").state_dict())
    if CHECKPOINT in there and (folder / CHECKPOINT).is_file():
        assert torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]
    if REPORT in there:
        assert json.loads((folder / REPORT).read_text())["status"] == "unlearned"
        assert {PATCH, WEIGHTS, CHECKPOINT} <= there, "a folder with a report has everything"
    for path in (folder / "figures").glob("*"):
        assert path.suffix == ".part" or path.read_bytes().endswith(b"IEND\xaeB`\x82")
    return there


# ---- 1: a process that is killed

PHASES = ["validate", "forget gradient", "retain gradient", "search", "report"]
FIRST_WRITES = ["patch", "weights", "checkpoint is written", REPORT]


@pytest.mark.parametrize(
    ("place", "rank"),
    sample(product([*PHASES, "checkpoint"], (0, 1)), zip([*PHASES, "checkpoint"], [0, 1] * 3, strict=True))
    + [(place, 0) for place in FIRST_WRITES],
)
def test_when_one_process_is_killed_the_other_ends_with_an_error_and_no_file_is_half_written(place, rank, tmp_path):
    ends = in_processes(2, broken, place, rank, die, tmp_path / "run", timeout=LIMIT)
    assert isinstance(ends[rank], Ended) and ends[rank].code == -signal.SIGKILL
    other = ends[1 - rank]
    assert isinstance(other, End) and other.error, "the other process has not noticed"
    assert other.changed == set() and other.report is None
    assert REPORT not in is_whole(tmp_path / "run")


@pytest.mark.parametrize(("place", "rank"), [("forget gradient", 1), ("search", 0)])
def test_when_one_process_of_a_sharded_model_is_killed_the_other_ends_too(place, rank, tmp_path):
    ends = in_processes(2, broken, place, rank, die, tmp_path / "run", "fsdp2", timeout=LIMIT)
    assert isinstance(ends[rank], Ended) and ends[rank].code == -signal.SIGKILL
    assert isinstance(ends[1 - rank], End) and ends[1 - rank].error
    assert ends[1 - rank].changed == set()
    assert is_whole(tmp_path / "run") == set()


# ---- 3: an exception in one process


@pytest.mark.parametrize(
    ("place", "rank"),
    sample(product(PHASES, (0, 1)), zip(PHASES, [1, 0, 1, 0, 1], strict=True)),
)
def test_what_fails_in_one_process_fails_in_the_other_with_its_message(place, rank, tmp_path):
    ends = in_processes(2, broken, place, rank, fail, tmp_path / "run", timeout=LIMIT)
    assert ends[rank].error == "RuntimeError: the failure of one process"
    assert ends[1 - rank].error == f"OtherProcessError: rank {rank}: the failure of one process"
    assert all(end.changed == set() and end.report is None for end in ends)
    assert is_whole(tmp_path / "run") == set()


@pytest.mark.parametrize("place", ["patch", "weights", "checkpoint is written", REPORT])
def test_a_full_disk_ends_both_processes_and_takes_the_edit_back(place, tmp_path):
    ends = in_processes(2, broken, place, 0, no_space, tmp_path / "run", timeout=LIMIT)
    assert ends[0].error == "OSError: [Errno 28] No space left on device"
    assert ends[1].error, "the second process takes it for a success"
    if place != "checkpoint is written":  # there the Trainer itself waits, and learns of it when the other process ends
        assert "No space left" in ends[1].error
    assert all(end.changed == set() and end.report is None for end in ends)
    there = is_whole(tmp_path / "run")
    assert REPORT not in there and not any(name.endswith(".part") for name in there)


class Fragile(Classifier):
    """Its steps fail in one process, once they were called so often."""

    def __init__(self, step: str = "", at_rank: int = 0, calls: int = 1, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.told = outside(left=calls if rank() == at_rank else -1)
        self.step = step
        self.error = error

    def count(self, step: str) -> None:
        if step == self.step:
            self.told().left -= 1
            if self.told().left == 0:
                raise self.error("val_f1")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.count("validation_step")


def with_a_fragile_step(*args: Any) -> End:
    named = {"forget_metric": "val_acc", "retain_metric": ["val_acc", "val_loss"], "forget_target": 0.25}
    return ended(trained(Fragile, **dict(zip(("step", "at_rank", "calls", "error"), args, strict=True))), callback(**named))


@pytest.mark.parametrize(
    ("step", "calls", "error"),
    [
        ("training_step", 1, KeyError),
        ("training_step", 3, RuntimeError),
        ("validation_step", 1, RuntimeError),
        ("validation_step", 5, KeyError),
    ],
)
def test_a_step_that_fails_in_one_process_ends_both(step, calls, error):
    ends = in_processes(2, with_a_fragile_step, step, 1, calls, error, timeout=LIMIT)
    assert ends[1].error.startswith(error.__name__) and "val_f1" in ends[1].error
    assert ends[0].error.startswith("OtherProcessError: rank 1: ") and "val_f1" in ends[0].error
    assert all(end.changed == set() for end in ends)


class Holey(Subset):
    """Samples of which one cannot be read, in one process."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[i] for i in indices]

    def __getitem__(self, index: Any) -> Any:
        if os.environ["RANK"] == "1" and index > 20:
            raise OSError("the mount is gone")
        return super().__getitem__(index)


def with_a_hole(forget: bool) -> End:
    whole_part = part(forget)
    holey = DataLoader(Holey(whole_part.dataset, whole_part.indices), batch_size=8)
    return ended(trained(), callback(**{"forget" if forget else "retain": holey}))


@pytest.mark.parametrize("forget", [False, True])
def test_data_that_cannot_be_read_in_one_process_end_both(forget):
    ends = in_processes(2, with_a_hole, forget, timeout=LIMIT)
    assert ends[1].error == "OSError: the mount is gone"
    assert ends[0].error == "OtherProcessError: rank 1: the mount is gone"
    assert all(end.changed == set() for end in ends)


# ---- 2: what depends on the rank


class Shifted(Classifier):
    """Reports better figures in the second process."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        found = {"val_loss": cross_entropy(logits, batch[1])}
        found["val_acc"] = (logits.argmax(1) == batch[1]).float().mean() + 0.3 * rank()
        self.log_dict(found)


class Telling(Classifier):
    """Logs one thing more in the second process."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if rank():
            self.log("val_f1", 0.5)


class Renaming(Classifier):
    """Logs what is asked for in the first process only."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_f1" if rank() else "val_acc", (logits.argmax(1) == batch[1]).float().mean())


class Scaled(Classifier):
    """Has another loss in the second process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + rank())


class NotANumber(Classifier):
    """Has no finite loss in the second process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (float("nan") if rank() else 1.0)


ACCURACY = {"forget_metric": "val_acc", "retain_metric": "val_acc"}
OWN_TARGET = {"forget_target": 0.25}
# What differs: the module, its attributes (one for each process), the callback's options for all, and one for each process.
DIFFERENT: dict[str, tuple[type[Classifier], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a better metric": (Shifted, {}, ACCURACY | {"forget_target": 0.4}, {}),
    "a metric more": (Telling, {}, ACCURACY | OWN_TARGET, {}),
    "another metric": (Renaming, {}, ACCURACY | OWN_TARGET, {}),
    "another loss": (Scaled, {}, {}, {}),
    "no finite loss": (NotANumber, {}, {}, {}),
    "the module's target": (Classifier, {"forget_target": (0.1, 0.4)}, ACCURACY, {}),
    "the module's chance": (Classifier, {"chance": (0.1, 0.4)}, ACCURACY, {}),
    "the module's chance, in one only": (Classifier, {"chance": (None, 0.4)}, ACCURACY, {}),
    "which way is better": (Classifier, {"higher_is_better": ({"val_acc": True}, {"val_acc": False})}, ACCURACY | OWN_TARGET, {}),
    "the module's forget metric": (Classifier, {"forget_metric": ("val_acc", "val_loss")}, OWN_TARGET, {}),
    "the module's retain metric": (Classifier, {"retain_metric": ("val_acc", "val_loss")}, {}, {}),
    "target": (Classifier, {}, ACCURACY, {"forget_target": (0.1, 0.4)}),
    "tolerance": (Classifier, {}, {}, {"retain_tolerance": (0.5, 1e-6)}),
    "evaluations": (Classifier, {}, {}, {"max_evaluations": (10, 2)}),
    "layers": (Classifier, {}, {}, {"layers": ("*", "net.0.weight")}),
    "granularity": (Classifier, {}, {}, {"granularity": ("tensor", "module")}),
    "replay": (Classifier, {}, ACCURACY | OWN_TARGET, {"replay": (True, False)}),
    "its budget": (Classifier, {}, ACCURACY | OWN_TARGET, {"replay_budget": (None, 0)}),
    "what comes then": (Classifier, {}, {}, {"continue_training": (False, True)}),
}
QUICK = [
    "a better metric", "another loss", "no finite loss", "the module's target", "the module's chance, in one only",
    "which way is better", "the module's retain metric", "tolerance", "layers", "its budget", "what comes then",
]  # fmt: skip
"""What the processes may differ in, one of each kind; the others are asked for, and compared, alike."""


def with_a_difference(name: str) -> End:
    kind, attributes, options, own = DIFFERENT[name]
    module = trained(kind)
    for attribute, values in attributes.items():
        setattr(module, attribute, values[rank()])
    options = options | {option: values[rank()] for option, values in own.items()}
    return ended(module, callback(**options))


@pytest.mark.parametrize("name", sample(DIFFERENT, QUICK))
def test_what_depends_on_the_rank_neither_hangs_nor_splits_the_processes(name):
    one, other = in_processes(2, with_a_difference, name, timeout=LIMIT)
    print(one.error or one.report["status"], "|", other.error or other.report["status"])
    assert isinstance(one, End) and isinstance(other, End)
    assert bool(one.error) == bool(other.error), "one process ends well and the other does not"
    if one.error:
        assert "lost the connection" not in one.error + other.error
        assert {end.error.split(": ")[0] for end in (one, other)} <= {"UnlearnError", "OtherProcessError"}
        assert one.changed == other.changed == set()
    else:
        assert one.report == other.report
        assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)

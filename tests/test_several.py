"""The callback beside the rest of Lightning in several processes: training on, checkpoints, loggers, sharded files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from _amounts import sample
from _callback import unlearn_callback
from _processes import Ended, in_processes
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from _tiny import CLASSES, FORGET, Classifier, blobs, loader, part, snapshot, trained, trainer
from slug_lightning import UnlearnModule, UnlearnPatch, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.reports.run_files import CHECKPOINT, PATCH, REPORT, WEIGHTS
from slug_lightning.tensors.dtensor import whole

pytestmark = pytest.mark.uncovered

LIMIT = 60


def ends(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the processes give, all of them."""
    found = in_processes(number, function, *args, timeout=LIMIT)
    assert not [end for end in found if isinstance(end, Ended)], found
    return found


def rank() -> int:
    return int(os.environ["RANK"])


@functools.cache  # Lightning's teardown takes it away
def count() -> int:
    return int(os.environ["WORLD_SIZE"])


def callback(**options: Any) -> UnlearnCallback:
    return unlearn_callback(**{"forget": loader(True), "retain": loader(False), "retain_tolerance": 0.5, **options})


def ddp(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return trainer(*callbacks, devices=count(), strategy=DDPStrategy(timeout=timedelta(seconds=30)), **options)


def comparable(report: UnlearnReport) -> dict[str, Any]:
    """Without what differs from run to run and from way to way."""
    return {name: value for name, value in report.to_dict().items() if name not in ("cost", "notes")}


def assert_near(one: Any, other: Any) -> None:
    """Equal plain data, but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_near(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_near(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(other, float) else other)


# ---- DDP: training on, loading, checkpoints, loggers


def trains_on() -> tuple[str, dict[str, Tensor], dict[str, Tensor], int]:
    model, forgetting = trained(), callback(continue_training=True)
    seen: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update(snapshot(pl_module))

    ddp(forgetting, Look(), max_epochs=1).fit(model, loader(False, batch_size=16), loader(False))
    assert forgetting.report is not None
    edited = trained()
    assert forgetting.report.patch is not None
    forgetting.report.patch.apply(edited)
    for name, tensor in snapshot(edited).items():
        assert torch.equal(seen[name], tensor), f"{name}: training does not start from the edited weights"
    return forgetting.report.status, seen, snapshot(model), model.trained_batches


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_training_goes_on_from_the_edited_weights_in_all_processes():
    (status, start, end, batches), (_, other_start, other_end, other_batches) = ends(2, trains_on)
    assert status == "unlearned"
    assert batches == other_batches == 6  # 180 samples, 16 a batch, two processes
    assert all(torch.equal(start[name], other_start[name]) for name in start)
    learned = [name for name, _ in trained().named_parameters()]
    assert all(torch.equal(end[name], other_end[name]) for name in learned)
    assert any(not torch.equal(start[name], end[name]) for name in learned)


def from_the_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bool, list[str]]:
    first, model = callback(output_dir=str(folder / "run")), trained()
    ddp(first).fit(model, loader(False), loader(False))
    again, second = callback(output_dir=str(folder / "run")), trained()
    ddp(again).fit(second, loader(False), loader(False), ckpt_path=folder / "run" / CHECKPOINT, weights_only=True)
    assert first.report and again.report
    same = all(torch.equal(tensor, snapshot(model)[name]) for name, tensor in snapshot(second).items())
    return first.report.to_dict(), again.report.to_dict(), same, sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_with_the_edit_is_left_alone_in_all_processes(tmp_path):
    for report, again, same, folders in ends(2, from_the_checkpoint, tmp_path):
        assert report == again and same
        assert folders == ["run"]


def beside_others(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    logger = TensorBoardLogger(folder, name="", version="run")
    last = ModelCheckpoint(folder / "checkpoints", save_last=True, save_weights_only=False)
    forgetting, model = callback(), trained()
    stopping = EarlyStopping("val_loss", patience=1)
    made = ddp(forgetting, last, stopping, logger=logger, enable_checkpointing=True)
    made.fit(model, loader(False), loader(False))
    assert forgetting.report is not None
    return forgetting.report.to_dict(), snapshot(model)


def test_checkpoints_and_loggers_hold_the_edit_once(tmp_path):
    (report, weights), (other, others) = ends(2, beside_others, tmp_path)
    assert report == other and all(torch.equal(weights[name], others[name]) for name in weights)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[name], weights[name]) for name in weights)
    assert not all(torch.equal(last[name], trained().state_dict()[name]) for name in weights)
    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    events = [name for name in there if name.startswith("events.")]
    assert len({name.split(".")[5] for name in events}) == 1, f"event files of several processes: {events}"
    assert set(there) - set(events) - {"hparams.yaml"} == {REPORT, PATCH, WEIGHTS, CHECKPOINT, "figures"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run"]


# ---- FSDP2


def wrapped() -> UnlearnModule:
    return UnlearnModule(
        trained().net,
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        score=lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        chance=1 / CLASSES,
    )


def sharded(folder: Path, in_pieces: bool) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    def made(*callbacks: pl.Callback) -> pl.Trainer:
        size = count()
        strategy = ModelParallelStrategy(size, 1, save_distributed_checkpoint=in_pieces, timeout=timedelta(seconds=30))
        return trainer(*callbacks, devices=size, strategy=strategy)

    module, forgetting = wrapped(), callback(output_dir=str(folder / "run"))
    fitting = made(forgetting)
    fitting.fit(module, loader(False), loader(False))
    assert forgetting.report is not None
    weights = {name: whole(tensor).clone() for name, tensor in module.state_dict().items()}
    data = _report_data(forgetting)
    (found,) = fitting.validate(module, data, verbose=False)
    loaded = wrapped()
    loaded.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in loaded.state_dict().items()})
    (again,) = made().validate(loaded, data, ckpt_path=folder / "run" / CHECKPOINT, verbose=False)
    assert again == found
    restored = {name: whole(tensor).clone() for name, tensor in loaded.state_dict().items()}
    return comparable(forgetting.report), weights, found, restored


def _report_data(forgetting: UnlearnCallback) -> DataLoader:
    from slug_lightning.datamodules.sources.resolve import resolve_loaders

    loaders = resolve_loaders({"two": forgetting.forget}, forgetting.retain, None)
    inputs, labels = zip(*loaders.forget["two"]["test"], strict=True)
    return DataLoader(TensorDataset(torch.cat(inputs), torch.cat(labels)), batch_size=1)


def alone() -> dict[str, Any]:
    forgetting = callback()
    trainer(forgetting, devices=1).fit(wrapped(), loader(False), loader(False))
    assert forgetting.report is not None
    return comparable(forgetting.report)


@pytest.mark.filterwarnings(
    "ignore:Using `DistributedSampler` with the dataloaders",
    "ignore:It is recommended to use `self.log",
    "ignore:Be aware that when using `ckpt_path`",
)
@pytest.mark.parametrize("in_pieces", [True, False])
def test_what_a_sharded_model_leaves_fits_the_plain_one(in_pieces, tmp_path):
    (report, weights, found, restored), (other, others, *_) = ends(2, sharded, tmp_path, in_pieces)
    assert report == other and all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.equal(weights[name], restored[name]) for name in weights)
    run = tmp_path / "run"
    assert (run / CHECKPOINT).is_dir() == in_pieces
    plain = trained().net
    UnlearnPatch.load(run / PATCH).apply(plain)
    saved = load_file(run / WEIGHTS)
    assert saved.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saved[name], tensor) and torch.equal(weights[f"model.{name}"], tensor)
    assert found["score"] == pytest.approx(report["after"]["forget"]["score"])
    assert comparable(UnlearnReport.from_json(run / REPORT)) == report
    (one,) = ends(1, alone)
    for digest in (report, one):
        del digest["patch_digest"]
    assert_near(report, one)


# ---- data


def ended(module: pl.LightningModule, forgetting: UnlearnCallback) -> str | dict[str, Any]:
    made = ddp(forgetting) if count() > 1 else trainer(forgetting, devices=1)
    try:
        made.fit(module, loader(False), loader(False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert forgetting.report is not None
    report = comparable(forgetting.report)
    del report["patch_digest"]
    return report


def in_another_order(kind: str) -> Any:
    subset = part(kind == "forget")
    order = list(reversed(subset.indices)) if rank() else list(subset.indices)
    return ended(trained(), callback(**{kind: DataLoader(Subset(blobs(), order), batch_size=16)}))


class Stream:
    """Batches without indices, the other way round in the second process."""

    def __init__(self, forget: bool) -> None:
        self.batches = list(loader(forget, batch_size=4))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches[::-1] if rank() else self.batches)


def in_another_batch_order(kind: str) -> Any:
    return ended(trained(), callback(**{kind: Stream(kind == "forget")}))


def with_another_seed(kind: str) -> Any:
    generator = torch.Generator().manual_seed(rank())
    return ended(trained(), callback(**{kind: loader(kind == "forget", shuffle=True, generator=generator)}))


WAYS = [in_another_order, in_another_batch_order, with_another_seed]


@pytest.mark.parametrize(
    ("way", "kind"), sample(product(WAYS, ["forget", "retain"]), zip(WAYS, ["forget", "retain", "forget"], strict=True))
)
def test_data_in_another_order_in_one_process_are_refused_in_both_or_make_no_difference(way, kind):
    found = ends(2, way, kind)
    refused = [isinstance(end, str) and "batches differ across ranks" in end for end in found]
    assert all(refused) or (way is with_another_seed and isinstance(found[0], dict) and found[0] == found[1]), found


def six(sizes: tuple[int, int, int]) -> Any:
    from slug_lightning.datamodules import UnlearnDataModule

    labels = blobs().tensors[1]
    forget = (labels == FORGET).nonzero()[:, 0].tolist()
    retain = (labels != FORGET).nonzero()[:, 0].tolist()
    parts: dict[str, Any] = {}
    start = 0
    for name, size in zip(("forget", "forget_val", "forget_test"), sizes, strict=True):
        parts[name] = Subset(blobs(), forget[start : start + size])
        start += size
    for name, where in (("retain", slice(0, 90)), ("retain_val", slice(90, 131)), ("retain_test", slice(131, 180))):
        parts[name] = Subset(blobs(), retain[where])
    return UnlearnDataModule(**parts, batch_size=16)


def one_sample() -> Any:
    forgetting = unlearn_callback(retain_tolerance=0.5)
    made = ddp(forgetting) if count() > 1 else trainer(forgetting, devices=1)
    made.fit(trained(), six((1, 1, 1)))
    assert forgetting.report is not None
    report = comparable(forgetting.report)
    del report["patch_digest"]
    return report


class Counting(Classifier):
    """Logs metric objects in validation_step."""

    def __init__(self) -> None:
        super().__init__()
        self.right = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        self.calibration = torchmetrics.classification.MulticlassCalibrationError(CLASSES)  # keeps every sample
        self.mean = torchmetrics.MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.right(logits, batch[1])
        self.calibration.update(logits.softmax(1), batch[1])
        self.mean.update(cross_entropy(logits, batch[1], reduction="none"))
        self.log_dict({"right": self.right, "error": self.calibration, "mean_loss": self.mean})


def with_metric_objects() -> Any:
    module = Counting()
    module.load_state_dict(trained().state_dict())
    return ended(module, callback(forget_metric="right", retain_metric=["right", "error", "mean_loss"], retain_tolerance=10.0))


@functools.cache
def on_one_device(function: Callable[[], Any]) -> Any:
    return ends(1, function)[0]


SMALL = [(one_sample, 3), (with_metric_objects, 2), (with_metric_objects, 3)]


@pytest.mark.parametrize(("function", "processes"), sample(SMALL, SMALL[:2]))
def test_small_sets_and_metric_objects_give_the_answer_of_one_device(function, processes):
    found = ends(processes, function)
    assert isinstance(found[0], dict), found[0]
    assert found[0]["status"] == "unlearned"
    assert all(end == found[0] for end in found)
    assert_near(found[0], on_one_device(function))

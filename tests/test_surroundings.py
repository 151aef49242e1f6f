"""What else a Trainer may be told, and what else may run in it: the outcome holds, or it is refused with the reason."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from _amounts import sample
from _callback import unlearn_callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, Subset

from _tiny import CLASSES, FORGET, Classifier, blobs, changed, loader, part, snapshot, trained, trainer
from slug_lightning import UnlearnError, UnlearnPatch, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders, samples_in
from slug_lightning.modules import ClassifierModule
from slug_lightning.utils.loaders import Chained, EveryFourth, First

pytestmark = pytest.mark.uncovered


def callback(**options: Any) -> UnlearnCallback:
    return unlearn_callback(**{"forget": loader(True, batch_size=4), "retain": loader(False, batch_size=4), **options})


def forgotten(callback: UnlearnCallback, model: Any = None, **options: Any) -> Any:
    """Fit, and give the model."""
    model = trained() if model is None else model
    trainer(callback, **options).fit(model, loader(False), loader(False))
    return model


# Limits


def mean_loss(batches: Any, model: Any = None) -> float:
    """The loss that a classifier, by default one that was not edited, has on them, a mean over samples."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        return cross_entropy((model or trained()).eval().net(x), y).item()


@pytest.mark.parametrize(
    ("options", "counts", "notes"),
    [
        ({"limit_train_batches": 2}, {"train": (2, 2)}, ["limit_train_batches=2: the gradients read 2 of 8 forget"]),
        (
            {"limit_val_batches": 0.5},
            {"val": (2, 6)},
            ["limit_val_batches=0.5: the search read 2 of 4 forget batches and 6 of 12 "],
        ),
        ({"limit_test_batches": 1}, {"test": (1, 1)}, ["limit_test_batches=1: the report read 1 of 4 forget batches"]),
        ({"limit_test_batches": 0.01}, {"test": (1, 1)}, ["limit_test_batches=0.01: the report read 1 of 4"]),
        (
            {"overfit_batches": 3, "limit_test_batches": 100},
            {"train": (3, 3), "val": (3, 3)},
            [
                "overfit_batches=3: the gradients",
                "overfit_batches=3: the search",
                "limit_test_batches=100: the report read 4 of 4",
            ],
        ),
        (
            {"fast_dev_run": 2},
            dict.fromkeys(("train", "val", "test"), (2, 2)),
            ["fast_dev_run=2: the report read 2 of 4 forget batches and 2 of 12 retain batches", "fast_dev_run: .*nothing"],
        ),
        (
            {"limit_val_batches": 0, "limit_test_batches": 0},
            {},
            [
                "limit_val_batches=0 skips Lightning's val loop, but the search read the whole",
                "limit_test_batches=0 skips Lightning's test loop",
            ],
        ),
        ({}, {}, []),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_the_trainers_limits_hold_for_our_passes_and_are_told(options, counts, notes):
    forgetting = callback(retain_tolerance=20.0)
    forgotten(forgetting, **options)
    report = forgetting.report
    own = resolve_loaders({"two": forgetting.forget}, forgetting.retain, None)
    own = own._replace(forget=own.forget["two"])
    read = {
        (kind, split): list(islice(getattr(own, kind)[split], counts.get(split, (None, None))[kind == "retain"]))
        for kind in ("forget", "retain")
        for split in ("train", "val", "test")
    }
    assert report.cost["backward_samples"] == sum(len(x) for kind in ("forget", "retain") for x, _ in read[kind, "train"])
    for kind in ("forget", "retain"):
        assert report.search_before[kind]["loss"] == pytest.approx(mean_loss(read[kind, "val"]), rel=1e-5)
        assert report.before[kind]["loss"] == pytest.approx(mean_loss(read[kind, "test"]), rel=1e-5)
    told = [note for note in report.notes if "limit_" in note or "overfit" in note or "fast_dev" in note]
    assert len(told) >= len(notes) and bool(told) == bool(notes)
    for note in notes:
        assert [each for each in told if re.match(note, each)], (note, told)


class Stream(IterableDataset):
    def __init__(self, forget: bool) -> None:
        self.items = [part(forget)[i] for i in range(len(part(forget)))]

    def __iter__(self) -> Any:
        return iter(self.items)


def test_a_share_of_a_stream_is_refused_and_a_number_is_not():
    data = {"forget": DataLoader(Stream(True), batch_size=4), "retain": loader(False, batch_size=16)}
    with pytest.raises(UnlearnError, match=r"Trainer\(limit_val_batches=0.5\): the forget loader has no length.*number of"):
        forgotten(callback(**data), limit_val_batches=0.5)
    forgetting = callback(**data)
    forgotten(forgetting, limit_val_batches=2)
    assert any("read at most 2 of an unknown number of forget batches and 2 of 3" in note for note in forgetting.report.notes)
    assert forgetting.report.search_before["forget"]["loss"] == pytest.approx(
        mean_loss([batch for i, batch in enumerate(data["forget"]) if i in (2, 6)]), rel=1e-5
    )


def test_a_fast_run_writes_only_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forgotten(callback(), fast_dev_run=True, logger=CSVLogger(tmp_path / "logs"))
    assert not list(tmp_path.rglob("*"))
    forgotten(callback(output_dir=str(tmp_path / "run")), fast_dev_run=True, logger=CSVLogger(tmp_path / "logs"))
    assert (tmp_path / "run" / "report.json").is_file() and not Path("logs").exists()


def test_lengths_are_known_wherever_they_can_be():
    ten = DataLoader(torch.arange(10), batch_size=1)
    assert len(Chained([ten, First(ten, 3), First(ten, 30)])) == 23
    for turns in ({0, 1}, {2}, {3}):
        assert len(EveryFourth(ten, turns)) == len(list(EveryFourth(ten, turns)))
    with pytest.raises(TypeError):
        len(Chained([ten, DataLoader(Stream(True))]))


def test_a_limited_loader_is_known_by_its_source():
    data = {"train": loader(True), "val": Chained([loader(True), Chained([loader(False)])])}
    assert samples_in({split: First(batches, 1) for split, batches in data.items()}) == samples_in(data)
    assert len(samples_in(data)) == 240


# Checkpoints


another_trainer = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")  # no ModelCheckpoint


def other_class() -> dict[str, DataLoader]:
    """Forget class 0, of the data without class 2."""
    labels = blobs().tensors[1]
    sets = (
        Subset(blobs(), ((labels == 0) == forget).logical_and(labels != FORGET).nonzero()[:, 0].tolist()) for forget in (1, 0)
    )
    return dict(zip(("forget", "retain"), (DataLoader(chosen, batch_size=4) for chosen in sets), strict=True))


def run_with_checkpoints(folder: Path, **options: Any) -> tuple[UnlearnCallback, Path, Path]:
    """A run that leaves `unlearned.ckpt` and `last.ckpt`."""
    forgetting = callback(output_dir=str(folder / "run"), **options)
    keeping = ModelCheckpoint(dirpath=folder / "kept", save_last=True, save_top_k=0)
    trainer(forgetting, keeping, enable_checkpointing=True).fit(trained(), loader(False), loader(False))
    return forgetting, folder / "run" / "unlearned.ckpt", folder / "kept" / "last.ckpt"


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_restored_weights_are_edited_once(tmp_path):
    kept = tmp_path / "trained.ckpt"
    before = trainer()
    before.fit(model := trained(), loader(False), loader(False))
    before.save_checkpoint(kept)
    restored = snapshot(model)
    forgetting, fresh = callback(retain_tolerance=20.0), Classifier()
    trainer(forgetting, max_epochs=2).fit(fresh, loader(False), loader(False), ckpt_path=kept)
    assert changed(fresh, restored) == set(forgetting.report.tensors) == {forgetting.report.layer}
    forgetting.report.patch.revert(fresh)
    assert not changed(fresh, restored)


class AtTheFirstBatch(pl.Callback):
    """Remembers the weights that training starts with."""

    weights: dict[str, torch.Tensor] | None = None

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights = snapshot(pl_module)


def as_written(report):
    """A report as its checkpoint has it, which was written before the fit ended."""
    return replace(report, notes=[note for note in report.notes if not note.startswith("continue_training")])


@pytest.mark.parametrize(
    ("then", "name"),
    sample(
        product(["stop", "continue"], ["unlearned.ckpt", "last.ckpt"]), [("stop", "last.ckpt"), ("continue", "unlearned.ckpt")]
    ),
)
@another_trainer
def test_the_same_request_again_does_nothing(then, name, tmp_path, capsys):
    first, *checkpoints = run_with_checkpoints(tmp_path, continue_training=then == "continue")
    (path,) = (checkpoint for checkpoint in checkpoints if checkpoint.name == name)
    written, model, spy = files_in(tmp_path), Classifier(), AtTheFirstBatch()
    again = callback(continue_training=then == "continue", output_dir=str(tmp_path / "run"))
    made = trainer(again, spy, TQDMProgressBar(), enable_progress_bar=True)
    made.fit(model, loader(False), loader(False), ckpt_path=path)
    goes_on = then == "continue" and name == "unlearned.ckpt"  # it was written before the first batch
    assert (spy.weights is not None) == goes_on
    restored = weights_in(path)
    assert all(torch.equal(tensor, restored[name]) for name, tensor in (spy.weights or snapshot(model)).items())
    assert as_written(again.report) == as_written(first.report) and again.report.status == "unlearned"
    assert "unlearned already" in capsys.readouterr().out
    assert files_in(tmp_path) == written


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_script_that_is_started_again_from_its_last_checkpoint_finds_nothing_to_do(then, tmp_path):
    weights, found = [], []
    for _ in range(3):
        forgetting, model = callback(continue_training=then == "continue", output_dir=str(tmp_path / "run")), trained()
        keeping = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True)
        path = "last" if found else None
        trainer(keeping, forgetting, enable_checkpointing=True).fit(model, loader(False), loader(False), ckpt_path=path)
        found.append(sorted(tmp_path.rglob("*")))
        weights.append(snapshot(model))
        assert not changed(model, weights[0]) and not changed(model, weights_in(tmp_path / "kept" / "last.ckpt"))
        assert forgetting.report.status == "unlearned"
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("then", sample(["stop", "continue"], ["continue"]))
@another_trainer
def test_a_report_in_a_checkpoint_answers_for_no_other_data(then, tmp_path):
    _, path, _ = run_with_checkpoints(tmp_path, continue_training=then == "continue", retain_tolerance=20.0)
    forgetting, model = callback(**other_class(), continue_training=then == "continue", retain_tolerance=20.0), Classifier()
    trainer(forgetting).fit(model, loader(False), loader(False), ckpt_path=path)
    x, y = blobs().tensors
    assert (model.eval().net(x[y == 0]).argmax(1) == 0).float().mean() <= 1 / CLASSES
    assert forgetting.report.before["forget"]["loss"] < 1


@pytest.mark.parametrize("option", [{"retain_tolerance": 0.5}, {"forget_target": 9.0}, {"layers": "net.6.*"}])
@another_trainer
def test_a_report_in_a_checkpoint_answers_for_no_other_request(option, tmp_path):
    first, path, _ = run_with_checkpoints(tmp_path, retain_tolerance=0.2)
    forgetting, model = callback(**{"retain_tolerance": 0.2, "max_evaluations": 2, **option}), Classifier()
    trainer(forgetting).fit(model, loader(False), loader(False), ckpt_path=path)
    assert forgetting.report != first.report
    assert forgetting.report.search_before["forget"] == first.report.search_after["forget"]


@another_trainer
def test_training_that_goes_on_is_not_edited_again_though_the_metric_has_moved(tmp_path):
    class Relearning(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(blobs().tensors if self.training else batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    keeping = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    model, forgetting = trained(Relearning), callback(continue_training=True)
    trainer(forgetting, keeping, enable_checkpointing=True).fit(model, loader(False), loader(False))
    again = callback(continue_training=True)
    trainer(again, max_epochs=2).fit(trained(Relearning), loader(False), loader(False), ckpt_path=tmp_path / "last.ckpt")
    search = resolve_loaders({"two": forgetting.forget}, forgetting.retain, None).forget["two"]["val"]
    assert mean_loss(search, model) < forgetting.report.bounds["forget_target"], "the test's training relearns nothing"
    assert as_written(again.report) == as_written(forgetting.report)


# Fitting again


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_second_fit_of_the_same_trainer_does_nothing(then, tmp_path):
    model, forgetting = trained(), callback(continue_training=then == "continue", output_dir=str(tmp_path / "run"))
    made = trainer(forgetting)
    made.fit(model, loader(False), loader(False))
    weights, report, written = snapshot(model), forgetting.report, files_in(tmp_path)
    made.fit(model, loader(False), loader(False))
    assert not changed(model, weights)
    assert forgetting.report is report and report.patch is not None
    assert files_in(tmp_path) == written


def test_a_second_fit_with_more_epochs_trains_on_and_edits_nothing():
    model, forgetting, spy = trained(), callback(continue_training=True), AtTheFirstBatch()
    made = trainer(forgetting, spy)
    made.fit(model, loader(False), loader(False))
    weights, report = snapshot(model), forgetting.report
    made.fit_loop.max_epochs = 2
    made.fit(model, loader(False), loader(False))
    assert not [name for name, tensor in spy.weights.items() if not torch.equal(tensor, weights[name])]
    assert forgetting.report is report and changed(model, weights)


def test_a_fit_that_was_broken_off_after_the_edit_is_not_edited_again():
    class Impatient(Classifier):
        patient = False

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2 and not self.patient:
                raise RuntimeError("broken off")

    model, forgetting = trained(Impatient), callback(continue_training=True)
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(forgetting).fit(model, loader(False), loader(False))
    report, model.patient, spy, weights = forgetting.report, True, AtTheFirstBatch(), snapshot(model)
    trainer(forgetting, spy).fit(model, loader(False), loader(False))
    assert forgetting.report is report
    assert not [name for name, tensor in spy.weights.items() if not torch.equal(tensor, weights[name])]


BOTH = list(product(["stop", "continue"], [True, False]))


@pytest.mark.parametrize(("then", "reset"), sample(BOTH, [("stop", True), ("continue", False)]))
def test_untouched_weights_are_edited_by_the_same_callback(then, reset):
    first, forgetting, spy = trained(), callback(continue_training=then == "continue"), AtTheFirstBatch()
    trainer(forgetting).fit(first, loader(False), loader(False))
    report = forgetting.report
    second = first if reset else Classifier()
    second.load_state_dict(trained().state_dict())
    trainer(forgetting, spy).fit(second, loader(False), loader(False))
    assert forgetting.report is not report
    expected = trained()
    report.patch.apply(expected)
    edited = spy.weights or snapshot(second)
    assert not changed(expected, edited)


def test_the_same_callback_edits_a_module_with_other_names():
    forgetting, other = callback(), ClassifierModule(trained().net, num_classes=CLASSES)
    other.forget_metric = other.retain_metric = "loss"  # what the other module is measured by
    for model in (trained(), other):
        trainer(forgetting).fit(model, loader(False), loader(False))
    assert forgetting.report.tensors == ["6.weight"]
    assert not torch.equal(other.model[6].weight, trained().net[6].weight)


def test_a_trainer_that_is_done_edits_no_other_module_and_says_so():
    forgetting = callback(continue_training=True)
    made = trainer(forgetting)
    made.fit(trained(), loader(False), loader(False))
    other = trained()
    with pytest.raises(UnlearnError, match="ended before the edit, as this trainer.*take a new Trainer"):
        made.fit(other, loader(False), loader(False))
    assert not changed(other, trained().state_dict()) and forgetting.report is None


# Other callbacks


def watched(folder: Path) -> list[pl.Callback]:
    """EarlyStopping, and one ModelCheckpoint by metric and one by time, each with its last checkpoint."""
    return [
        EarlyStopping(monitor="val_loss"),
        ModelCheckpoint(dirpath=folder / "best", monitor="val_loss", save_last=True),
        ModelCheckpoint(dirpath=folder / "linked", save_last="link"),
    ]


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_every_last_checkpoint_holds_the_edit_and_its_report(then, tmp_path):
    model, forgetting, others = trained(), callback(continue_training=then == "continue"), watched(tmp_path)
    trainer(*others, forgetting, enable_checkpointing=True).fit(model, loader(False), loader(False))
    assert (model.trained_batches == 0) == (then == "stop")
    for keeping in others[1:]:
        assert Path(keeping.last_model_path).name == "last.ckpt"
        kept = torch.load(keeping.last_model_path, weights_only=True)
        assert not changed(model, kept["state_dict"])
        (report,) = (state["report"] for name, state in kept["callbacks"].items() if name == "UnlearnCallback")
        assert report["patch_digest"] == forgetting.report.patch_digest


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_last_checkpoint_of_the_training_before_is_replaced(tmp_path):
    others = watched(tmp_path)[1:]
    trainer(*others, enable_checkpointing=True).fit(model := trained(), loader(False), loader(False))
    paths, before = [keeping.last_model_path for keeping in others], snapshot(model)
    forgetting = callback(retain_tolerance=20.0)
    trainer(*others, forgetting, enable_checkpointing=True).fit(model, loader(False), loader(False))
    assert changed(model, before) and [keeping.last_model_path for keeping in others] == paths
    for path in paths:
        assert not changed(model, weights_in(Path(path)))


@pytest.mark.parametrize("then", ["stop", "continue"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "averaging",
    [WeightAveraging, EMAWeightAveraging, functools.partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=1)],
)
def test_weight_averaging_is_refused(averaging, first, then):
    model, callbacks = trained(), [averaging(), callback(continue_training=then == "continue")]
    with pytest.raises(UnlearnError, match="WeightAveraging's weight averaging.*leave it out"):
        trainer(*(callbacks if first else callbacks[::-1])).fit(model, loader(False), loader(False))
    assert not changed(model, trained().state_dict())


# Language models: adapters, tied weights


class Words(pl.LightningModule):
    """A tiny language model of the transformers library; it knows two kinds of sentence."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model: Any = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=8, tie_word_embeddings=tied))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def sentences(forget: bool) -> DataLoader:
    """Sentences that go round in seven words of their own."""
    start = torch.arange(14)[:, None] % 7
    return DataLoader((start + torch.arange(6)) % 7 + (8 if forget else 0), batch_size=2)


def reader(**options: Any) -> Words:
    """A language model that has read them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words(**options)
        train(model, steps=60)
    return model


def train(model: Words, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = torch.cat([*sentences(True), *sentences(False)])
    for _ in range(steps):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()


def forgetting_words(**options: Any) -> UnlearnCallback:
    return unlearn_callback(sentences(True), sentences(False), forget_target=1.0, retain_tolerance=1e9, **options)


def adapted(trained_steps: int = 5) -> Words:
    """The same with LoRA adapters, which have read them once more."""
    from peft import LoraConfig, get_peft_model

    model = reader()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.model = get_peft_model(model.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
        train(model, trained_steps)
    return model


@pytest.mark.parametrize(
    ("layers", "edited"), [("*", "lora_"), ("*mlp.*base_layer*", "base_layer"), ("*.up_proj.weight", "up_proj")]
)
def test_of_a_model_with_adapters_these_are_edited_and_the_base_only_on_request(layers, edited):
    model, forgetting = adapted(), forgetting_words(layers=layers)
    before, trainable = snapshot(model), {name for name, p in model.named_parameters() if p.requires_grad}
    trainer(forgetting).fit(model, sentences(False))
    assert forgetting.report.status == "unlearned"
    assert all(edited in score["layer"] for score in forgetting.report.scores)
    assert changed(model, before) == set(forgetting.report.tensors) == {forgetting.report.layer}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert all("lora_" in name for name in trainable)
    forgetting.report.patch.revert(model)
    assert not changed(model, before)


def test_adapters_that_know_nothing_yet_are_refused_by_name():
    model = adapted(trained_steps=0)
    with pytest.raises(UnlearnError, match=r"layers: .*lora_B\.default\.weight.* hold only zeros.*train it first"):
        trainer(forgetting_words()).fit(model, sentences(False))


def test_a_base_that_is_frozen_as_a_whole_is_refused_unless_it_is_named():
    model = reader().requires_grad_(False)
    with pytest.raises(UnlearnError, match="layers: all 8 candidates are frozen"):
        trainer(forgetting_words()).fit(model, sentences(False))
    forgetting = forgetting_words(layers="model.model.*")
    trainer(forgetting).fit(model, sentences(False))
    assert forgetting.report.status == "unlearned" and not any(p.requires_grad for p in model.parameters())


def test_tied_weights_are_edited_once_and_stay_tied(tmp_path):
    model, embedding = reader(tied=True), "model.model.embed_tokens.weight"
    forgetting = forgetting_words(layers=embedding, output_dir=str(tmp_path))
    before = snapshot(model)
    trainer(forgetting).fit(model, sentences(False))
    assert [score["layer"] for score in forgetting.report.scores] == [embedding] == forgetting.report.tensors
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert changed(model, before) == {embedding, "model.lm_head.weight"}
    (edit,) = forgetting.report.patch.edits
    once = before[embedding] + edit.directions[embedding] * edit.step
    assert torch.equal(model.model.lm_head.weight, once)
    fresh = Words(tied=True)
    assert load_model(fresh, tmp_path / "weights.safetensors") == (set(), [])
    assert not changed(fresh, model.state_dict()) and fresh.model.lm_head.weight is fresh.model.model.embed_tokens.weight


# Compiled networks, late layers


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def as_compiled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("net.", "net._orig_mod."): tensor for name, tensor in weights.items()}


def test_a_compiled_network_is_edited_under_its_plain_names(tmp_path):
    plain, forgetting = trained(), callback()
    trainer(forgetting).fit(plain, loader(False), loader(False))
    model, compiled = Compiled(), callback(output_dir=str(tmp_path), layers="net.[046].weight")
    model.load_state_dict(as_compiled(trained().state_dict()))
    made = trainer(compiled)
    made.fit(model, loader(False), loader(False))
    report = compiled.report
    assert report.layer == forgetting.report.layer
    assert "_orig_mod" not in json.dumps(report.to_dict())
    assert load_model(fresh := Classifier(), tmp_path / "weights.safetensors") == (set(), [])
    other = trained()
    UnlearnPatch.load(tmp_path / "patch.safetensors").apply(other)
    assert not changed(other, fresh.state_dict()) and not changed(model, as_compiled(fresh.state_dict()))
    weights = snapshot(model)
    made.fit(model, loader(False), loader(False))
    assert compiled.report is report and not changed(model, weights)


def test_a_patch_of_a_plain_network_fits_a_compiled_one_and_its_weights():
    plain, forgetting = trained(), callback()
    trainer(forgetting).fit(plain, loader(False), loader(False))
    model, before = Compiled(), as_compiled(snapshot(trained()))
    model.load_state_dict(before)
    for target in (model, before):
        forgetting.report.patch.apply(target)
    assert not changed(model, as_compiled(plain.state_dict())) and not changed(model, before)
    forgetting.report.patch.revert(model)
    assert not changed(model, as_compiled(trained().state_dict()))


class Late(Classifier):
    """Its layers are made in `configure_model`, without memory, and get their weights there or from a checkpoint."""

    def __init__(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        del self.net
        self.weights = weights

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        with torch.device("meta"):
            self.net = Classifier().net
        assert self.net[0].weight.is_meta
        self.to_empty(device="cpu")
        if self.weights is not None:
            self.load_state_dict(self.weights)


def test_layers_that_are_made_late_are_edited():
    early, forgetting = trained(), callback()
    trainer(forgetting).fit(early, loader(False), loader(False))
    model, late = Late(trained().state_dict()), callback()
    trainer(late).fit(model, loader(False), loader(False))
    assert late.report.patch_digest == forgetting.report.patch_digest
    assert not changed(model, early.state_dict())


@pytest.mark.parametrize("late", [True, False])
def test_empty_layers_that_a_checkpoint_fills_are_edited(late, tmp_path):
    before = trainer()
    before.fit(kept := trained(), loader(False), loader(False))
    before.save_checkpoint(tmp_path / "trained.ckpt")
    forgetting = callback(retain_tolerance=20.0)
    made = trainer(forgetting, max_epochs=2)
    with made.init_module(empty_init=True):
        model = Late() if late else Classifier()
    made.fit(model, loader(False), loader(False), ckpt_path=tmp_path / "trained.ckpt")
    assert changed(model, kept.state_dict()) == set(forgetting.report.tensors) == {forgetting.report.layer}


# Precision


PRECISIONS = ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"]


@pytest.mark.parametrize("precision", sample(PRECISIONS, PRECISIONS[2:]))
def test_the_same_layer_is_edited_in_every_precision_and_keeps_its_type(precision, tmp_path):
    single, forgetting = trained(), callback(retain_tolerance=20.0)
    trainer(forgetting).fit(single, loader(False), loader(False))
    types = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    expected = types.get(precision, torch.float32)
    model, other = trained(), callback(retain_tolerance=20.0, output_dir=str(tmp_path))
    before = {name: tensor.to(expected) for name, tensor in trained().state_dict().items() if tensor.is_floating_point()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(other, precision=precision).fit(model, loader(False), loader(False))
    told = [str(warning.message) for warning in caught if "16-true" in str(warning.message)]
    assert len(told) == (precision == "16-true") and all("use 'bf16-mixed'" in text for text in told)
    assert other.report.status == "unlearned" and other.report.layer == forgetting.report.layer
    assert {p.dtype for p in model.parameters()} == {expected}
    edited = {name for name, tensor in before.items() if not torch.equal(model.state_dict()[name], tensor)}
    assert edited == set(other.report.tensors)
    patch = UnlearnPatch.load(tmp_path / "patch.safetensors")
    assert {tensor.dtype for tensor in patch.base.values()} == {expected}
    patch.revert(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# Flags, loggers, bars


@pytest.fixture
def _as_torch_was():
    """Some of Trainer's flags are torch's, for the whole process."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@functools.cache
def plainly_forgotten() -> tuple[UnlearnReport, dict[str, torch.Tensor]]:
    forgetting = callback()
    model = forgotten(forgetting)
    return forgetting.report, snapshot(model)


FLAGS = [
    {"accumulate_grad_batches": 3},
    {"gradient_clip_val": 1e-6},
    {"deterministic": True},
    {"benchmark": True},
    {"inference_mode": False},
    {"use_distributed_sampler": False},
    {"logger": True},
    {"logger": [TensorBoardLogger, CSVLogger]},
    {"logger": [CSVLogger, TensorBoardLogger]},
    {"enable_progress_bar": True, "callbacks": [RichProgressBar]},
    {"enable_progress_bar": True, "callbacks": [TQDMProgressBar]},
    {"num_sanity_val_steps": 2, "detect_anomaly": True, "val_check_interval": 2, "log_every_n_steps": 1},
    {"barebones": True},
]
LIKE_OTHERS = [
    {"accumulate_grad_batches": 3}, {"benchmark": True}, {"logger": True}, {"logger": [CSVLogger, TensorBoardLogger]},
    {"enable_progress_bar": True, "callbacks": [TQDMProgressBar]},
]  # fmt: skip


@pytest.mark.usefixtures("_as_torch_was")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log.*barebones")
@pytest.mark.parametrize("options", sample(FLAGS, [flags for flags in FLAGS if flags not in LIKE_OTHERS]), ids=", ".join)
def test_the_outcome_is_that_of_a_plain_trainer(options, tmp_path, capsys):
    report, weights = plainly_forgotten()
    options, forgetting, model = dict(options), callback(), trained()
    if isinstance(options.get("logger"), list):
        options["logger"] = [kind(tmp_path, name=kind.__name__) for kind in options["logger"]]
    bars = [kind() for kind in options.pop("callbacks", [])]
    if "barebones" in options:  # it allows none of what else the tests switch off
        made = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[forgetting], **options)
    else:
        made = trainer(forgetting, *bars, default_root_dir=tmp_path, **options)
    made.fit(model, loader(False), loader(False))
    assert (forgetting.report.layer, forgetting.report.step_size) == (report.layer, report.step_size)
    assert forgetting.report.trace == report.trace and forgetting.report.notes == report.notes
    assert not changed(model, weights)
    folders = sorted(path.parent for path in tmp_path.rglob("report.json"))
    assert [str(folder) for folder in folders] == ([made.loggers[0].log_dir] if made.loggers else [])
    for logger in made.loggers:
        kept = list(Path(logger.log_dir).glob("metrics.csv" if isinstance(logger, CSVLogger) else "events.out*"))
        assert kept and all(path.stat().st_size > 100 for path in kept)
    assert bool(bars) <= ("relative step" in capsys.readouterr().out)


# The same trainer afterwards


class Evaluated(Classifier):
    def test_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log_dict({"loss": cross_entropy(logits, batch[1]), "acc": (logits.argmax(1) == batch[1]).float().mean()})

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_the_trainer_measures_afterwards_what_the_report_says(then):
    data = UnlearnDataModule(part(True), part(False), batch_size=4)
    forgetting = unlearn_callback(
        forget_metric="val_loss",
        retain_metric=["val_loss", "val_acc"],
        retain_tolerance=20.0,
        continue_training=then == "continue",
    )
    model = trained(Evaluated)
    made = trainer(forgetting)
    made.fit(model, data)
    assert forgetting.report.status == "unlearned"
    if then == "continue":  # trained on since: what was reported is undone before it is measured
        model.load_state_dict(trained().state_dict())
        forgetting.report.patch.apply(model)
    for split, stated in (("val", forgetting.report.search_after), ("test", forgetting.report.after)):
        for kind in ("forget", "retain"):
            batches = getattr(data, f"{kind}_dataloader")(split)
            (validated,), (tested,) = (run(model, batches, verbose=False) for run in (made.validate, made.test))
            for name, value in stated[kind].items():
                assert validated[name] == pytest.approx(value, rel=1e-5)
                assert tested[name.removeprefix("val_")] == pytest.approx(value, rel=1e-5)
            logits = torch.cat(made.predict(model, batches))
            assert cross_entropy(logits, torch.cat([y for _, y in batches])).item() == pytest.approx(
                stated[kind]["val_loss"], rel=1e-5
            )

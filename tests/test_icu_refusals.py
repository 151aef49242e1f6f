"""What a fit with ICU refuses, how it ends early, and that it leaves nothing half done."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _forgetting import icu, language_model, passages, trainer
from _tiny_lm import tokenizer
from lightning.pytorch.callbacks import Callback

from _tiny import loader, trained
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.criteria import BleuBelow, MemorizationBelow
from slug_lightning.lm.losses import GradientAscent

MA, EL = "memorization_accuracy", "extraction_likelihood"


def test_validation_alone_needs_no_fit():
    callback = icu()
    (found,) = trainer(callback).validate(language_model(), passages(), verbose=False)
    assert found[MA] > 0.9 and callback.report is None


def test_a_second_fit_begins_anew():
    callback, module, data = icu(), language_model(), passages()
    trainer(callback, max_epochs=2).fit(module, data)
    first = callback.report
    trainer(callback, max_epochs=1).fit(module, data)
    assert [entry["epoch"] for entry in callback.report.trace] == [0, 1]
    assert callback.report.before["forget"] == first.after["forget"]


def test_a_fit_that_ends_early_is_unfinished():
    callback = icu()
    trainer(callback, max_epochs=1).fit(language_model(), passages())
    report = callback.report
    assert report.status == "unfinished" and "ended after 1 epoch" in report.reason
    assert len(report.trace) == 2 and any(passage["remembered"] for passage in report.passages)


def test_fast_dev_run_tries_everything_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = icu()
    trainer(callback, fast_dev_run=True, logger=True).fit(language_model(), passages())
    assert callback.report.status == "unfinished" and len(callback.report.trace) == 2
    assert list(tmp_path.iterdir()) == []


def test_without_logger_and_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(icu(), max_epochs=1).fit(language_model(), passages())
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_does_not_write_over_the_first(tmp_path):
    for _ in range(2):
        trainer(icu(output_dir=str(tmp_path / "run")), max_epochs=1).fit(language_model(), passages())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    assert all((path / "report.json").is_file() for path in tmp_path.iterdir())


class Failing(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("the disk is on fire")


def test_an_error_leaves_no_report_and_the_callback_can_be_used_again(tmp_path):
    callback, module = icu(output_dir=str(tmp_path / "run")), language_model()
    with pytest.raises(RuntimeError, match="on fire"):
        trainer(callback, Failing()).fit(module, passages())
    assert not (tmp_path / "run").exists()
    trainer(callback, max_epochs=1).fit(module, passages())
    assert callback.report.trace[0]["epoch"] == 0 and len(callback.report.trace) == 2


def test_divergence_is_said_in_words():
    module = language_model(loss=GradientAscent(), optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    with pytest.raises(UnlearnError, match="diverged; lower the learning rate"):
        trainer(icu(refine=False), max_epochs=3).fit(module, passages())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": {"nonsense": 0.1}}, "stop: unknown metric nonsense"),
        ({"stop": {MA: "unsen"}}, "stop: memorization_accuracy must be .* got 'unsen'"),
        ({"stop": {MA: math.nan}}, "stop: memorization_accuracy must be .* got nan"),
        ({"stop": {}, "refine": False}, "nothing would end"),
        ({"stop": {}, "forgotten": []}, "nothing would end"),
        ({"forgotten": [BleuBelow(0.1), BleuBelow(0.2)]}, "forgotten: two criteria"),
        ({"samples": -1}, "samples must be >= 0, got -1"),
        *(({name: 0}, f"{name} must be >= 1, got 0") for name in ("n", "prefixes", "batch_size")),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(UnlearnError, match=message):
        icu(**options)


class Bare(Callback):
    """Nothing was computed before it was refused."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise AssertionError("too late")


@pytest.mark.parametrize(
    ("callback", "module", "data", "message"),
    [
        ({}, {}, {"unseen": None}, "give it unseen="),
        ({"stop": {MA: 0.1}, "forgotten": [MemorizationBelow()]}, {}, {"unseen": None}, "give it unseen="),
        ({}, {"tokenizer": None}, {"tokenizer": tokenizer()}, "tokenizer: the module has none"),
        ({}, {"tokenizer": None}, {}, "tokenizer must be .* got None"),
    ],
)
def test_what_does_not_fit_together_is_refused(callback, module, data, message):
    with pytest.raises(UnlearnError, match=message):
        trainer(icu(**callback), Bare()).fit(language_model(**module), passages(**data))


@pytest.mark.parametrize("n", [14, 20])
def test_ngrams_longer_than_a_passage_are_refused(n):
    with pytest.raises(UnlearnError, match="14 tokens"):
        trainer(icu(n=n)).fit(language_model(), passages())


def test_other_modules_and_loaders_are_refused():
    with pytest.raises(UnlearnError, match="model must be a CausalLMModule, got"):
        trainer(icu()).fit(trained(), loader(True), loader(False))
    data = passages(tokenizer=tokenizer())
    data.setup()
    with pytest.raises(UnlearnError, match="fit with a PassageDataModule"):
        trainer(icu()).fit(language_model(), data.passages("forget"), data.passages("unseen"))


@pytest.mark.parametrize("options", [{"min_epochs": 3}, {"max_epochs": 0}, {"limit_train_batches": 0}])
def test_limits_that_would_train_on_or_never_begin_are_refused(options):
    with pytest.raises(UnlearnError, match="Trainer"):
        trainer(icu(), **options).fit(language_model(), passages())

"""What else a Trainer may be told, and what else may run in it: the outcome holds, or it is refused with the reason."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from _tiny import loader, part, trained, trainer
from slug_lightning import UnlearnError
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules.base import Chained, EveryFourth, First, _samples, resolve_loaders
from slug_lightning.retained import RetainCache


def callback(**options: Any) -> UnlearnCallback:
    return UnlearnCallback(**{"forget": loader(True, batch_size=4), "retain": loader(False, batch_size=4), **options})


def forgotten(callback: UnlearnCallback, model: Any = None, **options: Any) -> Any:
    """Fit, and give the model."""
    model = trained() if model is None else model
    trainer(callback, **options).fit(model, loader(False), loader(False))
    return model


# Limits


def mean_loss(batches: Any) -> float:
    """The loss that a trained classifier has on them, a mean over samples."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        return cross_entropy(trained().eval().net(x), y).item()


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
                "limit_val_batches=0: no val loop of Lightning's, but the search read the whole",
                "limit_test_batches=0: no test loop",
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
    own = resolve_loaders(forgetting.forget, forgetting.retain, None)
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
    data = {"forget": DataLoader(Stream(True), batch_size=4), "retain": loader(False)}
    with pytest.raises(UnlearnError, match=r"Trainer\(limit_val_batches=0.5\): the length of the forget loader.*number of"):
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


def test_a_retain_gradient_of_fewer_batches_is_not_used_again():
    cache, data = RetainCache(), {"forget": loader(True), "retain": loader(False)}
    model, reused = trained(), []
    for limit in (1, 1.0, 1.0):
        forgotten(callback(**data, retain_cache=cache, forget_target=1e6, max_evaluations=1), model, limit_train_batches=limit)
        reused.append(cache.reused)
    assert reused == [0, 0, 1]


def test_lengths_are_known_wherever_they_can_be():
    ten = DataLoader(torch.arange(10), batch_size=1)
    assert len(Chained([ten, First(ten, 3), First(ten, 30)])) == 23
    for turns in ({0, 1}, {2}, {3}):
        assert len(EveryFourth(ten, turns)) == len(list(EveryFourth(ten, turns)))
    with pytest.raises(TypeError):
        len(Chained([ten, DataLoader(Stream(True))]))


def test_a_limited_loader_is_known_by_its_source():
    data = {"train": loader(True), "val": Chained([loader(True), Chained([loader(False)])])}
    assert _samples({split: First(batches, 1) for split, batches in data.items()}) == _samples(data)
    assert len(_samples(data)) == 240

"""What an earlier version wrote is still read: its patch, its report, its checkpoint and its run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _callback import unlearn_callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

from _tiny import Classifier, blobs, changed, loader, trainer
from slug_lightning import UnlearnPatch, UnlearnReport
from slug_lightning.callbacks import UnlearnCallback

RUN = Path(__file__).parent / "written_before" / "classifier"
pytestmark = [
    pytest.mark.uncovered,
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`, callbacks used", "ignore:The loaded checkpoint was produced with Lightning"
    ),
]


def edited() -> Classifier:
    model = Classifier()
    model.load_state_dict(torch.load(RUN / "unlearned.ckpt", weights_only=True)["state_dict"])
    return model


def callback(**options: Any) -> UnlearnCallback:
    """The request of that run."""
    retain = loader(False, batch_size=16)
    return unlearn_callback(**{"forget": loader(True), "retain": retain, "retain_tolerance": 0.5, **options})


def test_a_patch_is_undone_and_applied_to_the_last_bit():
    model, patch, weights = edited(), UnlearnPatch.load(RUN / "patch.safetensors"), load_file(RUN / "weights.safetensors")
    patch.revert(model)
    assert changed(model, weights) == set(patch.base)
    patch.apply(model)
    assert not changed(model, weights)


def test_a_report_is_read_as_it_was_written():
    report, written = UnlearnReport.from_json(RUN / "report.json"), json.loads((RUN / "report.json").read_text())
    for trial in written["trace"]:
        trial["constraint_usage"] = trial.pop("damage")  # its name since then
    assert report.status == "unlearned" and report.to_dict() == written
    assert report.patch_digest == UnlearnPatch.load(RUN / "patch.safetensors").digest
    assert report.layer in report.to_text() and report.figures().keys() >= {"pareto", "trade_off"}


def test_the_request_in_a_checkpoint_is_recognised_and_nothing_is_edited_twice():
    model, forgetting = Classifier(), callback()
    trainer(forgetting).fit(model, loader(False), loader(False), ckpt_path=RUN / "unlearned.ckpt")
    assert not changed(model, edited().state_dict())
    assert forgetting.report == UnlearnReport.from_json(RUN / "report.json")


def test_another_request_than_that_in_a_checkpoint_is_edited():
    """Else the test before would pass whatever was asked."""
    model, forgetting = Classifier(), callback(retain_tolerance=0.4)
    trainer(forgetting).fit(model, loader(False), loader(False), ckpt_path=RUN / "unlearned.ckpt")
    assert forgetting.report != UnlearnReport.from_json(RUN / "report.json")


def test_one_more_concept_is_added_to_its_run_folder():
    model, patch = edited(), UnlearnPatch.load(RUN / "patch.safetensors")
    patch.revert(model)
    labels = blobs().tensors[1]
    zero = DataLoader(Subset(blobs(), (labels == 0).nonzero()[:, 0].tolist()), batch_size=16)
    kept = DataLoader(Subset(blobs(), (labels % 2 == 1).nonzero()[:, 0].tolist()), batch_size=16)
    forget = {"the forget set": loader(True), "class 0": zero}
    forgetting = callback(forget=forget, retain=kept, retain_tolerance=20.0, earlier=str(RUN))
    trainer(forgetting).fit(model, kept, kept)
    assert list(forgetting.report.concepts) == ["the forget set", "class 0"]
    assert {edit.digest for edit in patch.edits} < {edit.digest for edit in forgetting.report.patch.edits}

"""What a report says of its own limits, and how far an infeasible run came."""

from __future__ import annotations

import math

import pytest
import torch
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from _tiny import Classifier, fit, loader, part, trained
from slug_lightning.methods.caveats import upper_end


@given(st.integers(1, 200), st.data())
def test_a_share_within_its_interval_is_not_unlikely(samples, data):
    """The interval's end p solves |seen - p| = 1.96 standard errors at p, which is Wilson's definition."""
    seen = data.draw(st.integers(0, samples)) / samples
    end = upper_end(seen, samples)
    assert seen <= end + 1e-12 <= 1 + 1e-9
    assert abs(end - seen) == pytest.approx(1.96 * math.sqrt(max(end * (1 - end), 0.0) / samples), abs=1e-7)


def few(count):
    forget = DataLoader(torch.utils.data.Subset(part(True), range(count)), batch_size=4)
    callback = unlearn_callback(forget, loader(False), forget_metric="val_acc", retain_metric="val_acc", forget_target=0.25)
    fit(callback, trained())
    return callback.report


def test_few_samples_are_said_to_tell_little():
    notes = [note for note in few(12).notes if note.startswith("forget the forget set: of")]
    assert len(notes) == 1 and "a val_acc of 0.25 may be one of up to 0." in notes[0]


def test_a_loss_of_few_samples_is_no_share():
    callback = unlearn_callback(loader(True), loader(False))
    fit(callback, trained())
    assert not [note for note in callback.report.notes if "samples in the search" in note]


def test_what_a_frozen_backbone_leaves_is_said():
    module = trained(Classifier, frozen=True)
    module.net[6].requires_grad_(True)
    callback = unlearn_callback(loader(True), loader(False))
    fit(callback, module)
    assert [note for note in callback.report.notes if note.startswith("layers: 2 of 3 matrices and kernels are frozen; 1 may")]
    callback = unlearn_callback(loader(True), loader(False))
    fit(callback, trained())
    assert not [note for note in callback.report.notes if "frozen" in note]


def test_an_infeasible_run_says_how_far_the_furthest_came_and_what_would_have_been_enough():
    asked = {"forget_metric": "val_acc", "retain_metric": "val_acc", "forget_target": 0.0}
    callback = unlearn_callback(loader(True), loader(False), **asked, max_evaluations=1, layers="net.6.weight")
    fit(callback, trained())
    (trial,) = callback.report.trace
    text = " ".join(callback.report.to_text(width=400).split())
    assert callback.report.status == "infeasible"
    assert f"the furthest, net.6.weight at relative step 0.1000, comes to val_acc={trial['forget']:.4f} (target ≤" in text
    asked |= {"forget_metric": "val_loss", "forget_target": 30.0, "retain_metric": "val_loss", "retain_tolerance": 0.0}
    asked["layers"] = "net.0.weight"
    callback = unlearn_callback(loader(True), loader(False), **asked)
    fit(callback, trained())
    assert callback.report.status == "infeasible"
    text = " ".join(callback.report.to_text(width=400).split())
    (enough,) = [word.removeprefix("retain_tolerance=") for word in text.split() if word.startswith("retain_tolerance=")]
    asked["retain_tolerance"] = float(enough)
    callback = unlearn_callback(loader(True), loader(False), **asked)
    fit(callback, trained())
    assert callback.report.status == "unlearned"

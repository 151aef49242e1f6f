"""A report comes back from the processes that a launcher forks to the one that called it."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _callback import unlearn_callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from _tiny import changed, fit, loader, snapshot, trained, trainer
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.run_files import REPORT
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.trainer.report_transfer import ReportTransfer


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def launched_by(kind):
    return SimpleNamespace(launcher=kind.__new__(kind))


FORKED = launched_by(_MultiProcessingLauncher)


def report(concept="cats", patch=True):
    values = {"forget": {"loss": 0.1 + 0.2}, "retain": {"loss": float("inf")}}
    made = UnlearnReport("unlearned" if patch else "infeasible", concept, before=values)
    if patch:
        base, directions = {"w": torch.randn(2, 3).bfloat16()}, {"w": torch.randn(2, 3)}
        made.patch = UnlearnPatch(base, [Edit(concept, 1 / 3, directions, {"layer": "w"})])
        made.patch_digest = made.patch.digest
    return made


def test_what_is_left_is_fetched_once_with_its_patch_and_nothing_remains(tmp_path):
    box, left = ReportTransfer(), report()
    assert box.fetch() is None
    box.leave(left, FORKED)
    found = box.fetch()
    assert found.to_dict() == left.to_dict() and found.concept == "cats"
    assert found.patch.digest == left.patch.digest == found.patch_digest
    assert box.fetch() is None and not list(tmp_path.iterdir())


def test_a_report_without_a_patch_has_none_even_after_one_with():
    box = ReportTransfer()
    box.leave(report(), FORKED)
    box.leave(report("dogs", patch=False), FORKED)
    found = box.fetch()
    assert (found.concept, found.status, found.patch) == ("dogs", "infeasible", None)


def test_nobody_else_may_read_it(tmp_path):
    ReportTransfer().leave(report(), FORKED)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "strategy",
    [SingleDeviceStrategy(), DDPStrategy(), SimpleNamespace(), launched_by(_SubprocessScriptLauncher)],
    ids=["one device", "ddp", "no launcher", "subprocesses"],
)
def test_where_the_calling_process_runs_itself_nothing_is_left(strategy, tmp_path):
    box = ReportTransfer()
    box.leave(report(), strategy)
    assert box.fetch() is None and not list(tmp_path.iterdir())


def test_each_callback_has_its_own():
    one, other = ReportTransfer(), ReportTransfer()
    one.leave(report("cats"), FORKED)
    other.leave(report("dogs"), FORKED)
    assert (one.fetch().concept, other.fetch().concept) == ("cats", "dogs")


def test_half_a_report_is_none(monkeypatch):
    """A process that dies while it writes leaves nothing that could be taken for a report."""
    box = ReportTransfer()

    def half(path: Path, text: str) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        box.leave(report(), FORKED)
    assert box.fetch() is None


def callback():
    return unlearn_callback(forget=loader(True), retain=loader(False), retain_tolerance=0.05)


@pytest.mark.uncovered  # what forked processes measure is lost, and three runs take minutes on a busy machine
@pytest.mark.filterwarnings("ignore:.*already in scaled.*")
def test_after_forked_processes_the_caller_has_report_patch_and_edited_module(tmp_path, monkeypatch):
    # Lightning leaves its port in the environment, and a later fit would take it, free or not.
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    alone, forked = callback(), callback()
    plain, module = trained(), trained()
    fit(alone, plain)
    before = snapshot(module)
    made = trainer(forked, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    made.fit(module, loader(False), loader(False))
    found, wanted = forked.report, alone.report
    assert found is forked.report, "fetched once, and kept"
    assert found.status == "unlearned" and found.layer == wanted.layer
    assert found.step_size == pytest.approx(wanted.step_size, rel=1e-5)
    for name in ("bounds", "before", "search_before", "tensors", "holds"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert changed(module, before) == set(found.tensors)
    assert found.patch.digest == found.patch_digest
    found.patch.revert(module)
    assert not changed(module, before)
    alone.report.patch.revert(plain)
    assert not (tmp_path / REPORT).exists() and not [p for p in tmp_path.iterdir() if p.name.startswith("slug-lightning")]

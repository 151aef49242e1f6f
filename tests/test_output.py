"""What stays on disk: no run is written over another, and no file is half written."""

from __future__ import annotations

import pytest
import torch
from _amounts import examples
from _callback import unlearn_callback
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from _tiny import Classifier, changed, fit, loader, snapshot, trained
from slug_lightning.patches import patch as patch_module
from slug_lightning.reports.run_files import CHECKPOINT, MODEL, PATCH, REPORT, WEIGHTS, fresh_folder
from slug_lightning.trainer import run_folder as output
from slug_lightning.utils.files import atomic_write

KEPT = [REPORT, PATCH, CHECKPOINT, WEIGHTS, MODEL]


def test_a_path_that_is_free_is_taken_as_it_is(tmp_path):
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"
    assert fresh_folder(str(tmp_path / "run")) == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1").touch()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"


@pytest.mark.parametrize("name", KEPT)
def test_a_folder_with_any_file_of_a_run_is_passed_over(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run-2"


@examples(25)
@given(taken=st.dictionaries(st.integers(1, 6), st.sampled_from(KEPT)))
def test_it_is_the_first_number_without_a_run(taken, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for number, name in taken.items():
        folder = root / ("run" if number == 1 else f"run-{number}")
        folder.mkdir()
        (folder / name).touch()
    free = next(n for n in range(1, 9) if n not in taken)
    found = fresh_folder(root / "run")
    assert found.name == ("run" if free == 1 else f"run-{free}")
    assert not found.exists() or not any(found.iterdir())


def test_further_files_mark_a_folder_only_where_they_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert fresh_folder(tmp_path / "run").name == "run"
    assert fresh_folder(tmp_path / "run", "config.yaml").name == "run-2"


def test_asking_makes_nothing(tmp_path):
    fresh_folder(tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())


def test_a_dot_in_the_name_is_part_of_it(tmp_path):
    (tmp_path / "v1.0").mkdir()
    (tmp_path / "v1.0" / REPORT).touch()
    assert fresh_folder(tmp_path / "v1.0").name == "v1.0-2"


def test_the_working_folder_with_a_run_in_it_gives_one_beside_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / REPORT).touch()
    assert fresh_folder(".").resolve() == tmp_path / "here-2"


def test_a_patch_with_two_edits_along_one_direction_can_be_saved(tmp_path):
    along = {"w": torch.ones(2)}
    edits = [patch_module.Edit("a", 0.5, along), patch_module.Edit("b", 0.25, along)]
    patch = patch_module.UnlearnPatch({"w": torch.zeros(2)}, edits)
    patch.save(tmp_path / PATCH)
    assert patch_module.UnlearnPatch.load(tmp_path / PATCH).digest == patch.digest


@pytest.mark.parametrize("clean", [False, True])
def test_a_patch_that_cannot_be_saved_leaves_the_one_that_was_there_and_nothing_else(clean, tmp_path, monkeypatch):
    patch = patch_module.UnlearnPatch({"w": torch.ones(2)}, [patch_module.Edit("cats", 0.5, {"w": torch.ones(2)})])
    patch.save(tmp_path / PATCH)
    content = (tmp_path / PATCH).read_bytes()

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(patch_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        patch.save(tmp_path / PATCH)
    assert (tmp_path / PATCH).read_bytes() == content
    assert not clean or [p.name for p in tmp_path.iterdir()] == [PATCH]


def test_inside_the_file_has_another_name_and_outside_only_its_own(tmp_path):
    with atomic_write(tmp_path / "report.json") as part:
        part.write_text("new")
        assert part.parent == tmp_path and part.name != "report.json"
        assert not (tmp_path / "report.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("written", [None, "half"])
def test_a_failure_while_writing_leaves_what_was_there_and_no_half_file(error, before, written, tmp_path):
    path = tmp_path / "weights.safetensors"
    if before is not None:
        path.write_text(before)

    def write() -> None:
        with atomic_write(path) as part:
            if written is not None:
                part.write_text(written)
            raise error

    with pytest.raises(error):
        write()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_what_replaces_a_file_may_be_read_by_everybody(tmp_path):
    for name in ("a", "b"):
        with atomic_write(tmp_path / name) as part:
            part.write_text(name)
            part.chmod(0o600)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_the_part_of_a_run_that_was_killed_is_no_obstacle(tmp_path):
    (tmp_path / "report.json.part").write_text("half")
    with atomic_write(tmp_path / "report.json") as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "whole"


def test_two_that_write_the_same_file_at_the_same_time_leave_one_that_is_whole(tmp_path):
    path, folders = tmp_path / "kept", [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with atomic_write(path, folders[0]) as one:
        one.write_text("one")
        with atomic_write(path, folders[1]) as other:
            other.write_text("other")
            assert not path.exists()
        assert path.read_text() == "other"
    assert path.read_text() == "one" and not any(list(folder.iterdir()) for folder in folders)


def test_the_patches_of_an_earlier_run_are_those_of_what_it_has_forgotten(tmp_path):
    from slug_lightning.reports.run_files import earlier_edits, patch_of
    from slug_lightning.reports.several import JointReport
    from slug_lightning.reports.single import UnlearnReport

    def patch_for(name: str, step: float) -> patch_module.UnlearnPatch:
        return patch_module.UnlearnPatch({"w": torch.zeros(2)}, [patch_module.Edit(name, float(step), {"w": torch.ones(2)})])

    with pytest.raises(FileNotFoundError, match=r"earlier: no report\.json in"):
        earlier_edits(tmp_path)
    reports = {name: UnlearnReport("unlearned", name) for name in ("a b", "c/d")} | {"e": UnlearnReport("infeasible", "e")}
    JointReport("partly", reports).to_json(tmp_path / REPORT)
    with pytest.raises(FileNotFoundError, match="no patch at"):
        earlier_edits(tmp_path)
    made = {name: patch_for(name, step) for step, name in enumerate(("a b", "c/d"), start=1)}
    for name, patch in made.items():
        patch.save(patch_of(tmp_path, name))
    found = earlier_edits(tmp_path)
    assert {name: (report.concept, patch.digest) for name, (report, patch) in found.items()} == {
        name: (name, patch.digest) for name, patch in made.items()
    }
    UnlearnReport("unlearned", "f").to_json(tmp_path / REPORT)
    patch_for("f", 3).save(tmp_path / PATCH)
    assert earlier_edits(str(tmp_path))["f"][1].digest == patch_for("f", 3).digest
    UnlearnReport("infeasible", "f").to_json(tmp_path / REPORT)
    assert earlier_edits(tmp_path) == {}


# ---- a module that knows how its library wants its weights


class Saving(Classifier):
    problem: Exception | None = None

    def save_pretrained(self, folder):
        folder.mkdir()
        save_file(self.net.state_dict(), folder / "net.safetensors")
        if self.problem:
            raise self.problem


def forget(model, folder, **options):
    callback = unlearn_callback(loader(True), loader(False), retain_tolerance=0.05, output_dir=str(folder), **options)
    fit(callback, model)
    return callback.report


def test_it_writes_the_edited_weights_itself_and_there_is_no_second_copy(tmp_path):
    model, original = trained(Saving), trained()
    report = forget(model, tmp_path / "run")
    saved = load_file(tmp_path / "run" / MODEL / "net.safetensors")
    assert changed(original, {f"net.{name}": tensor for name, tensor in saved.items()}) == set(report.tensors) != set()
    assert not changed(model, {f"net.{name}": tensor for name, tensor in saved.items()})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {REPORT, PATCH, CHECKPOINT, MODEL, "figures"}


def test_nothing_is_written_of_a_model_that_was_not_edited(tmp_path):
    assert forget(trained(Saving), tmp_path / "run", forget_target=1e9, max_evaluations=2).status == "infeasible"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {REPORT, "figures"}


def test_if_it_fails_no_half_model_is_left_and_no_edit(tmp_path):
    model = trained(Saving)
    model.problem = OSError("no space left")
    before = snapshot(model)
    with pytest.raises(OSError, match="no space left"):
        forget(model, tmp_path / "run")
    assert not changed(model, before)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {PATCH}


def test_of_a_sharded_module_the_plain_weights_are_gathered_as_no_process_has_them_to_write():
    def saves_itself():
        torch.distributed.init_process_group("gloo")
        model = Saving()
        before = output._saves_itself(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        return before, output._saves_itself(model)

    assert in_processes(1, saves_itself) == [(True, False)]

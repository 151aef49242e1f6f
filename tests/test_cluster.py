"""The command line in several processes: one folder, one line, the exit code in each; and the config for clusters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _processes import in_processes
from safetensors.torch import load_file

import slug_lightning.cli.lightning  # noqa: F401 (here, not in each process)
from slug_lightning import UnlearnPatch
from slug_lightning.cli import main

pytestmark = pytest.mark.uncovered

CONFIG = Path(__file__).parent.parent / "configs" / "cluster.yaml"
HERE = ["--trainer.num_nodes", "1", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
"""As the config says itself: two processes on this machine."""
FILES = {"report.json", "patch.safetensors", "weights.safetensors", "unlearned.ckpt", "config.yaml", "figures"}
MINE = '''
from _tiny import Classifier, part, trained
from slug_lightning.datamodules import UnlearnDataModule


class Model(Classifier):
    """Somebody's model, in the working folder."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(trained().state_dict())


class Data(UnlearnDataModule):
    """Somebody's data."""

    def __init__(self) -> None:
        super().__init__(part(True), part(False), batch_size=16)
'''


@pytest.fixture
def tiny(tmp_path):
    """A config of somebody's, for two processes."""
    made = yaml.safe_load(CONFIG.read_text())
    made |= {"model": {"class_path": "mine_for_tests.Model"}, "data": {"class_path": "mine_for_tests.Data"}}
    made["trainer"] |= {"enable_progress_bar": False}
    (callback,) = made["trainer"]["callbacks"]
    callback["init_args"] = {"retain_tolerance": 0.5}
    (tmp_path / "mine_for_tests.py").write_text(MINE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(made))
    return tmp_path


def slug(**options: Any) -> dict[str, Any]:
    """The method of a config."""
    return {"class_path": "slug_lightning.methods.SLUG", "init_args": options}


def command(folder: Path, *args: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, what it printed, and its messages."""
    os.chdir(folder)
    sys.argv = ["slug-lightning", *args]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def fit(config: Path, *args: str, at: dict[str, Path] | None = None, timeout: float = 90) -> list[Any]:
    def in_one() -> tuple[int, str, str]:
        folder = (at or {}).get(os.environ["RANK"], config.parent)
        return command(folder, "fit", "--config", str(config), *HERE, *args)

    return in_processes(2, in_one, timeout=timeout)


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("unlearned: ", "infeasible: "))]


def test_two_processes_leave_one_folder_and_say_one_line(tiny):
    (tiny / "run").mkdir()
    (tiny / "run" / "report.json").touch()  # of another run
    (first, out, _), (second, other, _) = fit(tiny / "tiny.yaml", "--output_dir", "run")
    folder = tiny / "run-2"
    assert (first, second) == (0, 0)
    assert (lines(out), lines(other)) == ([f"unlearned: {folder}"], [])
    events = [path.name for path in folder.glob("events.out.tfevents.*")]
    assert {path.name for path in folder.iterdir()} - set(events) - {"hparams.yaml"} == FILES
    # Names end with host, process and number: of one process there may be two, as the hyperparameters have a writer of their own.
    assert len({event.removeprefix("events.out.tfevents.").split(".")[-2] for event in events}) == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == "run-2"
    assert json.loads((folder / "report.json").read_text())["status"] == "unlearned"
    (edited,) = UnlearnPatch.load(folder / "patch.safetensors").base
    saved = torch.load(folder / "unlearned.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(load_file(folder / "weights.safetensors")[edited], saved[edited])
    assert sorted(path.name for path in tiny.iterdir() if path.name.startswith("run")) == ["run", "run-2"]


def test_infeasible_is_3_in_both(tiny):
    config = yaml.safe_load((tiny / "tiny.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"] |= {"forget_target": 1e9, "method": slug(max_evaluations=1)}
    (tiny / "tiny.yaml").write_text(yaml.safe_dump(config))
    (first, out, _), (second, other, _) = fit(tiny / "tiny.yaml", "--output_dir", "run")
    assert (first, second) == (3, 3)
    assert (lines(out), lines(other)) == ([f"infeasible: {tiny / 'run'}"], [])
    assert json.loads((tiny / "run" / "report.json").read_text())["status"] == "infeasible"


def test_usage_is_2_in_both(tiny):
    config = yaml.safe_load((tiny / "tiny.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"] |= {"method": slug(layers="nothing.*")}
    (tiny / "tiny.yaml").write_text(yaml.safe_dump(config))
    for code, out, messages in fit(tiny / "tiny.yaml", "--output_dir", "run"):
        assert code == 2
        assert "layers: 'nothing.*' matches no parameter" in messages
        assert not lines(out)


def test_machines_with_disks_of_their_own_leave_the_folder_of_the_first(tiny):
    other = tiny / "other"
    (other / "run").mkdir(parents=True)
    (other / "run" / "report.json").touch()
    (other / "mine_for_tests.py").write_text(MINE)
    ends = fit(tiny / "tiny.yaml", "--output_dir", "run", at={"1": other})
    assert [code for code, *_ in ends] == [0, 0]
    assert {path.name for path in (tiny / "run").iterdir()} >= FILES
    assert [path.name for path in other.iterdir() if path.name.startswith("run")] == ["run"]


@pytest.mark.slow
def test_the_config_for_clusters_forgets_in_two_processes(tmp_path):
    made = yaml.safe_load(CONFIG.read_text())
    (callback,) = made["trainer"]["callbacks"]
    method = slug(layers="model.text_projection", max_evaluations=2)
    callback["init_args"] |= {"method": method, "retain_tolerance": 2.0}
    made["trainer"]["enable_progress_bar"] = False
    (tmp_path / CONFIG.name).write_text(yaml.safe_dump(made))
    (first, out, _), (second, other, _) = fit(tmp_path / CONFIG.name, "--output_dir", "run", timeout=280)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert first == second == {"unlearned": 0, "infeasible": 3}[report["status"]]
    assert (lines(out), lines(other)) == ([f"{report['status']}: {tmp_path / 'run'}"], [])
    assert any(note.startswith("2 ranks shared the batches") for note in report["notes"])


def torchrun(folder: Path, *args: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "slug_lightning.cli"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *args], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_torchrun_lets_success_through_and_names_the_exit_code_of_infeasible(tiny):
    args = ["fit", "--config", "tiny.yaml", *HERE, "--output_dir", "run"]
    done = torchrun(tiny, *args)
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == [f"unlearned: {tiny / 'run'}"]
    config = yaml.safe_load((tiny / "tiny.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"] |= {"forget_target": 1e9, "method": slug(max_evaluations=1)}
    (tiny / "tiny.yaml").write_text(yaml.safe_dump(config))
    done = torchrun(tiny, *args)
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr
    assert lines(done.stdout) == [f"infeasible: {tiny / 'run-2'}"]
    assert json.loads((tiny / "run-2" / "report.json").read_text())["status"] == "infeasible"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_config_for_clusters_runs_as_it_says(tmp_path):
    done = torchrun(tmp_path, "fit", "--config", str(CONFIG), *HERE, "--output_dir", "run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "unlearned" and report["holds"]
    assert report["after"]["forget"]["style_accuracy"] <= 0.2

"""The command line: exit codes, files, and help that answers at once."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from _tiny import changed, snapshot, trained
from slug_lightning import UnlearnPatch
from slug_lightning.cli import main
from slug_lightning.patch import Edit

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
ON_ONE_DEVICE = [config for config in CONFIGS if config.stem != "cluster"]  # test_cluster.py runs that


def run(*args: str) -> int:
    try:
        # As the process is started: Lightning warns where both the process and the call have arguments.
        with mock.patch.object(sys, "argv", ["slug-lightning", *map(str, args)]):
            return main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    "verb", [[], ["patch"], ["patch", "show"], ["patch", "apply"], ["patch", "revert"], ["patch", "combine"]]
)
def test_help_answers(verb, capsys):
    assert run(*verb, "--help") == 0
    assert "usage: slug-lightning" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = "import sys; from slug_lightning.cli import main\ntry: main(['patch', 'apply', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'lightning' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False False")


def test_help_of_fit_names_the_arguments_of_the_callback(capsys):
    assert run("fit", "--help") == 0
    assert "--output_dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [["nonsense"], ["patch"], ["patch", "show"], ["fit", "--config", "no-such.yaml"], ["fit", "--nonsense"]]
)
def test_wrong_usage_exits_with_2(args, capsys):
    assert run(*args) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_round_trips(config, capsys, tmp_path):
    assert run("fit", "--config", config, "--print_config") == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert run("fit", "--config", tmp_path / "again.yaml", "--print_config") == 0
    assert capsys.readouterr().out == printed
    assert "UnlearnCallback" in printed


def small(config: Path, folder: Path, **options) -> list[str]:
    """Arguments that run a shipped config as it is, but cheaply: one layer, few evaluations."""
    made = yaml.safe_load(config.read_text())
    (callback,) = (c for c in made["trainer"]["callbacks"] if c["class_path"].endswith("UnlearnCallback"))
    callback["init_args"] |= {"layers": "model.text_projection", "max_evaluations": 2, **options}
    made["trainer"]["enable_progress_bar"] = False
    path = folder / config.name
    path.write_text(yaml.safe_dump(made))
    return ["fit", "--config", str(path), "--output_dir", str(folder / "run")]


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:.*Checkpoint directory", "ignore:Found .* in eval mode"
)
@pytest.mark.parametrize("config", ON_ONE_DEVICE, ids=lambda path: path.name)
def test_every_config_runs_and_leaves_its_evidence(config, tmp_path, capsys):
    code = run(*small(config, tmp_path, retain_tolerance=2.0, forget_target=0.95))
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert code == {"unlearned": 0, "infeasible": 3}[report["status"]]
    assert list(folder.glob("events.out.tfevents.*")) and (folder / "config.yaml").exists()
    assert str(folder) in capsys.readouterr().out
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["output_dir"] == str(folder) and saved["seed_everything"] == 0
    if code == 0:
        assert {"patch.safetensors", "unlearned.ckpt", "weights.safetensors"} <= {path.name for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_infeasible_exits_with_3_and_a_bad_argument_with_2(tmp_path, capsys):
    config = ON_ONE_DEVICE[0]
    assert run(*small(config, tmp_path, forget_target=-1.0, max_evaluations=1)) == 3
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "infeasible"
    assert not (tmp_path / "run" / "patch.safetensors").exists()
    assert run(*small(config, tmp_path, layers="nothing.*")) == 2
    assert "layers: 'nothing.*' matches no parameter" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """A model's weights as safetensors and as a checkpoint, and two patches for it."""
    model = trained()
    save_file(snapshot(model), tmp_path / "base.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": snapshot(model), "epoch": 3}, tmp_path / "base.ckpt")
    for name, tensor in (("a", "net.6.weight"), ("b", "net.4.weight")):
        base = snapshot(model)[tensor]
        UnlearnPatch({tensor: base}, [Edit(name, 0.5, {tensor: torch.ones_like(base)})]).save(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_apply_and_revert_are_exact(files, kind):
    def tensors(path):
        return load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True)["state_dict"]

    base, new, back = files / f"base.{kind}", files / f"new.{kind}", files / f"back.{kind}"
    assert run("patch", "apply", files / "a.safetensors", base, new) == 0
    model = trained()
    UnlearnPatch.load(files / "a.safetensors").apply(model)
    assert not changed(model, tensors(new))
    assert run("patch", "revert", files / "a.safetensors", new, back) == 0
    assert not changed(trained(), tensors(back))
    half = files / f"half.{kind}"
    assert run("patch", "apply", files / "a.safetensors", base, half, "--strength", "0.5") == 0
    torch.testing.assert_close(tensors(half)["net.6.weight"], tensors(base)["net.6.weight"] + 0.25)


def test_combine_and_show(files, capsys):
    assert run("patch", "combine", files / "a.safetensors", files / "b.safetensors", "-o", files / "both.safetensors") == 0
    capsys.readouterr()
    assert run("patch", "show", files / "both.safetensors") == 0
    shown = json.loads(capsys.readouterr().out)
    assert sorted(edit["concept"] for edit in shown["edits"]) == ["a", "b"]
    assert sorted(shown["tensors"]) == ["net.4.weight", "net.6.weight"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["apply", "a.safetensors", "base.safetensors", "base.ckpt"], "output: .* exists"),
        (["apply", "a.safetensors", "a.safetensors", "new.safetensors"], "no such tensor"),
        (["apply", "a.safetensors", "none.safetensors", "new.safetensors"], "no weights at"),
        (["apply", "base.safetensors", "base.safetensors", "new.safetensors"], "not a patch"),
        (["revert", "a.safetensors", "base.safetensors", "new.safetensors"], "not applied"),
        (["combine", "a.safetensors", "a.safetensors", "-o", "new.safetensors"], "occurs twice"),
        (["show", "none.safetensors"], "no patch at"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_is_written(files, args, message, capsys, monkeypatch):
    import re

    monkeypatch.chdir(files)
    assert run("patch", *args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (files / "new.safetensors").exists()

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
from slug_lightning.patches.edit import Edit
from slug_lightning.reports.run_files import PATCH

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# test_cluster.py, test_icu_cli.py, test_diffusion_cli.py and test_embedded_vlm.py run the others
ON_ONE_DEVICE = [c for c in CONFIGS if c.stem not in ("cluster", "icu", "stable_diffusion", "unlearn_canvas", "vlm")]
# One of them always: they differ in what is asked, which the tests of a tiny model ask, too.
WHOLE = [pytest.param(c, marks=() if c.stem == "demo" else pytest.mark.slow) for c in ON_ONE_DEVICE]


def run(*args: str) -> int:
    try:
        # As the process is started: Lightning warns where both the process and the call have arguments.
        with mock.patch.object(sys, "argv", ["slug-lightning", *map(str, args)]):
            return main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    "verb", [[], ["collect"], ["patch"], *(["patch", name] for name in ("show", "apply", "revert", "adjust", "combine"))]
)
def test_help_answers(verb, capsys):
    assert run(*verb, "--help") == 0
    assert "usage: slug-lightning" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = "import sys; from slug_lightning.cli import main\n"
    code += "try: main(['patch', 'apply', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'lightning' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False False")


def test_help_of_fit_names_the_arguments_of_the_callback(capsys):
    assert run("fit", "--help") == 0
    assert "--output_dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        *(["nonsense"], ["patch"], ["patch", "show"], ["patch", "adjust", "a", "b", "c"]),
        *(["fit", "--config", "no-such.yaml"], ["fit", "--nonsense"]),
    ],
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
    assert "UnlearnCallback" in printed or "ICUCallback" in printed


def test_directions_that_compete_stay_a_list_in_the_config(capsys, tmp_path):
    object_of_ours = "{class_path: slug_lightning.methods.slug.directions.Covariance, init_args: {damping: 0.5}}"
    given = f"--trainer.callbacks.init_args.method.init_args.direction=[{object_of_ours}, gradient]"
    assert run("fit", "--config", next(path for path in CONFIGS if path.name == "thing.yaml"), given, "--print_config") == 0
    printed = capsys.readouterr()
    (tmp_path / "again.yaml").write_text(printed.out)
    assert run("fit", "--config", tmp_path / "again.yaml", "--print_config") == 0
    again = capsys.readouterr().out
    assert again == printed.out and "Unable to serialize" not in printed.out + printed.err
    (callback,) = yaml.safe_load(again)["trainer"]["callbacks"]
    (first, second) = callback["init_args"]["method"]["init_args"]["direction"]
    assert first["init_args"] == {"damping": 0.5} and second == "gradient"


def small(config: Path, folder: Path, **options) -> list[str]:
    """Arguments that run a shipped config as it is, but cheaply: one line of one layer, few evaluations, one strength."""
    made = yaml.safe_load(config.read_text())
    (callback,) = (c for c in made["trainer"]["callbacks"] if c["class_path"].endswith("UnlearnCallback"))
    given = callback["init_args"]
    if "retain_cache" in given.get("runtime", {}):
        given["runtime"]["retain_cache"] = str(folder / "retain")
    method = {"class_path": "slug_lightning.methods.SLUG", "init_args": {}} | given.get("method", {})
    method["init_args"] |= {"layers": "model.text_projection", "curve": "line", "max_evaluations": 2}
    given |= {"method": method, "scales": [0.5], **options}
    made["trainer"]["enable_progress_bar"] = False
    path = folder / config.name
    path.write_text(yaml.safe_dump(made))
    return ["fit", "--config", str(path), "--output_dir", str(folder / "run")]


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:.*Checkpoint directory", "ignore:Found .* in eval mode"
)
@pytest.mark.parametrize("config", WHOLE, ids=lambda path: path.name)
def test_every_config_runs_and_leaves_its_evidence(config, tmp_path, capsys):
    code = run(*small(config, tmp_path, retain_tolerance=2.0, forget_target=0.7))
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert code == {"unlearned": 0, "infeasible": 3, "partly": 4}[report["status"]]
    assert list(folder.glob("events.out.tfevents.*")) and (folder / "config.yaml").exists()
    assert str(folder) in capsys.readouterr().out
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["output_dir"] == str(folder) and saved["seed_everything"] == 0
    if code in (0, 4):
        assert {"patch.safetensors", "unlearned.ckpt", "weights.safetensors"} <= {path.name for path in folder.iterdir()}


@pytest.fixture
def files(tmp_path):
    """A model's weights as safetensors and as a checkpoint, and three patches for it."""
    model = trained()
    save_file(snapshot(model), tmp_path / "base.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": snapshot(model), "epoch": 3}, tmp_path / "base.ckpt")
    for name, tensor, step in (("a", "net.6.weight", 0.5), ("b", "net.4.weight", 0.5), ("c", "net.6.weight", 0.1)):
        base = snapshot(model)[tensor]
        UnlearnPatch({tensor: base}, [Edit(name, step, {tensor: torch.ones_like(base)})]).save(tmp_path / f"{name}.safetensors")
    return tmp_path


KINDS = pytest.mark.parametrize("kind", ["safetensors", "ckpt"])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]


def act(verb: str, patch: Path, weights: Path, output: str, *more: str) -> Path:
    """Run one verb on weights; gives the new ones, in the same format."""
    made = weights.with_name(output + weights.suffix)
    assert run("patch", verb, patch, weights, made, *more) == 0
    return made


@KINDS
def test_apply_and_revert_are_exact(files, kind):
    base, patch = files / f"base.{kind}", files / "a.safetensors"
    new = act("apply", patch, base, "new")
    model = trained()
    UnlearnPatch.load(patch).apply(model)
    assert not changed(model, tensors(new))
    assert not changed(trained(), tensors(act("revert", patch, new, "back")))
    half = act("apply", patch, base, "half", "--strength", "0.5")
    torch.testing.assert_close(tensors(half)["net.6.weight"], tensors(base)["net.6.weight"] + 0.25)


def patched(patches: list[tuple[Path, float]]) -> torch.nn.Module:
    model = trained()
    for patch, strength in patches:
        UnlearnPatch.load(patch).apply(model, strength)
    return model


@KINDS
def test_patches_come_and_go_in_any_order_by_the_file_beside_the_weights(files, kind, capsys):
    a, b, c = (files / f"{name}.safetensors" for name in "abc")
    weights = act("apply", a, files / f"base.{kind}", "one", "--strength", "0.3")
    weights = act("apply", c, weights, "two", "--strength", "-0.7")
    assert not changed(patched([(c, -0.7), (a, 0.3)]), tensors(weights))
    weights = act("apply", b, weights, "three")
    weights = act("adjust", a, weights, "four", "--strength", "2")
    weights = act("revert", b, weights, "five")
    assert {"a (strength 2)", "c (strength -0.7)"} == set(
        capsys.readouterr().out.strip().split("applied to it: ")[-1].split(", ")
    )
    assert not changed(patched([(c, -0.7), (a, 2.0)]), tensors(weights))
    beside = UnlearnPatch.load(files / "five.patches.safetensors")
    assert {edit.concept: edit.strength for edit in beside.edits} == {"a": 2.0, "c": -0.7}
    weights = act("revert", c, act("revert", a, weights, "six"), "seven")
    assert capsys.readouterr().out.rstrip().endswith("applied to it: nothing known")
    assert not changed(trained(), tensors(weights))
    assert not (files / "seven.patches.safetensors").exists()


@KINDS
def test_a_file_beside_the_weights_that_is_not_theirs_is_refused(files, kind, capsys):
    one = act("apply", files / "a.safetensors", files / f"base.{kind}", "one", "--strength", "0.5")
    beside = files / "one.patches.safetensors"
    for wrong in ("b.safetensors", f"one.{kind}"):
        beside.write_bytes((files / wrong).read_bytes())
        assert run("patch", "apply", files / "b.safetensors", one, files / f"two.{kind}") == 2
        assert "one.patches.safetensors does not belong to" in capsys.readouterr().err
    beside.unlink()
    assert run("patch", "revert", files / "a.safetensors", one, files / f"two.{kind}") == 2
    assert "something else changed it since" in capsys.readouterr().err
    assert not changed(trained(), tensors(act("revert", files / "a.safetensors", one, "back", "--strength", "0.5")))


@KINDS
def test_in_the_folder_of_a_run_its_patch_says_what_is_applied(files, kind):
    """`weights.safetensors` and `patch.safetensors`, as `save_run` calls them, and other weights in the same folder."""
    patch = UnlearnPatch.combine([UnlearnPatch.load(files / f"{name}.safetensors") for name in "ac"])
    patch.save(files / PATCH)
    weights = act("apply", files / "b.safetensors", files / f"base.{kind}", "other")
    made = act("apply", files / PATCH, files / f"base.{kind}", "weights")
    (files / "weights.patches.safetensors").unlink()
    weights = act("revert", files / "c.safetensors", made, "less")  # content alone would not tell it
    assert not changed(patched([(files / "a.safetensors", 1.0)]), tensors(weights))


def test_weights_and_what_is_applied_to_them_are_written_both_or_neither(files, monkeypatch):
    before = {path.name for path in files.iterdir()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(UnlearnPatch, "save", fail)
    assert run("patch", "apply", files / "a.safetensors", files / "base.ckpt", files / "new.ckpt") == 2
    assert {path.name for path in files.iterdir()} == before


def test_combine_and_show(files, capsys):
    assert run("patch", "combine", files / "a.safetensors", files / "b.safetensors", "-o", files / "both.safetensors") == 0
    capsys.readouterr()
    assert run("patch", "show", files / "both.safetensors") == 0
    shown = json.loads(capsys.readouterr().out)
    assert sorted(edit["concept"] for edit in shown["edits"]) == ["a", "b"]
    assert sorted(shown["tensors"]) == ["net.4.weight", "net.6.weight"]
    assert [(edit["strength"], edit["parents"]) for edit in shown["edits"]] == [(1.0, []), (1.0, [])]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["apply", "a.safetensors", "base.safetensors", "base.ckpt"], "output: .* exists"),
        (["apply", "a.safetensors", "a.safetensors", "new.safetensors"], "no such tensor"),
        (["apply", "a.safetensors", "none.safetensors", "new.safetensors"], "no weights at"),
        (["apply", "base.safetensors", "base.safetensors", "new.safetensors"], "not a patch"),
        (["apply", "a.safetensors", "base.safetensors", "old.safetensors"], "old.patches.safetensors exists"),
        (
            ["apply", "a.safetensors", "base.safetensors", "new.safetensors", "--strength", "nan"],
            "strength must be finite, got nan",
        ),
        (["revert", "a.safetensors", "base.safetensors", "new.safetensors"], "not applied"),
        (["adjust", "a.safetensors", "base.safetensors", "new.safetensors", "--strength", "2"], "not applied"),
        (["combine", "a.safetensors", "a.safetensors", "-o", "new.safetensors"], "occurs twice"),
        (["show", "none.safetensors"], "no patch at"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_is_written(files, args, message, capsys, monkeypatch):
    import re

    monkeypatch.chdir(files)
    Path("old.patches.safetensors").touch()
    assert run("patch", *args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (files / "new.safetensors").exists()


# ---- a tiny model, and one more concept beside those of an earlier run

TINY = """
import torch
from torch.utils.data import Subset
from _tiny import Classifier, blobs, trained
from slug_lightning.datamodules import UnlearnDataModule


class Trained(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(trained().state_dict())


class Data(UnlearnDataModule):
    def __init__(self, concepts: dict[str, int], kept: int = 0) -> None:
        super().__init__(batch_size=16)
        self.chosen, self.kept = concepts, kept

    def setup(self, stage: str) -> None:
        labels = blobs().tensors[1]
        for name, label in self.chosen.items():
            self.set_parts("forget", Subset(blobs(), (labels == label).nonzero()[:, 0].tolist()), concept=name)
        self.set_parts("retain", Subset(blobs(), (labels == self.kept).nonzero()[:, 0].tolist()))
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config of two concepts of a tiny model, in the working folder."""
    (tmp_path / "tiny_for_cli.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    method = {"class_path": "slug_lightning.methods.SLUG", "init_args": {"step_margin": 2.0}}
    callback = {"retain_tolerance": 1e5, "method": method, "runtime": {"retain_cache": str(tmp_path / "kept")}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    config = {
        "model": {"class_path": "tiny_for_cli.Trained"},
        "data": {"class_path": "tiny_for_cli.Data", "init_args": {"concepts": {"one": 1, "two": 2}}},
        "output_dir": str(tmp_path / "run"),
        "trainer": {
            **quiet, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "callbacks": [{"class_path": "slug_lightning.callbacks.UnlearnCallback", "init_args": callback}],
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    yield tmp_path / "config.yaml"
    sys.modules.pop("tiny_for_cli", None)


@pytest.fixture
def earlier(tiny):
    """The folder of a run that forgot both."""
    assert run("fit", "--config", tiny) == 0
    return tiny.parent / "run"


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_infeasible_exits_with_3_and_a_bad_argument_with_2(tiny, capsys):
    callback = "--trainer.callbacks.init_args."
    assert run("fit", "--config", tiny, f"{callback}forget_target", "1e9", f"{callback}method.max_evaluations", "1") == 3
    assert json.loads((tiny.parent / "run" / "report.json").read_text())["status"] == "infeasible"
    assert not (tiny.parent / "run" / "patch.safetensors").exists()
    assert run("fit", "--config", tiny, f"{callback}method.layers", "nothing.*") == 2
    assert "layers: 'nothing.*' matches no parameter" in capsys.readouterr().err


def another(folder: Path, name: str, label: int, *more: str) -> int:
    new = {"class_path": "tiny_for_cli.Data", "init_args": {"concepts": {name: label}}}
    return run("forget-another", "--run", folder, "--forget", json.dumps(new), *more)


def test_one_more_concept_is_forgotten_beside_those_of_an_earlier_run_or_exits_with_4(earlier, capsys):
    first = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    assert another(earlier, "three", 3) == 0
    beside = earlier.with_name("run-2")
    assert f"unlearned: {beside}" in capsys.readouterr().out
    report = json.loads((beside / "report.json").read_text())
    assert list(report["concepts"]) == ["one", "two", "three"]
    assert any(note.startswith("retain: gradient taken from") for note in report["notes"])
    old, new = UnlearnPatch.load(earlier / PATCH), UnlearnPatch.load(beside / PATCH)
    assert {edit.digest for edit in old.edits} < {edit.digest for edit in new.edits} and len(new.edits) == 3
    model = trained()
    new.apply(model)
    assert not changed(model, load_file(beside / "weights.safetensors"))
    assert list(beside.glob("events.out.tfevents.*")) and (beside / "config.yaml").exists()
    too_much = ("--trainer.callbacks.method.max_evaluations", "1", "--trainer.callbacks.forget_target", "1e6")
    assert another(earlier, "three", 3, *too_much) == 4
    report = json.loads((earlier.with_name("run-3") / "report.json").read_text())
    assert report["status"] == "partly" and report["concepts"]["three"]["status"] == "infeasible"
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == first


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_wrong_usage_of_forget_another_exits_with_2(earlier, tmp_path, capsys):
    assert another(tmp_path / "none", "three", 3) == 2
    assert "run: no config.yaml in" in capsys.readouterr().err
    assert run("forget-another", "--run", earlier) == 2
    assert "forget" in capsys.readouterr().err
    assert run("forget-another", "--forget", "EmojiDataModule") == 2
    assert another(earlier, "two", 2) == 2
    assert "has forgotten all of this" in capsys.readouterr().err
    (earlier / "report.json").unlink()
    assert another(earlier, "three", 3) == 2
    assert "no report.json in" in capsys.readouterr().err


def test_help_of_forget_another_says_how_to_use_it(capsys):
    assert run("forget-another", "--help") == 0
    assert "--run RUN" in (said := capsys.readouterr().out) and "--forget EmojiDataModule" in said


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_run_that_added_a_concept_can_be_added_to_with_the_data_that_it_named(tiny):
    assert run("fit", "--config", tiny, "--data.init_args.concepts", '{"one": 1}') == 0
    assert another(tiny.parent / "run", "two", 2) == 0
    assert another(tiny.parent / "run-2", "three", 3) == 0
    report = json.loads((tiny.parent / "run-2-2" / "report.json").read_text())
    assert list(report["concepts"]) == ["one", "two", "three"]

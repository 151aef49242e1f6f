"""ICU from a config: exit codes, files and help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from _forgetting import N
from _tiny_lm import KEPT, PREFIX, RECITED, SUFFIX, UNSEEN, reciting, tokenizer
from test_cli import run

pytestmark = pytest.mark.uncovered


@pytest.fixture
def config(tmp_path):
    """A config as users write it, of a model and texts in files."""
    reciting().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, texts in (("forget", RECITED), ("keep", KEPT), ("unseen", UNSEEN)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    model = {
        "model": str(tmp_path / "model"),
        "loss": {"class_path": "slug_lightning.lm.losses.ICU", "init_args": {"learn": 1.0}},
    }
    texts = {name: str(tmp_path / f"{name}.txt") for name in ("forget", "keep", "unseen")}
    criterion = {"class_path": "slug_lightning.lm.criteria.BleuBelow", "init_args": {"below": 0.05}}
    callback = {"n": N, "forgotten": [criterion], "stop": {"memorization_accuracy": 0.3, "extraction_likelihood": "unseen"}}
    return {
        "model": {"class_path": "slug_lightning.modules.CausalLMModule", "init_args": model | {"optimizer": optimizer}},
        "data": {
            "class_path": "slug_lightning.datamodules.PassageDataModule",
            "init_args": texts | {"prefix": PREFIX, "suffix": SUFFIX, "batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 20,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "slug_lightning.callbacks.ICUCallback", "init_args": callback}],
        },
        "output_dir": str(tmp_path / "run"),
    }


def fit(config: dict[str, Any], *args: str) -> int:
    path = Path(config["output_dir"]).with_name("config.yaml")
    path.write_text(yaml.safe_dump(config))
    return run("fit", "--config", path, *args)


def test_a_config_forgets(config, capsys):
    assert fit(config) == 0
    folder = Path(config["output_dir"])
    assert f"unlearned: {folder}" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert report["bounds"] == {"bleu": 0.05} and report["thresholds"]["memorization_accuracy"] == 0.3
    assert list(folder.glob("events.out.tfevents.*"))
    assert {"config.yaml", "figures", "model", "report.json", "unlearned.ckpt"} <= {path.name for path in folder.iterdir()}
    assert run("fit", "--config", folder / "config.yaml", "--output_dir", folder.with_name("again")) == 0
    again = json.loads((folder.with_name("again") / "report.json").read_text())
    assert [entry | {"other_perplexity": None} for entry in again["trace"]] == [
        entry | {"other_perplexity": None} for entry in report["trace"]
    ]


def test_epochs_that_are_too_few_exit_with_3(config, capsys):
    assert fit(config, "--trainer.max_epochs", "1") == 3
    assert "unfinished: " in capsys.readouterr().out


@pytest.mark.parametrize("args", [("--trainer.max_epochs", "0"), ("--data.prefix", "600"), ("--data.unseen", "null")])
def test_what_cannot_work_exits_with_2(config, args, capsys):
    assert fit(config, *args) == 2
    assert "slug-lightning: " in capsys.readouterr().err


def test_help_names_the_arguments(capsys):
    assert run("fit", "--trainer.callbacks.help", "slug_lightning.callbacks.ICUCallback") == 0
    shown = capsys.readouterr().out
    for name in ("forgotten", "refine", "stop", "n", "prefixes", "samples", "batch_size", "output_dir"):
        assert f".{name} " in shown


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.slow
def test_the_shipped_config_runs_and_leaves_its_evidence(tmp_path):
    made = yaml.safe_load((Path(__file__).parent.parent / "configs" / "icu.yaml").read_text())
    made["data"]["init_args"] |= {"passages": 3, "unseen": 2, "neighbours": 2}
    made["trainer"] |= {"max_epochs": 2, "limit_val_batches": 1, "enable_progress_bar": False}
    made["output_dir"] = str(tmp_path / "run")
    assert fit(made) == 3  # two epochs are too few
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "unfinished" and report["before"]["forget"]["memorization_accuracy"] > 0.95
    assert report["after"]["forget"]["perplexity"] > report["before"]["forget"]["perplexity"]
    assert {"model", "figures", "unlearned.ckpt", "config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}

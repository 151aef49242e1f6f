"""What a user installs: the wheel from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, as two processes of a test run would build in the same place.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_all_that_the_source_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "slug_lightning").rglob("*.py")}
    modules |= {
        f"slug_lightning/{p.relative_to(ROOT)}" for d in ("callbacks", "datamodules", "configs") for p in (ROOT / d).rglob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == modules
    assert {f"slug_lightning/configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")} <= set(names)
    data = {"emoji.tar", "unseen.tar", "SOURCES.md"}
    data |= {"clip/open_clip_model.safetensors", "clip/tokenizer.json", "clip/open_clip_config.json"}
    data |= {f"vlm/{name}" for name in ("model.safetensors", "config.json", "processor_config.json", "chat_template.jinja")}
    data |= {f"lm/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "passages.jsonl")}
    canvas = ROOT / "slug_lightning" / "embedded" / "canvas"
    data |= {f"canvas/{p.relative_to(canvas)}" for p in canvas.rglob("*") if p.is_file()}
    assert {f"slug_lightning/embedded/{name}" for name in data} <= set(names)
    assert "slug_lightning/py.typed" in names
    assert not any(name.startswith(("tests/", "callbacks/", "datamodules/", "configs/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import slug_lightning.callbacks, slug_lightning.datamodules, slug_lightning.configs, slug_lightning.modules as m;"
        "m.EmbeddedClip(); m.EmbeddedLM(); m.EmbeddedCanvas(); m.EmbeddedVLM(); print(slug_lightning.callbacks.__file__)"
    )
    # Before the editable install of the source on the path.
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout


def test_data_and_weights_stay_small():
    embedded = ROOT / "slug_lightning" / "embedded"
    assert (embedded / "emoji.tar").stat().st_size <= 10 * 2**20
    assert (embedded / "clip" / "open_clip_model.safetensors").stat().st_size <= 15 * 2**20
    assert sum(p.stat().st_size for p in (embedded / "canvas").rglob("*") if p.is_file()) <= 25 * 2**20
    assert sum(p.stat().st_size for p in (embedded / "vlm").iterdir()) <= 25 * 2**20

"""Does another checkout of this repository give the same answers, bit for bit?

    git worktree add ../before COMMIT
    python benchmarks/same_answers.py ../before                     # every config that needs no download: about 25 minutes
    python benchmarks/same_answers.py ../before --only demo cluster

Both checkouts run with the packages that are installed here. Of each case the exit code, the report
without its costs, versions and notes, the patch's tensors and digest, the edited weights and the checkpoint's
state are compared. Configs of SLUG run with the published procedure, without margin and near data, which is to stay as it
was; `--as-configured` leaves them as they are. This code also reads what the other has written: its patches load, a request is
added to its run, and a fit resumed from its checkpoint edits nothing. The exit code is 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from slug_lightning import UnlearnPatch
from slug_lightning.methods import SLUG
from slug_lightning.tensors.bits import bitwise_equal

HERE = Path(__file__).parent.parent
ANOTHER = '{"class_path": "slug_lightning.datamodules.EmojiDataModule", "init_args": {"thing": "dog"}}'
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571"]
HOST = ["--trainer.num_nodes", "1", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
CASES: dict[str, list[str]] = {
    "demo": ["fit", "--config", "{configs}/demo.yaml"],
    "thing": ["fit", "--config", "{configs}/thing.yaml"],
    "several": ["fit", "--config", "{configs}/several.yaml"],
    "icu": ["fit", "--config", "{configs}/icu.yaml"],
    "vlm": ["fit", "--config", "{configs}/vlm.yaml"],
    "vlm-clip": ["fit", "--config", "{configs}/vlm.yaml", "--model.route", "clip"],  # its name in 0.1, too
    "unlearn_canvas": ["fit", "--config", "{configs}/unlearn_canvas.yaml"],
    "cluster": ["fit", "--config", "{configs}/cluster.yaml", *HOST],
    "another": ["forget-another", "--run", "{runs}/several", "--forget", ANOTHER],
}
KEPT = {"layers", "granularity", "max_evaluations"}
"""Options of SLUG that a config keeps."""
UNLIKE = {"cost", "versions", "notes", "forget_targets"}
"""Parts of a report that no two runs have in common, its prose, and what earlier code did not write."""
NOTHING = "nothing"


def as_published(configs: Path, knows_presets: bool) -> None:
    """Let every config of SLUG ask for the published procedure; earlier code has no other, but for the margin."""
    for path in configs.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        for callback in config.get("trainer", {}).get("callbacks", []):
            if not callback["class_path"].endswith(".UnlearnCallback"):
                continue
            options = callback["init_args"]
            if isinstance(asked := options.get("forget_metric"), list):  # other wordings came later
                options["forget_metric"] = asked[0]
            own = options.get("method", {}).get("init_args", {})
            rules: dict[str, Any] = {"step_margin": 0.0}
            if knows_presets:
                rules = {name: value for name, value in vars(SLUG.paper()).items() if name not in KEPT}
                options["near_retain"] = None
            options["method"] = {"class_path": "slug_lightning.methods.SLUG", "init_args": {**own, **rules}}
        path.write_text(yaml.safe_dump(config))


def site_of(checkout: Path, folder: Path, published: bool = True) -> Path:
    """The packages of a checkout as they are installed, without what `pip install --editable` adds to the path."""
    shutil.copytree(checkout / "slug_lightning", folder / "slug_lightning")
    for name in ("callbacks", "datamodules", "configs"):
        shutil.copytree(checkout / name, folder / "slug_lightning" / name)
    if published:
        knows = "near_binds" in (folder / "slug_lightning/methods/slug/config.py").read_text()
        as_published(folder / "slug_lightning" / "configs", knows)
    command = [sys.executable, "-c", "import slug_lightning.callbacks as c; print(c.__file__)"]
    found = subprocess.run(command, cwd=folder.parent, env=environment(folder), capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(folder)), f"it would run {found}"
    return folder


def run(site: Path, arguments: list[str], folder: Path) -> int:
    """One case by the code in `site`; what it prints goes to `<case>.log` next to its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    launch = TWO if HOST[0] in arguments else []
    configs = site / "slug_lightning" / "configs"  # each checkout's own
    filled = [one.replace("{configs}", str(configs)).replace("{runs}", str(folder.parent)) for one in arguments]
    command = [sys.executable, *launch, "-m", "slug_lightning.cli", *filled, "--output_dir", str(folder)]
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        # Not in a checkout, whose packages would come before those of the site.
        return subprocess.run(command, cwd=folder.parent, env=environment(site), stdout=log, stderr=log).returncode


def environment(site: Path) -> dict[str, str]:
    """Where Python finds the packages of a site, and not those that are installed."""
    return os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def differences(one: Any, other: Any, where: str = "report") -> Iterator[str]:
    """Where two pieces of plain data, or of tensors, are not the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            if key not in UNLIKE:
                yield from differences(one.get(key, NOTHING), other.get(key, NOTHING), f"{where}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if not bitwise_equal(one, other):
            yield f"{where}: the tensors differ"
    elif one != other:
        yield f"{where}: {str(one)[:80]} is now {str(other)[:80]}"


def compared(before: Path, after: Path) -> Iterator[str]:
    """What two runs have left."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (before, after)]
    names = [sorted(name for name in found if "events.out" not in name) for found in files]
    yield from differences(*names, "files")
    for name in sorted(files[0] & files[1]):
        one, other = before / name, after / name
        if name == "report.json":
            texts = [path.read_text().replace(str(path.parent.parent), "") for path in (one, other)]
            # By the name that it has had since 0.1.
            yield from differences(*(json.loads(text.replace('"damage"', '"constraint_usage"')) for text in texts))
        elif name == "patch.safetensors":  # its metadata come in any order
            patches = [UnlearnPatch.load(path) for path in (one, other)]
            yield from differences(*([patch.digest, patch.base] for patch in patches), "patch")
            yield from differences(*([edit.directions for edit in patch.edits] for patch in patches), "patch.edits")
        elif name.endswith(".safetensors"):
            yield from differences(load_file(one), load_file(other), name)
        elif name.endswith(".ckpt"):
            states = [torch.load(path, weights_only=True)["state_dict"] for path in (one, other)]
            yield from differences(*states, name)


def resumed(site: Path, arguments: list[str], before: Path, folder: Path) -> Iterator[str]:
    """What is wrong when this code goes on from the other's checkpoint."""
    code = run(site, [*arguments, "--ckpt_path", str(before / "unlearned.ckpt")], folder)
    if code:
        yield f"resumed: exit code {code}"
    elif (folder / "patch.safetensors").exists():
        yield "resumed: it has edited a second time"
    elif "unlearned already" not in folder.with_name(f"{folder.name}.log").read_text():
        yield "resumed: it does not say that there is nothing to do"


def main() -> int:
    """Run every case by both, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    parser.add_argument("--as-configured", action="store_true", help="compare the configs' own rules")
    parser.add_argument("--output", type=Path, default=Path("runs/same_answers"), help="folder for the runs")
    asked = parser.parse_args()
    output = asked.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    problems = 0
    with tempfile.TemporaryDirectory() as temporary:
        sites = {
            "before": site_of(asked.before.absolute(), Path(temporary, "before"), not asked.as_configured),
            "after": site_of(HERE, Path(temporary, "after"), not asked.as_configured),
        }
        cases = [*(["several"] if "another" in asked.only and "several" not in asked.only else []), *asked.only]
        for case in (bar := tqdm(cases)):
            codes = {}
            for when, site in sites.items():
                bar.set_description(f"{case}, {when}")
                codes[when] = run(site, CASES[case], output / when / case)
            found = list(differences(codes["before"], codes["after"], "exit code"))
            found += compared(output / "before" / case, output / "after" / case)
            if case == "demo":
                found += resumed(sites["after"], CASES[case], output / "before" / case, output / "before" / "resumed")
            if case == "another":
                added = [*CASES[case][:-3], str(output / "before" / "several"), *CASES[case][-2:]]
                code = run(sites["after"], added, output / "before" / "added")
                found += differences(codes["before"], code, "added to its run: exit code")
                found += compared(output / "before" / case, output / "before" / "added")
            tqdm.write(f"{case:<16}exit code {codes['after']}  {'the same' if not found else f'{len(found)} differences'}")
            for line in found[:20]:
                tqdm.write(f"    {line}")
            problems += len(found)
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Forget twenty things, one at a time, from the embedded CLIP; print a table and write JSON.

    python benchmarks/things.py                      # all twenty, into runs/things
    python benchmarks/things.py --count 3 --seed 1   # other things

Every run is `configs/thing.yaml` with another thing; the things are drawn by a fixed seed from all 234. A thing whose
report is in the folder already is not run again, so that a stopped benchmark goes on where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import torch

from slug_lightning import UnlearnReport
from slug_lightning.datamodules.emoji import load_drawings

CONFIG = Path(__file__).parent.parent / "configs" / "thing.yaml"


def row(thing: str, report: UnlearnReport) -> dict:
    """One line of the table: layer, step, and each metric before and after, on report data."""
    line = {"thing": thing, "status": report.status, "holds": report.holds, "layer": report.layer, "step": report.relative_step}
    for kind, name in (("forget", "thing_accuracy"), ("retain", "thing_accuracy"), ("retain", "style_accuracy")):
        for when, values in (("before", report.before), ("after", report.after)):
            line[f"{kind} {name.removesuffix('_accuracy')} {when}"] = values[kind][name]
    return line | {"evaluations": len(report.trace), "seconds": sum(report.cost["seconds"].values())}


def forget(thing: str, folder: Path) -> UnlearnReport:
    """Run the config for one thing, unless its report is there."""
    if not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped; else the next would go beside it
        command = [sys.executable, "-m", "slug_lightning.cli", "fit", "--config", str(CONFIG), "--output_dir", str(folder)]
        command += ["--data.thing", thing, "--trainer.enable_progress_bar", "false"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode not in (0, 3):
            raise SystemExit(f"{thing}: exit code {done.returncode}\n{done.stderr}")
    report = UnlearnReport.from_json(folder / "report.json")
    print(f"{thing}: {report.status}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="how many things (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which things (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once, a thread each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/things"), help="folder of the runs (default: %(default)s)")
    arguments = parser.parse_args()
    names = load_drawings().thing_names
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(arguments.seed))[: arguments.count]
    things = [names[i] for i in drawn]
    folders = [arguments.output / thing.replace(" ", "-") for thing in things]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        table = pandas.DataFrame(map(row, things, pool.map(forget, things, folders)))
    table.to_json(arguments.output / "table.json", orient="records", indent=2)
    print(table.to_markdown(index=False, floatfmt=".3f"))
    unlearned = table[table.status == "unlearned"]
    print(f"\n{len(unlearned)} of {len(table)} unlearned; of these {int(unlearned.holds.sum())} hold both bounds on report data")


if __name__ == "__main__":
    main()

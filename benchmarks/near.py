"""Measure what forgetting costs, what is near above all: the published procedure, `SLUG()`, and the centred null space.

    python benchmarks/near.py --sample                                   # one request of five families: a quarter of an hour
    python benchmarks/near.py                                            # all, three seeds: hours; goes on where it stopped
    python benchmarks/near.py --families clip styles --relearning --cost # a part of it, with what is slow
    python benchmarks/near.py --dev                                      # the concepts that recipes are chosen on
    python benchmarks/near.py --table                                    # the tables of what is there

Methods: `paper` is `SLUG.paper()`, which asks a CLIP in one wording, the others in two; `default` is `SLUG()`; `smallest` is
the same without a margin, at the smallest step that forgets; `null` is the centred null space, for a CLIP. Layers and bounds
are those of the shipped configs, and the requests are none that settings were chosen on. Seeds are those of splits and
renderings; the digits' classifier is also trained anew, and a language model forgets other passages. Every cell is a JSON line
in a file of its family. What stands there is not run again, unless the recipe has changed since, or --relearning or --cost
asks for more.

All figures are of report data, in per cent or points. `forget` is the forget metric that is worst, of all wordings. `at goal`
says whether all are where they should be: at chance; for pipelines and vision-language models at 5 %; for passages and random
samples at the level of what was never seen. `holds` says whether the report's bounds hold. `phrases`, of a CLIP: how often
pictures of a forgotten style, or thing, still go with "octopus in blob style" among the five styles, or the 234 things, in its
place. `others` is what the retain metric loses that loses most, of a perplexity in per cent. `near` is what accuracy on near
data loses, the same data whatever the method: at least 500 pictures that no search has seen, of the concepts that
`near_retain="auto"` finds, or where it finds none, of those that `families.py` names; digits are too few for that. `near worst`
is the single concept that loses most. `relearned`: named after 1/2/4/8 steps of Adam on 16 pictures, at a rate of 1e-4 · 3e-5
(`relearning.py`). `cost` is a whole run's floating-point operations beside those of one plain forward and backward pass over
forget and retain set; in brackets without the report's measurements. Means are over the runs that are feasible, as the others
edit nothing, and [the worst of them].
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas
from families import Request
from near_requests import FORGOTTEN, Makes, by_concept, families, in_phrases, near_data
from passages import QUIET
from relearning import STEPS, learned, never_seen
from vlm import shares

from slug_lightning.audit.relearning import Relearning
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import SLUG, Runtime
from slug_lightning.methods.baselines.null_space import NullSpace
from slug_lightning.modules import EmbeddedClip, EmbeddedVLM
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.objective.metrics import TARGET_SLACK, Metric, constraint_usage
from slug_lightning.reports.cost import flop_counter
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.layers import find_layers
from slug_lightning.utils.modules import patch_prefix, unwrap_model

METHODS: dict[str, Callable[..., Any]] = {
    "paper": SLUG.paper,
    "default": SLUG,
    "smallest": partial(SLUG, step_margin=0.0),
    "null": NullSpace,
}
SAMPLE = {"families": ["clip", "sd", "vlm", "digits", "random"], "methods": ["paper", "default", "null"], "seeds": [0]}
"""What a sample is a part of."""
FIGURES = ("forget", "phrases", "others", "near", "near worst")
log = logging.getLogger("near")


# ---- a cell


def floor(request: Request) -> int:
    """FLOPs of the pass that nothing can avoid: forward and backward over forget and retain data."""
    module = request.module.eval()
    kinds = ((module.forget_step, request.data.forget_dataloader), (module.retain_step, request.data.retain_dataloader))
    with flop_counter() as counter:
        for step, loader in kinds:
            for number, batch in enumerate(loader("train")):
                step(batch, number).backward()
                module.zero_grad()
    return counter.get_total_flops()


def lost(report: UnlearnReport) -> float:
    """Return what the retain metric loses that loses most, in points, or of what isn't an accuracy in per cent."""
    metrics = {name: Metric(name, report.bounds["higher_is_better"][name]) for name in report.bounds["retain_metrics"]}
    return 100 * constraint_usage(metrics, report.before["retain"], report.after["retain"], 1.0)


def worst(values: Mapping[str, float], report: UnlearnReport) -> float:
    """Return the largest of the forget metrics that are accuracies."""
    return 100 * max(value for name, value in values.items() if report.bounds["higher_is_better"][name])


def told(report: UnlearnReport, request: Request) -> dict[str, Any]:
    """Return what the report itself says."""
    trial = next((t for t in report.trace if (t["layer"], t["step"]) == (report.layer, report.step_size)), {})
    names, towers = [patch_prefix(request.module) + name for name in report.tensors], getattr(request.module, "towers", None)
    edited = find_layers(request.module, names, towers=towers) if names else []
    return {
        "status": report.status,
        "holds": report.holds,
        "forget before": worst(report.before["forget"], report),
        "forget": worst(report.after["forget"], report),
        "at goal": report.status == "unlearned" and not report.remembered(report.after["forget"]),
        "others": lost(report),
        "layers": report.tensors,
        "tower": ", ".join(sorted({layer.tower for layer in edited})),
        "way": f"{trial.get('direction', 'gradient')}, {trial.get('curve', 'line')}" if report.scores and trial else None,
        "margin": trial.get("margin", 0.0),
        "relative step": report.relative_step,
        "flops": report.cost.get("flops"),
        "evaluations": report.cost["evaluations"],
    }


def measured(request: Request, report: UnlearnReport, seed: int, known: dict[str, Any], relearns: bool) -> dict[str, Any]:
    """Measure what the report doesn't say, of the edited module, which is as it was afterwards; `known` is of the request."""
    line: dict[str, Any] = {}
    forgotten = request.data.forget_dataloader("test")
    if "near" not in known:
        known["near"] = near_data(request, report.bounds.get("near", {}).get("concepts", []), seed)
        known["forget n"] = sum(batch_samples(batch) for batch in forgotten)
    after = None
    if report.patch is not None:
        after, line["phrases"] = by_concept(request, known["near"]), in_phrases(request, seed)
        if isinstance(request.module, EmbeddedVLM):  # of each wording
            named = max(shares(request.module, forgotten, "question").values())
            line |= {"forget": 100 * named, "at goal": named <= FORGOTTEN + TARGET_SLACK}
        if relearns:
            attack = Relearning(STEPS, seed=seed)
            line["relearning"] = learned(request.module.model, load_drawings(), request.data.things[0], attack)
        report.patch.revert(unwrap_model(request.module))
    if "before" not in known:
        known["before"] = by_concept(request, known["near"])
    before = known["before"]
    if after is not None and before:
        each = {name: [100 * (b - a) for b, a in zip(before[name], after[name], strict=True)] for name in before}
        line["near each"] = {name: sum(values) / len(values) for name, values in each.items()}
        line["near"] = sum(map(sum, each.values())) / sum(map(len, each.values()))
        line["near worst"] = max(line["near each"].values())
    return line | {"near n": sum(map(len, before.values())), "forget n": known["forget n"]}


def run(request: Request, method: str, seed: int, known: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Forget by one method; the module is as it was afterwards."""
    pl.seed_everything(seed, verbose=False)
    start = time.perf_counter()
    rules = {} if method == "null" else {"layers": request.layers, "max_evaluations": request.evaluations}
    runtime = Runtime(replay=request.replay, count_cost=options.cost)
    bounds = dict(request.bounds)
    if method == "paper" and isinstance(request.module, EmbeddedClip):
        bounds["forget_metric"] = bounds["forget_metric"][0]
    callback = UnlearnCallback(method=METHODS[method](**rules), runtime=runtime, **bounds)
    pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(request.module, request.data)
    report, seconds = callback.report, time.perf_counter() - start
    relearns = options.relearning and isinstance(request.module, EmbeddedClip) and bool(request.data.things)
    line = told(report, request) | {"seconds": seconds} | measured(request, report, seed, known, relearns)
    if options.cost and "floor" not in known:
        known["floor"] = floor(request)
    return line | {"floor": known.get("floor"), "all seconds": time.perf_counter() - start}


def cells(family: str, concept: str, makes: Makes, seed: int, options: argparse.Namespace) -> None:
    """Run what is missing of one request."""
    path, request, known = options.output / f"{family}.jsonl", None, {}
    for method in options.methods:
        if method == "null" and family not in ("clip", "styles"):
            continue
        recipe = METHODS[method]().request()
        own = {"family": family, "request": concept, "seed": seed, "method": method, "recipe": recipe}
        more = {"floor": options.cost, "relearning": options.relearning and family == "clip"}
        there = latest(path).get((concept, seed, method), {})
        if own.items() <= there.items() and all(there.get(name) or not asked for name, asked in more.items()):
            continue
        request = request or makes(seed, options.output)
        try:
            found = run(request, method, seed, known, options)
        except UnlearnError as error:  # the other cells count all the same
            found = {"status": f"failed: {error}"}
        write(path, own | found)
        shown = {name: found[name] for name in FIGURES if found.get(name) is not None}
        figures = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
        log.info("%s, %s, seed %d, %s: %s; %s; %.0f s", family, concept, seed, method, found["status"], figures,
                 found.get("all seconds", 0))  # fmt: skip


def unseen(seed: int, options: argparse.Namespace) -> None:
    """Teach the CLIP what it has never seen, for comparison: means over ten things."""
    path, own = options.output / "clip.jsonl", ("ten things", seed, "never seen")
    if own in latest(path):
        return
    frame = pandas.DataFrame(never_seen(Relearning(STEPS, seed=seed)))
    rows = frame.groupby(["learning_rate", "steps"], sort=False).thing_accuracy.mean().reset_index().to_dict("records")
    write(path, {"family": "clip", **dict(zip(("request", "seed", "method"), own, strict=True)), "relearning": rows})


def write(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def latest(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return the last line of each cell of a file, by request, seed and method."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return {(line["request"], line["seed"], line["method"]): line for line in lines}


# ---- tables


def row(part: pandas.DataFrame) -> dict[str, str]:
    """Return what some cells have in common."""
    if part.status.isna().all():  # what was never seen, and so not forgotten
        return {"relearned": relearned(part)}
    done = part[part.status == "unlearned"]
    if not len(done):
        return {"feasible": f"0 of {len(part)}"}
    cost = [(sum(flops.values()) / floor, sum(n for phase, n in flops.items() if phase != "report") / floor)
            for flops, floor in zip(done.flops, done.floor, strict=True) if isinstance(flops, dict)]  # fmt: skip
    whole, rest = (pandas.Series(values).mean() for values in zip(*cost, strict=True)) if cost else (None, None)
    return {
        "feasible": f"{len(done)} of {len(part)}",
        "at goal": f"{int(done['at goal'].astype(bool).sum())} of {len(part)}",
        "holds": f"{int(done.holds.astype(bool).sum())} of {len(part)}",
        **{name: mean_and_worst(done[name]) for name in FIGURES},
        "relearned": relearned(done),
        "layers": counted(", ".join(names) for names in done.layers),
        "towers": counted(done.tower),
        "way": counted(done.way.dropna()),
        "margin": f"{done.margin.mean():.2f}",
        "cost": f"{whole:.2f} ({rest:.2f})" if cost else "—",
        "seconds": f"{done.seconds.mean():.0f}",
    }


def mean_and_worst(values: pandas.Series) -> str:
    values = values.dropna().astype(float)
    return f"{values.mean():.2f} [{values.max():.2f}]" if len(values) else "—"


def counted(values: Iterable[str]) -> str:
    """Name the values, with the number of those that occur more than once."""
    counts = pandas.Series(list(values), dtype=str).value_counts()
    return "; ".join(f"{count} × {value}" if count > 1 else value for value, count in counts.items()) or "—"


def relearned(part: pandas.DataFrame) -> str:
    """Return means of what is named after each number of steps, for each learning rate."""
    rows = [one for some in part.get("relearning", []) if isinstance(some, list) for one in some if one["steps"]]
    if not rows:
        return "—"
    means = pandas.DataFrame(rows).groupby(["learning_rate", "steps"]).thing_accuracy.mean()
    rates = sorted({rate for rate, _ in means.index}, reverse=True)
    return " · ".join("/".join(f"{100 * value:.0f}" for value in means[rate]) for rate in rates)


def tables(folder: Path, names: list[str], methods: list[str]) -> str:
    """Return a table for each family, and one of all."""
    text, summary = [], []
    for family in names:
        frame = pandas.DataFrame(list(latest(folder / f"{family}.jsonl").values()))
        if not len(frame):
            continue
        frame = frame[frame.method.isin([*methods, "never seen"])]
        frame = frame.reindex(columns=frame.columns.union(["status", *FIGURES], sort=False))
        keys = frame.groupby(["method", "request"], sort=False)
        rows = [{"method": method, "request": request} | row(part) for (method, request), part in keys]
        text += [family, pandas.DataFrame(rows)]
        by_method = frame.groupby("method", sort=False)
        summary += [{"family": family, "method": method} | row(part) for method, part in by_method]
    every = pandas.DataFrame(summary).drop(columns=["layers", "way"], errors="ignore")
    shown = [*text, "all", every] if summary else []
    return "\n\n".join(one if isinstance(one, str) else one.fillna("—").to_markdown(index=False) for one in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(families(dev=False))
    parser.add_argument("--families", nargs="+", default=every, choices=every, help="(default: all)")
    parser.add_argument("--requests", nargs="+", metavar="NAME", help="of these families (default: all)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--dev", action="store_true", help="the concepts that recipes are chosen on, into OUTPUT/dev")
    parser.add_argument("--sample", action="store_true", help="one request of five families, one seed")
    parser.add_argument("--relearning", action="store_true", help="also teach a CLIP again the things it has forgotten: slow")
    parser.add_argument("--cost", action="store_true", help="also count floating-point operations, which slows the runs")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--output", type=Path, default=Path("runs/near"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.output /= "dev" if options.dev else ""
    options.output.mkdir(parents=True, exist_ok=True)
    if options.sample:
        for name, some in SAMPLE.items():
            setattr(options, name, [one for one in getattr(options, name) if one in some])
    if not options.table:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        log.setLevel(logging.INFO)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        asked = families(options.dev)
        for seed in options.seeds:
            for family in options.families:
                wanted = options.requests or list(asked[family])[: 1 if options.sample else None]
                for concept in [one for one in asked[family] if one in wanted]:
                    cells(family, concept, asked[family][concept], seed, options)
            if options.relearning and "clip" in options.families:
                unseen(seed, options)
    print(tables(options.output, options.families, options.methods))


if __name__ == "__main__":
    main()

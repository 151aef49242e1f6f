"""Compare every direction and curve on every candidate layer of a few requests, each searched for the smallest step that forgets.

    python benchmarks/directions.py --sample                      # one request a family, one layer: minutes
    python benchmarks/directions.py --grid                        # all; goes on where it stopped
    python benchmarks/directions.py --grid --families clip lm --directions gradient covariance --curves line
    python benchmarks/directions.py --table                       # the tables of what is there

There is a file of JSON lines for each family, and a line for each request, layer, direction and curve; what stands there is not
run again. The requests are those of `families.py`; the layers are those that the shipped configs search (the Pareto front of
importance and alignment; of the digits' classifier all four), or all with --all-layers, the same for every direction.

The step is searched on the validation split by the forget metric alone. At the smallest step that reaches the target there,
report data give `forget` (the metric, in per cent), `others` (points lost by the retain metric that loses most; of a perplexity,
per cent) and `near` (points lost by what is near the concept). `relative_step` is the length of the edit beside that of the
weights. `passes` are those over the forget set for its gradient. `flops` are those of these passes and of the search;
`statistics_flops` those of the pass that gives directions what they need to know, which all layers share. Decompositions of
matrices are not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas
import torch
from families import FAMILIES, Request
from passages import QUIET

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import Method, Outcome, Runtime
from slug_lightning.methods.base import Context, recorded
from slug_lightning.methods.norms import direction_norm
from slug_lightning.methods.slug.candidates import pareto
from slug_lightning.methods.slug.choice import LeastUsage
from slug_lightning.methods.slug.config import CURVES, MAX_STEP
from slug_lightning.methods.slug.curves import Curve
from slug_lightning.methods.slug.directions import DIRECTIONS as known_directions
from slug_lightning.methods.slug.first_steps import Way, layers_of
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.methods.slug.ways import Ways
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.cost import flop_counter
from slug_lightning.tensors.layers import Layer, find_layers

LAYERS_OF_A_SAMPLE = 1
COLUMNS = ["forget", "others", "near", "relative_step", "passes", "flops"]
Cell = tuple[str, str, str]
"""Layer, direction and curve."""
log = logging.getLogger("directions")


class Counted:
    """Floating-point operations and seconds of what runs inside `on`, in all."""

    def __init__(self) -> None:
        self.flops, self.seconds = 0, 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count what runs inside."""
        start = time.perf_counter()
        with flop_counter() as counter:
            yield
        self.flops += counter.get_total_flops()
        self.seconds += time.perf_counter() - start


class Grid(Method):
    """Try every direction along every curve on every candidate layer; edits nothing.

    Args:
        asked: the request.
        directions: by name.
        curves: by name.
        done: the cells that are known.
        write: takes what was found of a cell.
        most_layers: how many candidates are tried, evenly spaced; None for all.
        all_layers: whether every layer is a candidate, on the front or not.
    """

    def __init__(
        self,
        asked: Request,
        directions: dict[str, Callable[..., Any]],
        curves: dict[str, Curve],
        done: set[Cell],
        write: Callable[[dict[str, Any]], None],
        most_layers: int | None,
        all_layers: bool,
    ) -> None:
        self.asked, self.directions, self.curves = asked, directions, curves
        # Where a direction is the same at every point, the path is the line.
        fixed = {name for name, direction in directions.items() if getattr(direction, "is_fixed", False)}
        self.kinds = [(d, c) for d in directions for c in curves if c == "line" or d not in fixed]
        self.done, self.write, self.most_layers, self.all_layers = done, write, most_layers, all_layers

    def request(self) -> dict[str, Any]:
        """Return nothing: no checkpoint is made."""
        return {}

    def layers_of(self, module: torch.nn.Module, towers: Any = None) -> list[Layer]:
        """List the layers that may be edited."""
        return find_layers(module, self.asked.layers, towers=towers)

    def run(self, context: Context) -> list[Outcome]:
        """Compute gradients and statistics once, record what replay needs, and try the cells."""
        (concept,) = context.concepts
        self.context, self.concept, self.gradient_cost, self.statistics_cost = context, concept, Counted(), Counted()
        with self.gradient_cost.on():
            gradient = context.passes.forget_gradient(concept, context.layers)
        self.samples = gradient.samples
        every = layer_statistics(context.layers, gradient.tensors, context.gradient("retain", context.layers))
        chosen = {candidate.layer for candidate in pareto(every)}
        candidates = [one for one in every if one.name in chosen or self.all_layers or not self.asked.front_only]
        self.candidates = len(candidates)
        if self.most_layers is not None:
            places = torch.linspace(0, len(candidates) - 1, min(self.most_layers, len(candidates))).long().tolist()
            candidates = [candidates[place] for place in places]
        cells = [(one, d, c) for one in candidates for d, c in self.kinds if (one.name, d, c) not in self.done]
        if cells:
            ways = Ways(concept, context, self.directions, front=True, notes=[])
            ways.keep(gradient.tensors, gradient.loss, [one for one, _, _ in cells])
            self._try(self._ways_of(cells, ways))
        return [Outcome(concept.name)]

    def _ways_of(self, cells: list[tuple[LayerStatistics, str, str]], ways: Ways) -> list[Way]:
        """Make the ways of the cells, in their order, with what the directions need to know."""
        made: dict[Cell, Way] = {}
        with self.statistics_cost.on():
            for name, curve in self.curves.items():
                of_curve = [(one, direction) for one, direction, on in cells if on == name]
                made |= {way.key: way for way in ways.along(of_curve, name, curve)}
        log.info("statistics: %.1f s", self.statistics_cost.seconds)
        return [made[one.name, direction, curve] for one, direction, curve in cells]

    def _try(self, ways: list[Way]) -> None:
        layers, objective = layers_of(ways), self.concept.objective
        start = time.perf_counter()
        with (
            objective.replaying(layers),
            recorded(objective, "forget", "val", layers),
            recorded(objective, "forget", "test", layers) as forget,
            recorded(objective, "retain", "test", layers) as retain,
            self.context.passes.path_recorded(self.concept, layers),
        ):
            self.before = {"forget": forget, "retain": retain, "near": self._near()}
            log.info("recorded in %.1f s", time.perf_counter() - start)
            start = time.perf_counter()
            for number, way in enumerate(ways, 1):
                cell = dict(zip(("layer", "direction", "curve"), way.key, strict=True)) | {"layers": self.candidates}
                line = cell | self._search(way)
                self.write(line)
                left = (time.perf_counter() - start) / number * (len(ways) - number) / 60
                shown = ", ".join(f"{name} {line[name]:.4g}" for name in COLUMNS if line[name] is not None)
                say = f"{number}/{len(ways)} {' '.join(way.key)}: {shown}; {line['seconds']:.1f} s"
                log.info("%s; %.1f min left of the request", say, left)

    def _search(self, way: Way) -> dict[str, Any]:
        """Search one cell for the smallest step that forgets, and measure what it costs."""
        objective, cost, start = self.concept.objective, Counted(), time.perf_counter()
        before = objective.backward_samples
        # The same for every cell, also for lines of the gradient, as where they compete.
        longest = objective.hooks.max_step or MAX_STEP
        options = {"max_evaluations": self.asked.evaluations, "max_step": longest, "is_contest": True}
        search = LayerSearch(self.concept, self.context, search=interpolation, choice=LeastUsage(), **options)
        failed = None
        try:
            with cost.on():
                search.search_steps(way)
        except (UnlearnError, torch.linalg.LinAlgError) as error:  # the other cells count all the same
            failed = f"{type(error).__name__}: {error}"
            log.warning("%s: %s", way.layer.name, failed)
        found, seconds = search.smallest.get(way.key), time.perf_counter() - start
        shares = [self.concept.share(trial) for trial in search.trials if math.isfinite(trial.forget)]
        line = dict.fromkeys(COLUMNS) | {
            "reached": found is not None,
            "passes": 1 + (objective.backward_samples - before) // self.samples,
            "flops": self.gradient_cost.flops + cost.flops,
            "statistics_flops": self.statistics_cost.flops if getattr(self.directions[way.direction], "needs", ()) else 0,
            "evaluations": len(search.trials),
            "closest": max(shares, default=None),
            "ended": next((trial.ended for trial in search.trials if trial.ended), None),
        }
        if found is not None:
            line |= self._measured(way.layer, search.edit(found))
        return line | {"failed": failed, "search_seconds": seconds, "seconds": time.perf_counter() - start}

    def _measured(self, one: LayerStatistics, edit: EditStep) -> dict[str, Any]:
        """Measure an edit on report data."""
        objective, before = self.concept.objective, self.before
        with self.context.edits.applied(edit):
            (forget,) = objective.measured("forget", "test", edited=one.name).values()
            retain = objective.measured("retain", "test", edited=one.name)
            near = self._near()
        (forget_before,) = before["forget"].values()
        return {
            "forget": 100 * forget,
            "forget_before": 100 * forget_before,
            "others": 100 * constraint_usage(objective.metrics_of("retain"), before["retain"], retain, 1.0),
            "retain_before": before["retain"],
            "retain": retain,
            "near": None if near is None else 100 * (before["near"] - near),
            "relative_step": edit.step * direction_norm(one.layer, edit.direction, objective.processes) / one.weight_norm,
        }

    @torch.no_grad()
    def _near(self) -> float | None:
        """Return the accuracy on what is near, of the model as it is."""
        module, name = self.asked.module.eval(), self.asked.near_metric
        values = [module.scores(batch, number)[name] for number, batch in enumerate(self.asked.near)]
        return torch.cat(values).nanmean().item() if values else None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a family's file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run(family: str, concept: str, options: argparse.Namespace) -> None:
    """Try what is missing of one request."""
    path = options.output / f"{family}.jsonl"
    asked = {(direction, curve) for direction in options.directions for curve in options.curves}
    lines = [line for line in read(path) if line["concept"] == concept and (line["direction"], line["curve"]) in asked]
    most = LAYERS_OF_A_SAMPLE if options.sample else None
    most_ways = len({way for way in asked if way[1] == "line" or not getattr(known_directions[way[0]], "is_fixed", False)})
    if lines and len(lines) >= min(lines[0]["layers"], most or math.inf) * most_ways:
        log.info("%s, %s: all there", family, concept)
        return

    def write(found: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"family": family, "concept": concept} | found) + "\n")

    log.info("%s, %s", family, concept)
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    request = FAMILIES[family][concept](options.output)
    curves = {name: CURVES[name] for name in options.curves}
    done = {(line["layer"], line["direction"], line["curve"]) for line in lines}
    method = Grid(
        request, {name: known_directions[name] for name in options.directions}, curves, done, write, most, options.all_layers
    )
    callback = UnlearnCallback(near_retain=None, method=method, runtime=Runtime(replay=request.replay), **request.bounds)
    pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(request.module, request.data)
    log.info("%s, %s: %.0f s", family, concept, time.perf_counter() - start)


def table(lines: list[dict[str, Any]]) -> str:
    """Return median and worst over requests and layers, by direction and curve; a layer that doesn't get there is the worst."""
    rows = []
    for (direction, curve), part in pandas.DataFrame(lines).groupby(["direction", "curve"], sort=False):
        reached = part[part.reached]
        row = {"direction": direction, "curve": curve, "reached": f"{len(reached)} of {len(part)}"}
        for column in COLUMNS:
            row[column] = _summary(part[column].astype(float), part.reached)
        rows.append(row)
    return pandas.DataFrame(rows).to_markdown(index=False)


def _summary(values: pandas.Series, reached: pandas.Series) -> str:
    if values[reached].isna().all():
        return "—"
    whole = values.fillna(math.inf)  # what it cost in vain is known, what came of it is not
    median, worst, worst_reached = ("—" if math.isinf(v) else f"{v:.3g}" for v in (whole.median(), whole.max(), values.max()))
    return f"{median} [{worst}]" if worst != "—" else f"{median} [—, {worst_reached}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", action="store_true", help="every request of the families")
    what.add_argument("--sample", action="store_true", help="one request a family, one layer of it")
    what.add_argument("--table", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), help="(default: all)")
    parser.add_argument(
        "--directions", nargs="+", default=list(known_directions), choices=list(known_directions), help="(default: all)"
    )
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES), help="(default: both)")
    parser.add_argument("--all-layers", action="store_true", help="also those that are not on the front")
    parser.add_argument("--output", type=Path, default=Path("runs/directions"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        options.output.mkdir(parents=True, exist_ok=True)
        handlers = [logging.StreamHandler(), logging.FileHandler(options.output / "log.txt")]
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
        log.setLevel(logging.INFO)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        for family in options.families:
            for concept in list(FAMILIES[family])[: 1 if options.sample else None]:
                run(family, concept, options)
    print("median [worst]; — is that of a layer that does not get there, and then follows the worst of those that do")
    for family in options.families:
        if lines := read(options.output / f"{family}.jsonl"):
            print(f"\n{family}\n\n{table(lines)}")


if __name__ == "__main__":
    main()

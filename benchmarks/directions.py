"""Compare every direction and curve on every candidate layer of a few requests, each searched for the smallest step that forgets.

    python benchmarks/directions.py --sample                      # one request a family, two layers: minutes
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
from dataclasses import replace
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
from slug_lightning.methods.base import Context, Trial, recorded
from slug_lightning.methods.norms import direction_norm
from slug_lightning.methods.slug.candidates import pareto
from slug_lightning.methods.slug.config import CURVES
from slug_lightning.methods.slug.curves import Curve, CurveEnd, Tangent
from slug_lightning.methods.slug.directions import DIRECTIONS as known_directions
from slug_lightning.methods.slug.layer_search import smallest_step
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.methods.slug.step_search import START, interpolation
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.cost import flop_counter
from slug_lightning.tensors.layers import Layer, find_layers

LAYERS_OF_A_SAMPLE = 2
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
        self.ways = [(d, c) for d in directions for c in curves if c == "line" or d not in fixed]
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
            self.gradient = context.gradient("forget", context.layers, concept)
        every = layer_statistics(context.layers, self.gradient, context.gradient("retain", context.layers))
        chosen = {candidate.layer for candidate in pareto(every)}
        candidates = [one for one in every if one.name in chosen or self.all_layers or not self.asked.front_only]
        self.candidates = len(candidates)
        if self.most_layers is not None:
            places = torch.linspace(0, len(candidates) - 1, min(self.most_layers, len(candidates))).long().tolist()
            candidates = [candidates[place] for place in places]
        cells = [(one, d, c) for one in candidates for d, c in self.ways]
        cells = [cell for cell in cells if (cell[0].name, *cell[1:]) not in self.done]
        candidates = [one for one in candidates if any(cell[0] is one for cell in cells)]
        if cells:
            self._try(self._with_factors(candidates), cells)
        return [Outcome(concept.name)]

    def _with_factors(self, candidates: list[LayerStatistics]) -> dict[str, LayerStatistics]:
        """Return the candidates by name, with what the directions need to know of them."""
        needs = frozenset[str]().union(*(getattr(direction, "needs", ()) for direction in self.directions.values()))
        if not needs:
            return {one.name: one for one in candidates}
        with self.statistics_cost.on():
            found = self.context.statistics([one.layer for one in candidates], needs, concept=self.concept)
        log.info("statistics: %.1f s", self.statistics_cost.seconds)
        return {
            one.name: replace(one, factors={n: {t: by[t] for t in one.layer.parameters if t in by} for n, by in found.items()})
            for one in candidates
        }

    def _try(self, candidates: dict[str, LayerStatistics], cells: list[tuple[LayerStatistics, str, str]]) -> None:
        layers, objective = [one.layer for one in candidates.values()], self.concept.objective
        start = time.perf_counter()
        with (
            objective.replaying(layers),
            recorded(objective, "forget", "val", layers),
            recorded(objective, "forget", "test", layers) as forget,
            recorded(objective, "retain", "test", layers) as retain,
        ):
            self.before = {"forget": forget, "retain": retain, "near": self._near()}
            log.info("recorded in %.1f s", time.perf_counter() - start)
            start = time.perf_counter()
            for number, (one, direction, curve) in enumerate(cells, 1):
                cell = {"layer": one.name, "direction": direction, "curve": curve, "layers": self.candidates}
                line = cell | self._search(candidates[one.name], self.directions[direction], self.curves[curve])
                self.write(line)
                left = (time.perf_counter() - start) / number * (len(cells) - number) / 60
                shown = ", ".join(f"{name} {line[name]:.4g}" for name in COLUMNS if line[name] is not None)
                say = f"{number}/{len(cells)} {' '.join(map(str, list(cell.values())[:3]))}: {shown}; {line['seconds']:.1f} s"
                log.info("%s; %.1f min left of the request", say, left)

    def _search(self, one: LayerStatistics, direction: Callable[..., Any], curve: Curve) -> dict[str, Any]:
        """Search one cell for the smallest step that forgets, and measure what it costs."""
        concept, objective, cost, start = self.concept, self.concept.objective, Counted(), time.perf_counter()
        tried: list[Trial] = []
        edits: dict[float, EditStep] = {}
        passes, failed = 1, None

        def tangent_at(at: EditStep | None = None) -> Tangent:
            nonlocal passes
            if at is None:
                gradient = {name: self.gradient[name] for name in one.layer.parameters}
            else:
                gradient = self.context.gradient("forget", [one.layer], concept, at=[at])
                passes += 1
            way = direction(one, gradient)
            if not getattr(direction, "is_fixed", False) and sum(float((way[n] * g).sum()) for n, g in gradient.items()) < 0:
                way = {name: -tensor for name, tensor in way.items()}
            return Tangent(way, direction_norm(one.layer, way, self.context.objective.processes))

        def evaluate(distance: float) -> Trial:
            edits[distance] = edit = point(distance)
            with self.context.edits.applied(edit):
                (value,) = objective.measured("forget", "val", edited=one.name).values()
            broken = not math.isfinite(value)
            forgotten = broken or concept.is_forgotten(value)
            tried.append(Trial(one.name, edit.step, distance, forgotten, None, value, None))
            return tried[-1]

        try:
            with cost.on():
                point = curve(one, tangent_at)
                interpolation(evaluate, concept.share, self.asked.evaluations, START)
        except CurveEnd as end:
            failed = f"{type(end).__name__}: {end}"
        except (UnlearnError, torch.linalg.LinAlgError) as error:  # the other cells count all the same
            failed = f"{type(error).__name__}: {error}"
            log.warning("%s: %s", one.name, failed)
        found, seconds = smallest_step(tried), time.perf_counter() - start
        line = dict.fromkeys(COLUMNS) | {
            "reached": found is not None,
            "passes": passes,
            "flops": self.gradient_cost.flops + cost.flops,
            "statistics_flops": self.statistics_cost.flops if getattr(direction, "needs", ()) else 0,
            "evaluations": len(tried),
            "closest": max((concept.share(trial.forget) for trial in tried if math.isfinite(trial.forget)), default=None),
        }
        if found is not None:
            line |= self._measured(one, edits[found.relative_step])
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
    callback = UnlearnCallback(method=method, runtime=Runtime(replay=request.replay), **request.bounds)
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
    what.add_argument("--sample", action="store_true", help="one request a family, two layers of it")
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

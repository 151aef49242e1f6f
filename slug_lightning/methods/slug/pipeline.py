"""One run: validate, measure, choose, search, put together, report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
from torch import Tensor

from slug_lightning.distributed.strategy import Runner
from slug_lightning.errors import UnlearnError
from slug_lightning.methods.slug.concept import ALTERNATIVES, Request, Wanted
from slug_lightning.methods.slug.cross_effects import MOST, collateral, strength_curves
from slug_lightning.methods.slug.layer_search import recorded
from slug_lightning.methods.slug.several import JointSearch
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.objective.samples import Gallery, before_and_after
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import TemporaryEdits
from slug_lightning.reports.cost import CostMeter, joined
from slug_lightning.reports.run_files import earlier_edits
from slug_lightning.reports.several import AnyReport, JointReport
from slug_lightning.tensors.dtensor import whole
from slug_lightning.tensors.layers import Granularity, find_layers
from slug_lightning.utils.loaders import Batches, Split
from slug_lightning.utils.modules import unwrap_model
from slug_lightning.utils.names import some_of
from slug_lightning.utils.progress import Progress


class RunOptions(Protocol):
    """What is asked of a run, as the arguments of `slug_lightning.callbacks.UnlearnCallback` say it."""

    layers: str | list[str]
    granularity: Granularity
    forget_metric: str | None
    forget_target: float | None
    retain_metric: str | list[str] | None
    retain_tolerance: float
    max_evaluations: int
    margin: float
    strengths: Sequence[float]
    on_infeasible: Literal["skip", "stop"]
    earlier: str | None
    replay: bool
    replay_budget: int | None
    count_cost: bool
    retain_cache: RetainCache | None
    offload_gradient: bool

    def asked(self) -> dict[str, Any]:
        """All that the processes of a run must have been asked alike."""


class Run:
    """What happens between the callback's hook and its report; the weights are as before when it has ended.

    Args:
        options: what is asked for.
        module: the owner's.
        runner: knows the strategy.
        forget: batches of each concept, by split.
        retain: batches of what is kept, by split.
        notes: on these data, for the report.
        progress: shows how far the run is.
    """

    def __init__(
        self,
        options: RunOptions,
        module: pl.LightningModule,
        runner: Runner,
        forget: Mapping[str, Mapping[Split, Batches]],
        retain: Mapping[Split, Batches],
        notes: Sequence[str],
        progress: Progress,
    ) -> None:
        self.options = options
        self.module = module
        self.runner = runner
        self.processes = runner.processes
        self.progress = progress
        self.bench = TemporaryEdits()
        self.meter = CostMeter(module.device, options.count_cost and not runner.is_sharded)
        self.layers = find_layers(module, options.layers, options.granularity, getattr(module, "towers", None))
        self.objective = Objective(
            module,
            {"retain": retain},
            runner,
            options.forget_metric,
            options.retain_metric,
            self.progress.track,
            replay_budget=options.replay_budget,
        )
        wanted = Wanted(
            options.forget_target,
            options.retain_tolerance,
            options.max_evaluations,
            options.margin,
            options.offload_gradient,
            alternatives=ALTERNATIVES if len(forget) > 1 else 0,
        )
        self.requests = [
            Request(name, self.objective.about(parts), self.layers, wanted, self.progress) for name, parts in forget.items()
        ]
        self.notes: list[str] = [*notes, *runner.notes()]
        self.rounds: list[dict[str, Any]] = []
        self._kept: dict[str, Tensor] | None = None
        self.before: dict[str, dict[str, float]] = {"forget": {}, "retain": {}}
        self.after: dict[str, dict[str, float]] = {"forget": {}, "retain": {}}
        self.gallery: dict[str, Gallery] = {}

    # ---- the run, in order

    def __call__(self) -> AnyReport:
        """Run, and give the report, with its patches."""
        with preserve_state(self.module):
            self.runner.reshard()
            self._refuse_different()
            with self.meter.phase("validate"):
                self._validate()
            if self.runner.precision.endswith("-mixed"):
                with self.meter.phase("rounding"):
                    for request in self.new:
                        request.take_rounding()
            if self.several:
                for request in self.new:
                    self._search(request)
                with self.meter.phase("together"):
                    edits = self._together()
                found = self._collateral(edits)
                with self.meter.phase("report"):
                    self._measure(edits)
            else:
                (request,) = self.requests
                edits, found = self._search(request, to_the_end=True), {}
            if self.options.strengths and edits:
                with self.meter.phase("strength"):
                    curves = strength_curves(edits, self.objective, self.bench, self.options.strengths, self.progress)
                    for name, curve in curves.items():
                        next(request for request in edits if request.name == name).report.strengths = curve
            if edits and getattr(self.module, "gallery_step", None) is not None:
                with self.meter.phase("gallery"):
                    self._draw(edits)
            return self._report(edits, found)

    @property
    def several(self) -> bool:
        """Whether more than one concept was asked for."""
        return len(self.requests) > 1

    @property
    def new(self) -> list[Request]:
        """The requests for which an edit is to be found."""
        return [request for request in self.requests if not request.is_taken_over]

    def _refuse_different(self) -> None:
        """Refuse what differs between the processes: later they would wait for each other."""
        own = self.options.asked() | {"metrics": self.objective.names, "concepts": [request.name for request in self.requests]}
        own["layers that may be edited"] = [layer.name for layer in self.layers]
        asked = self.processes.all_gather_object("the request", own)
        if different := [name for name in own if any(other[name] != asked[0][name] for other in asked)]:
            raise UnlearnError(f"{', '.join(different)}: the processes were asked for different things; give the same in each")
        for objective in (self.objective, *(request.objective for request in self.requests)):
            objective.refuse_different_data()

    def _validate(self) -> None:
        """Measure what decides, before any edit; take over what an earlier run has forgotten."""
        earlier = earlier_edits(self.options.earlier) if self.options.earlier else {}
        if missing := [name for name in earlier if name not in {request.name for request in self.requests}]:
            raise UnlearnError(
                f"earlier: {self.options.earlier} has also forgotten {some_of(missing)}; give its data in forget, too"
            )
        if earlier:
            self.notes.append(
                "earlier: what was forgotten before was checked together with the new edits on search data; on report data, and "
                "for collateral and strength, only what is new was measured"
            )
        self._refuse_twice()
        for request in self.requests:
            if request.name in earlier:
                request.take_over(*earlier[request.name])
            else:
                request.validate()
            request.objective.rehearse("forget")
        if not self.new:
            raise UnlearnError(f"earlier: the run in {self.options.earlier} has forgotten all of this; name another concept")
        self.objective.rehearse("retain")
        if self.processes.in_step and not self.runner.is_sharded:
            self.notes.append("replay: off, as the module communicates in its steps; every evaluation was computed whole")
        spares = self.options.replay and not self.processes.in_step
        for objective in (self.objective, *(request.objective for request in self.requests)):
            objective.spares = spares

    def _refuse_twice(self) -> None:
        """Refuse the same data under two names: one edit would be made twice."""
        names: dict[str, str] = {}
        for request in self.requests if self.several else ():
            digest = request.objective.digest("forget", "train")
            other = names.setdefault(digest or request.name, request.name)
            if other != request.name:
                raise UnlearnError(f"forget: {other!r} and {request.name!r} are the same data; ask for them once")

    def _search(self, request: Request, to_the_end: bool = False) -> list[Request]:
        """One concept by itself: gradients, scores, competition; and if it is the only one, its report data.

        Returns:
            The request, if an edit was found.
        """
        with self.meter.phase("gradients"):
            request.measure(lambda: self._retain_gradient(request))
        with request.objective.sparing(request.front()):
            with self.meter.phase("search"):
                request.search(self.bench)
            edits = [request] if request.chosen else []
            if to_the_end:
                with self.meter.phase("report"):
                    self._measure(edits)
        return edits

    def _together(self) -> list[Request]:
        """The sum of all edits, searched again where it fails."""
        able = [request for request in self.requests if request.chosen]
        if self.options.on_infeasible == "stop" and len(able) < len(self.requests):
            return []
        kept = self.new[0].report.search_before["retain"]
        joint = JointSearch(
            able,
            self.objective,
            self.bench,
            kept=kept,
            tolerance=self.options.retain_tolerance,
            max_rounds=self.options.max_evaluations,
            margin=self.options.margin,
            progress=self.progress,
        )
        edits = joint.settle()
        self.rounds = [vars(found) for found in joint.rounds]
        if joint.final is not None:
            for request in edits:
                values = {request.report.bounds["forget_metric"]: joint.final.forget[request.name]}
                request.report.search_after = {"forget": values, "retain": joint.final.retain}
        return [] if self.options.on_infeasible == "stop" and len(edits) < len(self.requests) else edits

    def _collateral(self, edits: Sequence[Request]) -> dict[str, dict[str, float]]:
        """What each edit alone does to every concept; those of an earlier run were measured there."""
        new = [request for request in edits if not request.is_taken_over]
        if len(new) > MOST:
            self.notes.append(f"collateral: measured for the first {MOST} of {len(new)} edits only")
        with self.meter.phase("collateral"):
            return collateral(new, self.bench, self.progress)

    def _measure(self, edits: Sequence[Request]) -> None:
        """Measure on report data, before and after; what was taken over was measured on them by its own run."""
        (self._measure_together if self.several else self._measure_alone)(edits)
        for request in self.new:
            request.report.before["retain"], request.report.after["retain"] = self.before["retain"], self.after["retain"]
        for request in self.new:
            (self.before["forget"][request.name],) = request.report.before["forget"].values()
            (self.after["forget"][request.name],) = request.report.after["forget"].values()

    def _measure_alone(self, edits: Sequence[Request]) -> None:
        """One concept: after the edit only what that changes is computed."""
        (request,) = self.requests
        layers = [edit.layer for edit in edits]
        kinds: tuple[Kind, ...] = ("forget", "retain")
        for kind in kinds:
            with recorded(request.objective, kind, "test", layers) as before, self.bench.step(*(edit.move() for edit in edits)):
                after = request.objective.measured(kind, "test", edited=request.layer.name) if edits else before
            request.report.before[kind], request.report.after[kind] = before, after
        self.before["retain"], self.after["retain"] = request.report.before["retain"], request.report.after["retain"]

    def _measure_together(self, edits: Sequence[Request]) -> None:
        """Several concepts, with all edits."""
        for request in self.new:
            request.report.before["forget"] = request.objective.measured("forget", "test")
        self.before["retain"] = self._retain_before()
        with self.bench.step(*(edit.move() for edit in edits)):
            for request in self.new:
                request.report.after["forget"] = request.objective.measured("forget", "test", edited="together")
            self.after["retain"] = self.objective.measured("retain", "test", edited="together")

    def _draw(self, edits: Sequence[Request]) -> None:
        """Of a generator, pictures before any edit and with all of them."""
        moves = [edit.move() for edit in edits]
        for request in self.progress.track([request for request in edits if not request.is_taken_over], "gallery"):
            request.report.gallery["forget"] = before_and_after(request.objective, "forget", self.bench.step(*moves))
        self.gallery["retain"] = before_and_after(self.objective, "retain", self.bench.step(*moves))

    def _retain_gradient(self, request: Request) -> dict[str, Tensor]:
        """Computed for the first request, and let go of with the last."""
        gradient = self._kept or self._first_retain_gradient()
        self._kept = None if request is self.new[-1] else gradient
        return gradient

    def _first_retain_gradient(self) -> dict[str, Tensor]:
        """Computed, or the one that an earlier run left in the cache."""
        parameters = {name: p for layer in self.layers for name, p in layer.parameters.items()}
        if self.options.retain_cache is None:
            return self.objective.gradient("retain", parameters).tensors
        return self.options.retain_cache.gradient(self.objective, parameters, self.notes)

    def _retain_before(self) -> dict[str, float]:
        """The retain metrics on report data before any edit, measured or from the cache."""
        if self.options.retain_cache is None:
            return self.objective.measured("retain", "test")
        return self.options.retain_cache.measured(self.objective, "test", self.notes)

    # ---- the report

    def _report(self, edits: Sequence[Request], found: dict[str, dict[str, float]]) -> AnyReport:
        """Say what was found, with the patches."""
        metrics = self.objective.metrics_of("retain")
        lost = constraint_usage(metrics, self.before["retain"], self.after["retain"], self.options.retain_tolerance)
        active = UnlearnPatch.active(unwrap_model(self.module))
        parents = active.as_parents() if active else []
        for request in self.requests:
            self._conclude(request, request in edits, lost <= 1, parents)
        cost, notes = self._cost()
        versions = {name: version(name) for name in ("slug-lightning", "lightning", "torch")}
        if not self.several:
            (request,) = self.requests
            request.report.notes = self.notes + request.report.notes + notes
            request.report.cost, request.report.versions = cost, versions
            request.report.gallery |= self.gallery
            return request.report
        report = JointReport(
            "infeasible" if not edits else "unlearned" if len(edits) == len(self.requests) else "partly",
            {request.name: request.report for request in self.requests},
            self.rounds,
            found,
            self.before,
            self.after,
            holds=lost <= 1 and all(request.report.holds for request in edits if request in self.new) if edits else None,
            cost=cost,
            notes=self.notes + notes,
            versions=versions,
            gallery=self.gallery,
        )
        if edits:
            report.patch = UnlearnPatch.combine([r.report.patch for r in edits if r.report.patch is not None])
            report.patch_digest = report.patch.digest
        return report

    def _conclude(self, request: Request, is_edited: bool, is_kept: bool, parents: list[dict[str, Any]]) -> None:
        """Complete the report of one concept, with its patch; of a sharded model, in every process."""
        report, trial = request.report, request.chosen
        if not is_edited or trial is None:
            nothing = {"layer": None, "step_size": None, "relative_step": None, "patch": None, "patch_digest": None}
            vars(report).update(status="infeasible", holds=None, tensors=[], search_after=report.search_before, **nothing)
            return
        if request.is_taken_over:
            return
        (after,) = report.after["forget"].values()
        report.status = "unlearned"
        report.holds = request.is_forgotten(after) and is_kept
        report.layer, report.step_size, report.relative_step = trial.layer, trial.step, trial.relative_step
        if not self.several:
            report.search_after = {"forget": {report.bounds["forget_metric"]: trial.forget}, "retain": trial.retain or {}}
        edit = request.edit(parents)
        report.tensors = list(edit.directions)
        named = zip(edit.directions, request.layer.parameters.values(), strict=True)
        report.patch = UnlearnPatch({name: whole(p).cpu().clone() for name, p in named}, [edit])
        report.patch_digest = report.patch.digest

    def _cost(self) -> tuple[dict[str, Any], list[str]]:
        """What the run cost, and what replay has to say."""
        objectives = [self.objective, *(request.objective for request in self.requests)]
        cost = joined(self.processes.all_gather_object("cost", self.meter.report())) | {
            "evaluations": sum(len(request.report.trace) for request in self.new),
            "forward_samples": sum(objective.forward_samples for objective in objectives),
            "backward_samples": sum(objective.backward_samples for objective in objectives),
        }
        if not self.objective.spared:
            return cost, []
        reports, notes = zip(*self.objective.spared, strict=True)
        largest = ("budget_bytes", "most_held_bytes")
        replay = {name: (max if name in largest else sum)(report[name] for report in reports) for name in reports[0]}
        cost["replay"] = self.processes.broadcast("replay", replay)
        said = self.processes.all_gather_object("notes", list(itertools.chain(*notes)))
        return cost, list(dict.fromkeys(itertools.chain(*said)))

"""One run, whatever the method: validate, let the method find edits, measure before and after, decide, report, restore."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl

from slug_lightning.distributed.strategy import Runner
from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context, Method, Outcome, recorded
from slug_lightning.methods.caveats import few_samples, frozen
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.cross_effects import MAX_CONCEPTS, collateral, strength_curves
from slug_lightning.methods.near import Near
from slug_lightning.methods.reporting import Findings, Measured, build_report
from slug_lightning.objective.data_checks import digest_of_data, refuse_different_data, rehearse
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.objective.samples import before_and_after
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.cost import CostMeter, joined
from slug_lightning.reports.run_files import earlier_edits
from slug_lightning.reports.several import AnyReport
from slug_lightning.utils.loaders import Batches, NearBatches, Split
from slug_lightning.utils.modules import patch_prefix
from slug_lightning.utils.names import some_of
from slug_lightning.utils.progress import Progress


@dataclass(frozen=True)
class Request:
    """What is asked for, whatever the method; the arguments of `slug_lightning.callbacks.UnlearnCallback` say what they mean."""

    forget_metric: Union[str, list[str], None] = None
    forget_target: Union[float, dict[str, float], Literal["as_holdout"], None] = None
    retain_metric: Union[str, list[str], None] = None
    retain_tolerance: float = 0.01
    near_tolerance: Optional[float] = None
    on_infeasible: Literal["skip", "stop"] = "skip"


@dataclass(frozen=True)
class Runtime:
    """How a run computes; the outcome is the same, bit for bit, whatever is given here.

    Args:
        replay: whether evaluations of an edit compute only what the edit can change (`slug_lightning.objective.replay`).
        replay_budget: bytes that the outputs kept for replay may take, on the device and again on the host, at least 0.
            Default: a quarter of what is free when the search starts. A small budget makes the search slower.
        count_cost: whether the report's `cost` also counts floating-point operations and the bytes of live tensors, in
            every phase; this slows the run.
        offload_gradient: whether the forget gradient waits in the host's memory while the retain gradient is computed, so
            that a device need not hold both.
        retain_cache: where later requests at the same weights find what this run computes of the retain set: a folder,
            or a `RetainCache` that several callbacks share.

    Raises:
        UnlearnError: if `replay_budget` is negative.

    Example:
        >>> Runtime(replay=False).replay
        False
    """

    replay: bool = True
    replay_budget: Optional[int] = None
    count_cost: bool = False
    offload_gradient: bool = False
    retain_cache: Union[str, RetainCache, None] = None

    def __post_init__(self) -> None:
        if self.replay_budget is not None and self.replay_budget < 0:
            raise UnlearnError(f"replay_budget must be >= 0 bytes, got {self.replay_budget}")
        if isinstance(self.retain_cache, str):
            object.__setattr__(self, "retain_cache", RetainCache(self.retain_cache))


OWN_TO_A_RANK = {"retain_cache", "replay_budget"}
"""What ranks may have been given differently."""


class Harness:
    """What happens between the callback's hook and its report; the weights are as before when it has ended.

    `forget` has batches by concept, then by split, `retain` by split, `holdout` batches by concept where there are some;
    `find_near` gives what lies near by concept; `notes` are on these data; `more_asked` is what else every rank must have been
    given.
    """

    def __init__(
        self,
        method: Method,
        request: Request,
        runtime: Runtime,
        module: pl.LightningModule,
        runner: Runner,
        forget: Mapping[str, Mapping[Split, Batches]],
        retain: Mapping[Split, Batches],
        notes: Sequence[str],
        holdout: Mapping[str, Batches],
        find_near: Callable[[Mapping[str, Objective]], Mapping[str, NearBatches]],
        progress: Progress,
        earlier: str | None = None,
        scales: Sequence[float] = (),
        more_asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.method = method
        self.request = request
        self.runtime = runtime
        self.module = module
        self.runner = runner
        self.processes = runner.processes
        self.progress = progress
        self.earlier = earlier
        self.scales = scales
        self.more_asked = more_asked or {}
        self.meter = CostMeter(module.device, runtime.count_cost and not runner.is_sharded)
        self.objective = Objective(
            module,
            {"retain": retain},
            runner,
            request.forget_metric,
            request.retain_metric,
            progress.track,
            replay_budget=runtime.replay_budget,
        )
        prefix = patch_prefix(module)
        self.layers = [replace(layer, prefix=prefix) for layer in method.layers_of(module, self.objective.hooks.towers)]
        self.holdout = holdout
        self.find_near = find_near
        self.near: Mapping[str, NearBatches] = {}
        self.objectives = {name: self.objective.about(splits) for name, splits in forget.items()}
        self.concepts: list[Concept] = []
        self.notes: list[str] = [*notes, *runner.notes(), *frozen(module, self.layers)]
        self.before, self.after = Measured(), Measured()
        """On the test split."""

    # ---- the run, in order

    def __call__(self) -> AnyReport:
        """Run, and give the report, with its patches."""
        with preserve_state(self.module):
            self.runner.reshard()
            self._refuse_different()
            with self.meter.phase("near data"):
                self._find_near()
            with self.meter.phase("validate"):
                self._validate()
            context = self._context()
            with context.until_report:
                return self._run(context)

    def _run(self, context: Context) -> AnyReport:
        """Let the method find edits, measure, decide and report."""
        outcomes = {outcome.concept: outcome for outcome in self.method.run(context)}
        if missing := self.objectives.keys() - outcomes.keys():
            raise UnlearnError(f"method: {type(self.method).__name__} gave no outcome for {some_of(sorted(missing))}")
        for concept in self.concepts:
            if concept.edit is not None and outcomes[concept.name].edit is not None:
                outcomes[concept.name].edit = concept.edit  # which the method may not change
        edits = self._within_bounds(context, outcomes)
        found = self._collateral(context, edits)
        with self.meter.phase("report"):
            self._measure(context, edits)
        context.until_report.close()
        self.notes += few_samples(self.new, self.objective, self.request.retain_tolerance)
        findings = Findings(outcomes, edits, self.before, self.after, found)
        if self.scales and edits:
            with self.meter.phase("strength"):
                concepts = [concept for concept in self.new if concept.name in edits]
                findings.curves = strength_curves(concepts, edits, context, self.scales)
        if edits and self.objective.hooks.gallery_step is not None:
            with self.meter.phase("gallery"):
                self._draw(context, findings)
        return build_report(context, findings, self._cost(outcomes))

    @property
    def several(self) -> bool:
        """Whether more than one concept was asked for."""
        return len(self.objectives) > 1

    @property
    def new(self) -> list[Concept]:
        """The concepts for which an edit is to be found."""
        return [concept for concept in self.concepts if concept.report is None]

    def _refuse_different(self) -> None:
        """Refuse what differs across ranks: later they would wait for each other."""
        asked = asdict(self.request) | {f"method: {name}": value for name, value in self.method.request().items()}
        asked |= {name: value for name, value in vars(self.runtime).items() if name not in OWN_TO_A_RANK}
        asked |= {"earlier": self.earlier, "scales": list(self.scales), "concepts": list(self.objectives)}
        asked |= self.more_asked
        asked |= {"metrics": self.objective.names, "layers that may be edited": [layer.name for layer in self.layers]}
        everywhere = self.processes.all_gather_object("the request", asked)
        names = dict.fromkeys(name for other in everywhere for name in other)
        if different := [name for name in names if any(other.get(name) != everywhere[0].get(name) for other in everywhere)]:
            raise UnlearnError(f"Arguments differ across ranks: {', '.join(different)}; give every process the same")
        for objective in (self.objective, *self.objectives.values()):
            refuse_different_data(objective)

    def _find_near(self) -> None:
        """Settle what lies near each concept."""
        self.near = self.find_near(self.objectives)
        for name, near in self.near.items():
            self.objectives[name].loaders = {**self.objectives[name].loaders, "near": near.splits}
            refuse_different_data(self.objectives[name])

    def _validate(self) -> None:
        """Measure what decides, before any edit; take over what an earlier run has forgotten."""
        earlier = earlier_edits(self.earlier) if self.earlier else {}
        if missing := [name for name in earlier if name not in self.objectives]:
            raise UnlearnError(f"earlier: {self.earlier} has also forgotten {some_of(missing)}; give its data in forget, too")
        if earlier:
            self.notes.append(
                "earlier: what was forgotten before was checked together with the new edits on the validation split; on the test "
                "split, and for collateral and scales, only what is new was measured"
            )
        self._refuse_twice()
        for name, objective in self.objectives.items():
            if name in earlier:
                self.concepts.append(Concept.taken_over(name, objective, *earlier[name]))
            else:
                held = self.holdout.get(name)
                self.concepts.append(Concept.measured(name, objective, self.request.forget_target, held))
            rehearse(objective, "forget")
        if not self.new:
            raise UnlearnError(f"earlier: the run in {self.earlier} has forgotten all of this; name another concept")
        rehearse(self.objective, "retain")
        if self.processes.in_step and not self.runner.is_sharded:
            self.notes.append("replay: off, as the module communicates in its steps; every evaluation was computed whole")
        for concept in self.concepts:
            if concept.name in self.near:
                data, binds = self.near[concept.name], self.method.binds_near()
                if concept.report is not None:  # its edit stays as it is, whatever that run has heeded
                    binds = binds and bool(concept.report.bounds.get("near", {}).get("binds"))
                tolerances = self.request.near_tolerance, self.request.retain_tolerance
                concept.near = Near.measured(concept.objective, data, binds, *tolerances)
                if concept.near is not None:
                    self.notes.append(concept.near.note(concept.name))
        for objective in (self.objective, *self.objectives.values()):
            objective.replays = self.runtime.replay and not self.processes.in_step

    def _refuse_twice(self) -> None:
        """Refuse the same data under two names: one edit would be made twice."""
        names: dict[str, str] = {}
        for name, objective in self.objectives.items() if self.several else ():
            other = names.setdefault(digest_of_data(objective, "forget", "train") or name, name)
            if other != name:
                raise UnlearnError(f"forget: {other!r} and {name!r} are the same data; ask for them once")

    def _context(self) -> Context:
        cache = self.runtime.retain_cache
        return Context(
            self.concepts,
            self.layers,
            self.objective,
            self.request.retain_tolerance,
            self.request.on_infeasible == "stop",
            self.progress,
            self.meter.phase,
            cache if isinstance(cache, RetainCache) else None,
            self.runtime.offload_gradient,
            notes=self.notes,
        )

    def _within_bounds(self, context: Context, outcomes: Mapping[str, Outcome]) -> dict[str, EditStep]:
        """The edits that meet both bounds on the validation split, all together: the same rule for every method."""
        edits = {c.name: edit for c in self.concepts if (edit := outcomes[c.name].edit) is not None}
        while edits and not (context.all_or_nothing and len(edits) < len(self.concepts)):
            self._measure_search(context, outcomes, edits)
            after = {name: outcomes[name].search_after for name in edits}
            own = [c for c in self.concepts if c.name in edits]
            failed = [c.name for c in own if not c.is_forgotten(after[c.name]["forget"])]
            near = {c.name: after[c.name]["near"] for c in own if c.near is not None and c.near.binds}
            usage = max(context.damage(found["retain"], near) for found in after.values())
            if not failed and usage <= 1:
                return edits
            for name in failed or edits:
                why = "misses the forget target" if failed else f"with all edits, constraint usage is {usage:.2f}"
                outcomes[name].notes.append(f"{name}: the method's edit is not made; {why} on the validation split")
            edits = {name: edit for name, edit in edits.items() if name not in failed} if failed else {}
            for outcome in outcomes.values():
                outcome.search_after = {}
        return {}

    def _measure_search(self, context: Context, outcomes: Mapping[str, Outcome], edits: Mapping[str, EditStep]) -> None:
        """Measure all edits together on the validation split, as far as the method has not."""
        near = {c.name for c in self.concepts if c.near is not None and c.name in edits}
        whole = all(outcomes[name].search_after for name in edits)
        if whole and all("near" in outcomes[name].search_after for name in near):
            return
        with context.edits.applied(*edits.values()):
            retain = {} if whole else self.objective.measured("retain", "val", edited="together")
            for name in edits:
                after = outcomes[name].search_after
                if not whole:
                    after = {"forget": self.objectives[name].measured("forget", "val", edited="together"), "retain": retain}
                if name in near and "near" not in after:
                    after = {**after, "near": self.objectives[name].measured("near", "val", edited="together")}
                outcomes[name].search_after = after

    def _collateral(self, context: Context, edits: Mapping[str, EditStep]) -> dict[str, dict[str, float]]:
        """What each edit alone does to every concept; those of an earlier run were measured there."""
        if not self.several:
            return {}
        new = [concept for concept in self.new if concept.name in edits]
        if len(new) > MAX_CONCEPTS:
            self.notes.append(f"collateral: measured for the first {MAX_CONCEPTS} of {len(new)} edits only")
        with self.meter.phase("collateral"):
            return collateral(new, edits, context)

    def _measure(self, context: Context, edits: Mapping[str, EditStep]) -> None:
        """Measure the test split, before and after; what was taken over was measured on it by its own run."""
        before, after = self.before, self.after
        if not self.several:
            self._measure_single(context, edits)
            return
        for concept in self.new:
            before.forget[concept.name] = concept.objective.measured("forget", "test")
            if concept.near is not None:
                before.near[concept.name] = concept.objective.measured("near", "test")
                concept.near.count("test")
        before.retain = self._retain_before(context)
        with context.edits.applied(*edits.values()):
            for concept in self.new:
                after.forget[concept.name] = concept.objective.measured("forget", "test", edited="together")
                if concept.near is not None:
                    after.near[concept.name] = concept.objective.measured("near", "test", edited="together")
            after.retain = self.objective.measured("retain", "test", edited="together")

    def _measure_single(self, context: Context, edits: Mapping[str, EditStep]) -> None:
        """Measure the test split of the only concept; with replay, as the search may have left it."""
        (concept,) = self.concepts
        objective, name = concept.objective, concept.name
        layers = [edit.layer for edit in edits.values()]
        kinds: list[Kind] = ["forget", "retain"] if concept.near is None else ["forget", "near", "retain"]
        found: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
        with nullcontext() if objective.is_replaying else objective.replaying(layers):
            for kind in kinds:
                with recorded(objective, kind, "test", layers) as first, context.edits.applied(*edits.values()):
                    found[kind] = first, objective.measured(kind, "test", edited=layers[0].name) if edits else first
        for measured, number in ((self.before, 0), (self.after, 1)):
            measured.forget[name], measured.retain = found["forget"][number], found["retain"][number]
            if concept.near is not None:
                measured.near[name] = found["near"][number]
                concept.near.count("test")

    def _retain_before(self, context: Context) -> dict[str, float]:
        """The retain metrics on the test split before any edit, measured or from the cache."""
        if context.retain_cache is None:
            return self.objective.measured("retain", "test")
        return context.retain_cache.measured(self.objective, "test", self.notes)

    def _draw(self, context: Context, findings: Findings) -> None:
        """Of a generator, pictures before any edit and with all of them."""
        edits = findings.edits
        for concept in self.progress.track([concept for concept in self.new if concept.name in edits], "gallery"):
            drawn = before_and_after(concept.objective, "forget", context.edits.applied(*edits.values()))
            findings.forget_galleries[concept.name] = drawn
        findings.retain_gallery = before_and_after(self.objective, "retain", context.edits.applied(*edits.values()))

    def _cost(self, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], list[str]]:
        """What the run cost, and what replay has to say."""
        objectives = [self.objective, *self.objectives.values()]
        cost = joined(self.processes.all_gather_object("cost", self.meter.report())) | {
            "evaluations": sum(len(outcome.trials) for outcome in outcomes.values()),
            "forward_samples": sum(objective.forward_samples for objective in objectives),
            "backward_samples": sum(objective.backward_samples for objective in objectives),
        }
        if not self.objective.replayed:
            return cost, []
        reports = [replay.report() for replay in self.objective.replayed]
        largest = ("budget_bytes", "most_held_bytes")
        replay = {name: (max if name in largest else sum)(report[name] for report in reports) for name in reports[0]}
        cost["replay"] = self.processes.broadcast("replay", replay)
        notes = [note for replay in self.objective.replayed for note in replay.notes()]
        said = self.processes.all_gather_object("notes", notes)
        return cost, list(dict.fromkeys(itertools.chain(*said)))

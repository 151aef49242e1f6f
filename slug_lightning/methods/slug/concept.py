"""One concept on its way to being forgotten: its bounds, its scores, its trials, and the edit that was chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.slug.candidates import Score, score_layers
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.precision_check import close_calls, rounding, rounding_errors
from slug_lightning.methods.slug.step_search import Trial, best_trial
from slug_lightning.objective.gradients import NoLossError
from slug_lightning.objective.metrics import constraint_usage, refuse_infinite
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import local, placed
from slug_lightning.tensors.layers import Layer, plain_parameters, refuse_unmovable
from slug_lightning.utils.modules import patch_prefix
from slug_lightning.utils.progress import Progress

ALTERNATIVES = 3
"""Layers whose gradient is kept after the search, for another one where the edits of several concepts do not go together."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of every request.

    Attributes:
        forget_target: value at which the forget metric counts as forgotten, or None for the default.
        retain_tolerance: how much each retain metric may lose.
        max_evaluations: most evaluations of a layer.
        margin: by what share of the smallest step that forgets the step goes beyond it.
        offload_gradient: whether the forget gradient waits in the host's memory for the retain gradient.
        alternatives: how many layers to keep beside the chosen one.
    """

    forget_target: float | None = None
    retain_tolerance: float = 0.01
    max_evaluations: int = 10
    margin: float = 0.0
    offload_gradient: bool = False
    alternatives: int = 0


class Request:
    """Makes the model forget one concept, on a bench.

    Args:
        name: of the concept.
        objective: measures it.
        layers: that may be edited.
        wanted: the bounds.
        progress: shows how far it is.
    """

    def __init__(self, name: str, objective: Objective, layers: Sequence[Layer], wanted: Wanted, progress: Progress) -> None:
        self.name = name
        self.objective = objective
        self.layers = {layer.name: layer for layer in layers}
        self.wanted = wanted
        self.progress = progress
        self.report = UnlearnReport("infeasible", name)
        self.gradient: dict[str, Tensor] = {}
        self.chosen: Trial | None = None
        """The step to take; None as long as there is none within the bounds."""
        self.is_taken_over = False
        """Whether an earlier run has chosen it."""
        self._scores: list[Score] = []
        self._errors: dict[str, tuple[float, float]] = {}

    # ---- the steps of a run, in order

    def validate(self) -> None:
        """Measure before the edit what decides, settle the target, and refuse what is forgotten already or not finite."""
        objective, report = self.objective, self.report
        report.search_before = {"forget": objective.measured("forget", "val")}
        refuse_infinite("forget", report.search_before["forget"])
        ((name, before),) = report.search_before["forget"].items()
        metric = objective.metrics[name]
        target, reason = self.wanted.forget_target, "given"
        if target is None and name == getattr(objective.module, "forget_metric", name):  # it may have been asked for another
            target, reason = getattr(objective.module, "forget_target", None), "the module's own"
        if target is None:
            target, reason = metric.default_target(before)
        target, reason = objective.processes.broadcast("target", (target, reason))
        if metric.reaches(before, target):
            why = getattr(objective.module, "nothing_to_forget", None)
            raise UnlearnError(
                f"forget_target: nothing to forget of {self.name!r}, {name} is {before:.4g} on the search data and meets the "
                f"target of {target:.4g} ({reason}) already; "
                + ((why and why()) or "look at the forget data, or give a stricter forget_target")
            )
        report.bounds = {
            "forget_metric": name,
            "forget_target": target,
            "forget_target_reason": reason,
            "retain_metrics": objective.names["retain"],
            "retain_tolerance": self.wanted.retain_tolerance,
        }

    def take_rounding(self) -> None:
        """Find out how far off a mixed precision puts the scores, on half a batch; where that cannot be told, a note says so."""
        objective = self.objective
        parameters = self.parameters()

        def scores(exact: bool) -> list[Score]:
            forget = self._waiting(objective.sample_gradient("forget", parameters, exact))
            retain = objective.sample_gradient("retain", parameters, exact)
            return score_layers(list(self.layers.values()), forget, retain, objective.processes)

        try:
            self._errors = rounding_errors(scores(exact=True), scores(exact=False))
        except Exception as error:
            # What fails in one of several processes must fail in all.
            if objective.processes.world_size > 1 and not isinstance(error, NoLossError):
                raise
            self.report.notes.append(f"precision: how much rounding matters could not be told ({error})")

    def measure(self, retain_gradient: Callable[[], dict[str, Tensor]]) -> None:
        """Both gradients, the scores, the fronts; of the gradients only what a front layer needs is kept."""
        layers = list(self.layers.values())
        forget = self._waiting(self.objective.gradient("forget", self.parameters()).tensors)
        retain = retain_gradient()
        self._scores = score_layers(layers, forget, retain, self.objective.processes)
        del retain  # before the few that are needed are copied
        if not self._scores:
            refuse_unmovable(layers)
        self.report.scores = [asdict(score) for score in self._scores]
        # Copies: the gradients lie in one piece, which would be kept for the sake of a few.
        self.gradient = {name: forget[name].clone() for layer in self.front() for name in layer.parameters}

    def search(self, bench: TemporaryEdits) -> None:
        """Let the layers of the front compete, as if nothing else were forgotten."""
        competition = self._competition(bench)
        front = [score for score in self._scores if score.on_front]
        trials, self.report.search_before["retain"] = competition.run(front)
        refuse_infinite("retain", self.report.search_before["retain"])
        metrics = self.objective.metrics.values()
        self.report.bounds["higher_is_better"] = {m.name: m.higher_is_better for m in metrics}
        self.report.trace = [asdict(trial) for trial in trials]
        self.chosen = best_trial(trials)
        precision = self.objective.runner.precision
        self.report.notes += close_calls(precision, self._scores, self._errors, trials, self.chosen, competition.error)
        self._keep_alternatives(trials)

    def search_again(self, bench: TemporaryEdits, kept: dict[str, float]) -> float:
        """Let the layers that were kept compete once more, in the presence of the other edits, which are on the bench.

        Args:
            bench: with the edits of all other concepts.
            kept: the retain metrics on search data, unedited.

        Returns:
            How much of the damage to what is kept is this edit's, as a share of the tolerance.
        """
        competition = self._competition(bench, kept)
        trials, without = competition.run([score for score in self._scores if score.layer in self.layers])
        self.report.trace += [asdict(trial) | {"together": True} for trial in trials]
        able = [t for t in trials if t.forgotten and t.constraint_usage is not None and math.isfinite(t.constraint_usage)]
        self.chosen = min(able, key=lambda t: (t.constraint_usage, t.relative_step), default=None)
        before = constraint_usage(self.objective.metrics_of("retain"), kept, without, self.wanted.retain_tolerance)
        return math.inf if self.chosen is None or self.chosen.constraint_usage is None else self.chosen.constraint_usage - before

    def take_over(self, report: UnlearnReport, patch: UnlearnPatch) -> None:
        """Take the edit of an earlier run on the same base.

        Raises:
            UnlearnError: if the model holds other tensors than that run's, if the patch is not that of the report, or if
                other metrics were watched.
        """
        for kind, earlier in (("forget", [report.bounds["forget_metric"]]), ("retain", report.bounds["retain_metrics"])):
            if (now := self.objective.names[kind]) != earlier:  # type: ignore[index]
                raise UnlearnError(
                    f"earlier: {self.name!r} was forgotten by {kind}_metric {', '.join(earlier)}, not by {', '.join(now)}; give "
                    "the same"
                )
        if patch.digest != report.patch_digest or len(patch.edits) != 1:
            raise UnlearnError(f"earlier: the patch of {self.name!r} is not the one that its report speaks of")
        held = plain_parameters(self.objective.module)
        (edit,) = patch.edits
        parameters = {}
        for short, base in patch.base.items():
            parameter = held.get(self._prefix + short)
            if parameter is None or not bitwise_equal(parameter, base):
                raise UnlearnError(
                    f"earlier: {short} is not what it was when {self.name!r} was forgotten; run on the model that the earlier "
                    "run began with"
                )
            parameters[self._prefix + short] = parameter
            self.gradient[self._prefix + short] = local(placed(edit.directions[short].to(parameter.device), parameter))
        self.is_taken_over = True
        self.report = replace(report, patch=patch)
        # By the patch, as layers may be grouped otherwise now.
        self.layers = {str(report.layer): Layer(str(report.layer), parameters)}
        (forget,) = report.search_after["forget"].values()
        self.chosen = Trial(str(report.layer), edit.step, report.relative_step or 0.0, True, None, forget, None)

    # ---- what it has found

    def parameters(self) -> dict[str, Any]:
        """Of all layers, by name."""
        return {name: p for layer in self.layers.values() for name, p in layer.parameters.items()}

    def front(self) -> list[Layer]:
        """The layers on the front that are still at hand."""
        return [self.layers[score.layer] for score in self._scores if score.on_front and score.layer in self.layers]

    @property
    def layer(self) -> Layer:
        """The edited one."""
        assert self.chosen is not None
        return self.layers[self.chosen.layer]

    def move(self, strength: float = 1.0) -> EditStep:
        """The chosen step, or a multiple of it."""
        assert self.chosen is not None
        return EditStep(self.layer, self.gradient, strength * self.chosen.step, self._prefix)

    def set_step(self, step: float) -> None:
        """Go further, or less far, along the chosen layer."""
        assert self.chosen is not None
        relative = self.chosen.relative_step * step / self.chosen.step
        self.chosen = replace(self.chosen, step=step, relative_step=relative)

    def edit(self, parents: list[dict[str, Any]]) -> Edit:
        """The chosen step for a patch; of a sharded model, every process must ask for it."""
        assert self.chosen is not None
        details = {"layer": self.chosen.layer, "relative_step": self.chosen.relative_step}
        details |= {"before": self.report.before, "after": self.report.after}
        return Edit(self.name, self.chosen.step, self.move().directions, details, parents=parents)

    def is_forgotten(self, value: float) -> bool:
        """Whether a value of the forget metric meets the target."""
        metric = self.objective.metrics[self.report.bounds["forget_metric"]]
        return math.isfinite(value) and metric.reaches(value, self.report.bounds["forget_target"])

    # ---- inside

    @property
    def _prefix(self) -> str:
        return patch_prefix(self.objective.module)

    def _waiting(self, forget: dict[str, Tensor]) -> dict[str, Tensor]:
        """The forget gradient where it waits for the retain gradient."""
        return {name: tensor.cpu() for name, tensor in forget.items()} if self.wanted.offload_gradient else forget

    def _competition(self, bench: TemporaryEdits, kept: dict[str, float] | None = None) -> LayerSearch:
        bounds = self.report.bounds
        return LayerSearch(
            self.objective,
            self.layers,
            self.gradient,
            target=bounds["forget_target"],
            before=self.report.search_before["forget"][bounds["forget_metric"]],
            tolerance=self.wanted.retain_tolerance,
            max_evaluations=self.wanted.max_evaluations,
            progress=self.progress,
            unit=rounding(self.objective.runner.precision),
            margin=self.wanted.margin,
            bench=bench,
            kept=kept,
        )

    def _keep_alternatives(self, trials: Sequence[Trial]) -> None:
        """Let go of the layers that neither were chosen nor may be later, and of their gradients."""
        measured = [t for t in trials if t.dropped or (t.forgotten and t.retain is not None)]
        measured.sort(key=lambda t: (t is not self.chosen, math.inf if t.constraint_usage is None else t.constraint_usage))
        keep = [t.layer for t in measured[: self.wanted.alternatives + 1]] if self.chosen else []
        self.layers = {name: layer for name, layer in self.layers.items() if name in keep}
        held = {name for layer in self.layers.values() for name in layer.parameters}
        self.gradient = {name: gradient for name, gradient in self.gradient.items() if name in held}

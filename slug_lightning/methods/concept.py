"""One unlearning request: its forget set, its bound, and where an earlier run has its edit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.metrics import Metric, refuse_infinite
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import local, shard_like
from slug_lightning.tensors.layers import Layer, plain_parameters
from slug_lightning.utils.modules import patch_prefix


@dataclass
class Concept:
    """State of one unlearning request before a method runs.

    Attributes:
        name: in words.
        objective: measures its forget set, and the retain set.
        metric: the forget metric.
        target: value at which it counts as forgotten.
        reason: where the target came from.
        before: the metric on the validation split, unedited.
        report: of the earlier run that has forgotten it, or None.
        edit: of that run, or None.
    """

    name: str
    objective: Objective
    metric: Metric
    target: float
    reason: str
    before: float
    report: UnlearnReport | None = None
    edit: EditStep | None = None

    @classmethod
    def measured(cls, name: str, objective: Objective, target: float | None) -> Concept:
        """Measure a new request and settle its target.

        Raises:
            UnlearnError: if the metric isn't finite, or meets the target already.
        """
        values = objective.measured("forget", "val")
        refuse_infinite("forget", values)
        ((metric_name, before),) = values.items()
        metric, hooks, reason = objective.metrics[metric_name], objective.hooks, "given"
        if target is None and metric_name == (hooks.forget_metric or metric_name):  # the request may name another
            target, reason = hooks.forget_target, "the module's own"
        if target is None:
            target, reason = metric.default_target(before)
        target, reason = objective.processes.broadcast("target", (target, reason))
        if metric.reaches(before, target):
            hint = hooks.nothing_to_forget and hooks.nothing_to_forget()
            raise UnlearnError(
                f"forget_target: nothing to forget of {name!r}, {metric_name} is {before:.4g} on the validation split and "
                f"meets the target of {target:.4g} ({reason}) already; "
                + (hint or "look at the forget data, or give a stricter forget_target")
            )
        return cls(name, objective, metric, target, reason, before)

    @classmethod
    def taken_over(cls, name: str, objective: Objective, report: UnlearnReport, patch: UnlearnPatch) -> Concept:
        """Take the edit of an earlier run on the same base.

        Raises:
            UnlearnError: if the model holds other tensors than that run's, if the patch is not that of the report, or if
                other metrics were watched.
        """
        bounds = report.bounds
        for kind, earlier in (("forget", [bounds["forget_metric"]]), ("retain", bounds["retain_metrics"])):
            if (now := objective.names[kind]) != earlier:  # type: ignore[index]
                raise UnlearnError(
                    f"earlier: {name!r} was forgotten by {kind}_metric {', '.join(earlier)}, not by {', '.join(now)}; give "
                    "the same"
                )
        if patch.digest != report.patch_digest or len(patch.edits) != 1:
            raise UnlearnError(f"earlier: the patch of {name!r} is not the one that its report speaks of")
        held, prefix = plain_parameters(objective.module), patch_prefix(objective.module)
        (edit,) = patch.edits
        parameters, direction = {}, {}
        for short, base in patch.base.items():
            parameter = held.get(prefix + short)
            if parameter is None or not bitwise_equal(parameter, base):
                raise UnlearnError(
                    f"earlier: {short} is not what it was when {name!r} was forgotten; run on the model that the earlier "
                    "run began with"
                )
            parameters[prefix + short] = parameter
            direction[prefix + short] = local(shard_like(edit.directions[short].to(parameter.device), parameter))
        # By the patch, as layers may be grouped otherwise now.
        layer = Layer(str(report.layer), parameters, prefix=prefix)
        higher = bounds["higher_is_better"][bounds["forget_metric"]]
        (before,) = report.search_before["forget"].values()
        return cls(
            name,
            objective,
            Metric(bounds["forget_metric"], higher),
            bounds["forget_target"],
            bounds["forget_target_reason"],
            before,
            replace(report, patch=patch),
            EditStep(layer, direction, edit.step),
        )

    def is_forgotten(self, value: float) -> bool:
        """Whether a value of the forget metric meets the target."""
        return math.isfinite(value) and self.metric.reaches(value, self.target)

    def share(self, value: float) -> float:
        """How much of the way from before to the target a value of the forget metric has gone.

        Infinite where that can't be known: the model is broken, or no answer is right any more, as after any larger step.
        """
        at_the_end = self.metric.higher_is_better and value <= 0 <= self.target
        return (value - self.before) / (self.target - self.before) if math.isfinite(value) and not at_the_end else math.inf

    def bounds(self, retain_tolerance: float) -> dict[str, Any]:
        """The bounds as the report states them."""
        names, metrics = self.objective.names["retain"], self.objective.metrics.values()
        return {
            "forget_metric": self.metric.name,
            "forget_target": self.target,
            "forget_target_reason": self.reason,
            "retain_metrics": names,
            "retain_tolerance": retain_tolerance,
            "higher_is_better": {m.name: m.higher_is_better for m in metrics},
        }

"""One unlearning request: its forget set, its bound, and where an earlier run has its edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.near import Near
from slug_lightning.methods.targets import Target, holdout_goals, settle_targets, share_of
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.metrics import Goal, Metric, refuse_infinite
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.dtensor import local, shard_like
from slug_lightning.tensors.layers import Layer, plain_parameters
from slug_lightning.utils.loaders import Batches
from slug_lightning.utils.modules import patch_prefix


@dataclass
class Concept:
    """State of one unlearning request before a method runs.

    Attributes:
        name: in words.
        objective: measures its forget set, and the retain set.
        targets: where each of its forget metrics must get.
        report: of the earlier run that has forgotten it, or None.
        edit: of that run, or None.
        near: what lies near it, or None.
    """

    name: str
    objective: Objective
    targets: list[Target]
    report: UnlearnReport | None = None
    edit: EditStep | None = None
    near: Near | None = None

    @classmethod
    def measured(
        cls, name: str, objective: Objective, given: Goal | Mapping[str, Goal] | str | None, holdout: Batches | None = None
    ) -> Concept:
        """Measure a new request and settle its targets.

        Raises:
            UnlearnError: if a metric isn't finite, if all meet their target already, or if `given` is "as_holdout" and the
                holdout samples can't tell.
        """
        values = objective.measured("forget", "val")
        refuse_infinite("forget", values)
        said = "given"
        if isinstance(given, str):
            if holdout is None:
                raise UnlearnError(
                    f"forget_target: {given!r} needs samples that the model was never trained on; give the data as a "
                    "SampleDataModule, which has a holdout set"
                )
            given, said = holdout_goals(objective, holdout), "95 % interval of the holdout samples"
        targets = settle_targets(objective, values, given, said)
        if all(target.was_met for target in targets):
            found = "; ".join(
                f"{t.metric.name} is {t.before:.4g} on the validation split and meets the target of {t.words} "
                f"({t.reason}) already"
                for t in targets
            )
            raise UnlearnError(
                f"forget_target: nothing to forget of {name!r}, {found}; "
                + (objective.hint or "look at the forget data, or give a stricter forget_target")
            )
        return cls(name, objective, targets)

    @classmethod
    def taken_over(cls, name: str, objective: Objective, report: UnlearnReport, patch: UnlearnPatch) -> Concept:
        """Take the edit of an earlier run on the same base.

        Raises:
            UnlearnError: if the model holds other tensors than that run's, if the patch is not that of the report, or if
                other metrics were watched.
        """
        bounds = report.bounds
        goals, names = report.goals, objective.names
        for kind, now, earlier in (
            ("forget", names["forget"], list(goals)),
            ("retain", names["retain"], bounds["retain_metrics"]),
        ):
            if now != earlier:
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
        before = report.search_before["forget"]
        targets = [
            Target(Metric(metric, bounds["higher_is_better"][metric]), goal, bounds["forget_target_reason"], before[metric])
            for metric, goal in goals.items()
        ]
        return cls(name, objective, targets, replace(report, patch=patch), EditStep(layer, direction, edit.step))

    def is_forgotten(self, values: Mapping[str, float]) -> bool:
        """Whether values of all forget metrics, by name, meet their targets."""
        return all(target.is_met(values[target.metric.name]) for target in self.targets)

    def trial(self, edit: EditStep, relative_step: float, values: Mapping[str, float]) -> Trial:
        """Make the trial of an edit from the forget metrics that were measured with it.

        A model that gives NaN is broken: too large a step, whatever else, so that it counts as forgotten.
        """
        forget = self.value_that_counts(values)
        broken = not math.isfinite(forget)
        return Trial(
            edit.layer.name,
            edit.step,
            relative_step,
            forgotten=broken or self.is_forgotten(values),
            constraint_usage=math.inf if broken else None,
            forget=forget,
            retain=None,
            forget_metrics=dict(values) if len(values) > 1 else None,
        )

    def value_that_counts(self, values: Mapping[str, float]) -> float:
        """The forget metric with the smallest share of its way; NaN or infinite if any is."""
        broken = [value for value in values.values() if not math.isfinite(value)]
        return broken[0] if broken else values[self.counting(values).metric.name]

    def values_of(self, trial: Trial) -> dict[str, float]:
        """The forget metrics of a trial, by name."""
        return trial.forget_metrics or {self.targets[0].metric.name: trial.forget}

    def share(self, trial: Trial) -> float:
        """How much of the way from before to the target a trial has gone: that of the metric with the least.

        Infinite where that can't be known: the model is broken, or no answer is right any more, as after any larger step.
        """
        return share_of(self.targets, self.values_of(trial))

    def counting(self, values: Mapping[str, float]) -> Target:
        """The target that counts: of the metric with the smallest share of its way."""
        return min(self.targets, key=lambda target: target.share(values[target.metric.name]))

    def bounds(self, retain_tolerance: float) -> dict[str, Any]:
        """The bounds as the report states them."""
        names, metrics = self.objective.names["retain"], self.objective.metrics.values()
        first = self.targets[0]
        return {
            "forget_metric": first.metric.name,
            "forget_target": first.goal,
            "forget_target_reason": first.reason,
            "forget_targets": {target.metric.name: target.goal for target in self.targets},
            "retain_metrics": names,
            "retain_tolerance": retain_tolerance,
            **({} if self.near is None else {"near_tolerance": self.near.tolerance, "near": self.near.to_dict()}),
            "higher_is_better": {m.name: m.higher_is_better for m in metrics},
        }

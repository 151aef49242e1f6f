"""The evidence: what was edited, why, what it cost and how well it held; plain data -> JSON, table, figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from slug_lightning.objective.metrics import USAGE_SLACK, Goal, Metric
from slug_lightning.objective.samples import Gallery
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.base import Report, number, table
from slug_lightning.reports.figures import Values, pareto_figure, sample_figures, strength_figure, trade_off_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class UnlearnReport(Report):
    """What a run over one concept has found.

    Attributes:
        status: "unlearned", or "infeasible" where no step met both bounds and the weights are as they were.
        concept: what the request asks to forget, in words.
        layer: the edited layer, or None.
        tensors: names of the edited tensors.
        step_size: λ, or None.
        relative_step: ‖Δ‖/‖θ‖ of the change Δ, over all tensors that are edited, or None.
        bounds: metrics, directions, target and tolerance, and where the target came from.
        scores: every candidate layer: tower, importance, alignment, forget_norm, weight_norm, on_front.
        trace: every evaluation: layer, step, relative_step, forget, retain, forgotten, constraint_usage (the largest loss of
            a retain metric as a share of its tolerance); `together` where the edits of other concepts were there, too;
            `direction`, `curve` and `distance` where it isn't the line of the gradient; `ended` where a way was given up.
        before: metrics on the test split, which the search never saw: `{"forget": {...}, "retain": {...}}`, and the retain
            metrics on near data as "near", where there are some.
        after: the same after the edit.
        search_before: the same on the validation split.
        search_after: the same on the validation split.
        strengths: where asked for, the metrics on the validation split over the edit's strength, of which 1 is the whole edit:
            `[{"strength": …, "forget": {…}, "retain": {…}}, …]`.
        holds: whether both bounds hold on the test split as well; None if infeasible.
        cost: by phase `seconds`, `peak_bytes` and, if asked for, `flops`; `lower_bound`, the gradients' share, and the
            `ratio` to it, both empty if no retain gradient was computed; evaluations, samples forward and backward; what
            `replay` held and spared.
        notes: what was decided on the way, such as how a single set was split.
        versions: of the libraries.
        patch_digest: of the patch.
        patch: the edit itself; saved beside the report, not in it.
        gallery: of a generator, pictures before and after, of "forget" and of "retain" data; not saved in the report.

    Example:
        >>> report = UnlearnReport(status="infeasible", concept="cats")
        >>> UnlearnReport.from_dict(report.to_dict()) == report
        True
    """

    status: Literal["unlearned", "infeasible"]
    concept: str
    layer: str | None = None
    tensors: list[str] = field(default_factory=list)
    step_size: float | None = None
    relative_step: float | None = None
    bounds: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Values] = field(default_factory=dict)
    after: dict[str, Values] = field(default_factory=dict)
    search_before: dict[str, Values] = field(default_factory=dict)
    search_after: dict[str, Values] = field(default_factory=dict)
    strengths: list[dict[str, Any]] = field(default_factory=list)
    holds: bool | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    patch_digest: str | None = None
    patch: UnlearnPatch | None = field(default=None, repr=False, compare=False)
    gallery: dict[str, Gallery] = field(default_factory=dict, repr=False, compare=False)

    def _shown(self, width: int) -> Iterator[Table | str]:
        metrics = table(f"{self.concept}: {self.status}", ("test split", "before", "after", "bound"), bold=True)
        for kind in ("forget", "near", "retain"):
            for name, value in self.before.get(kind, {}).items():
                after, bound = number(self.after[kind][name]), self.bound(kind, name, value)
                metrics.add_row(f"{kind}: {name}", number(value), after, bound)
        yield metrics
        if self.layer is not None:
            yield f"edited: {self.layer}, relative step {number(self.relative_step)}"
        yield from self._cost_and_notes(len(self.trace), width)
        yield self._verdict()

    def _verdict(self) -> str:
        """One sentence on how it ended; where it failed, with how near the nearest trial came."""
        if self.status == "unlearned":
            return "Both bounds hold on the test split as well." if self.holds else "A bound does not hold on the test split."
        verdict = "No edit meets both bounds; the weights are as they were."
        forgot = [t for t in self.trace if t.get("forgotten", True) and t.get("constraint_usage") is not None]
        if forgot:
            near = min(forgot, key=lambda t: t["constraint_usage"])
            kept = ", ".join(
                f"{'' if kind == 'retain' else 'near '}{name}={number(value)} "
                f"(bound {self.bound(kind, name, self.search_before[kind][name])})"
                for kind in ("near", "retain")
                for name, value in (near.get(kind) or {}).items()
            )
            is_near = near["retain"] is None and near.get("near") is not None
            which = "near_tolerance" if is_near else "retain_tolerance"
            nearest = (
                f"{verdict} Nearest: {near['layer']} reaches the forget target at relative step {near['relative_step']:.4f}, "
                f"but violates {which}: {kept}."
            )
            enough = near["constraint_usage"] * (self.bounds[which] + USAGE_SLACK)
            if not math.isfinite(enough):
                return nearest
            found = "it; what the rest loses was not measured" if is_near else "all bounds"
            return f"{nearest} With {which}={math.ceil(1000 * enough) / 1000:g} it would be within {found}."
        if any(t.get("forgotten") for t in self.trace):
            return f"{verdict} Some reach the forget target, and then the model breaks or a bound fails; see the notes."
        ended = any(str(t.get("ended")).startswith("max_step") for t in self.trace)
        options = "max_step, or max_evaluations" if ended else "max_evaluations"
        return f"{verdict} None reaches the forget target{self._furthest()}: raise {options}, or give another forget_target."

    def _furthest(self) -> str:
        """How far the trial came that came furthest, in words."""
        tried = [t for t in self.trace if math.isfinite(t["forget"])]
        if not tried:
            return ""
        best = min(tried, key=self._missing)
        values = self._forgotten_by(best)
        shown = ", ".join(f"{name}={number(value)} (target {self.bound('forget', name, None)})" for name, value in values.items())
        usage = best.get("constraint_usage")
        cost = "" if usage is None else f" and uses {usage:.2f} of what may be lost"
        return f"; the furthest, {best['layer']} at relative step {best['relative_step']:.4f}, comes to {shown}{cost}"

    def _forgotten_by(self, trial: Mapping[str, Any]) -> dict[str, float]:
        """The forget metrics of a trial; of one, what the trace has."""
        return trial.get("forget_metrics") or {next(iter(self.goals)): trial["forget"]}

    def _missing(self, trial: Mapping[str, Any]) -> float:
        """What share of the way a trial's forget metric is from its target that is furthest."""
        missing = [0.0]
        for name, value in self._forgotten_by(trial).items():
            goal, before = self.goals[name], self.search_before["forget"][name]
            if not Metric(name, self.bounds["higher_is_better"][name]).reaches(value, goal):
                edges = [goal] if isinstance(goal, (int, float)) else goal
                missing.append(min(abs(value - edge) / (abs(before - edge) or 1.0) for edge in edges))
        return max(missing)

    def bound(self, kind: str, name: str, before: float | None) -> str:
        """What a metric must meet, in words."""
        higher = self.bounds["higher_is_better"][name]
        if kind == "forget":
            goal = self.goals[name]
            if not isinstance(goal, (int, float)):
                return f"{number(goal[0])} to {number(goal[1])}"
            return f"{'≤' if higher else '≥'} {number(goal)}"
        if before is None:
            return "–"
        if kind == "near" and not self.bounds["near"]["binds"]:
            return "no bound"
        return f"{'≥' if higher else '≤'} {number(self.limit(name, before, kind))}"

    @property
    def goals(self) -> dict[str, Goal]:
        """The target of each forget metric; a version before this one had a single metric."""
        bounds = self.bounds
        return dict(bounds.get("forget_targets") or {bounds["forget_metric"]: bounds["forget_target"]})

    def remembered(self, values: Mapping[str, float]) -> list[str]:
        """Name the forget metrics, of these values, that miss their target."""
        higher = self.bounds["higher_is_better"]
        return [name for name, goal in self.goals.items() if not Metric(name, higher[name]).reaches(values[name], goal)]

    def limit(self, name: str, before: float, kind: str = "retain") -> float:
        """What a retain metric may be at worst, on retain data or on near ones."""
        return Metric(name, self.bounds["higher_is_better"][name]).limit(before, self.bounds[f"{kind}_tolerance"])

    def limits(self) -> Values:
        """What each retain metric may be at worst, on the validation split."""
        return {name: self.limit(name, value) for name, value in self.search_before["retain"].items()}

    def near_limits(self) -> Values:
        """What each metric may be at worst on near data, on the validation split; none where these don't bind."""
        near = self.search_before.get("near", {}) if self.bounds.get("near", {}).get("binds") else {}
        return {name: self.limit(name, value, "near") for name, value in near.items()}

    def strength_figure(self, curves: dict[str, list[dict[str, Any]]]) -> Figure:
        """Curves over the strength of edits, by concept, with the bounds of this report."""
        return strength_figure(curves, self.goals, self.limits())

    def figures(self) -> dict[str, Figure]:
        """Pictures of the run: "pareto", the layers with the front, where scored; "trade_off", the search and the choice.

        And, where measured, "strength": what more or less of the edit does; of a generator, "samples/forget" and
        "samples/retain": what it draws before and after.
        """
        scored = bool(self.scores) and all(s["alignment"] is not None for s in self.scores)
        figures = {"pareto": pareto_figure(self.concept, self.scores, self.layer)} if scored else {}
        figures["trade_off"] = trade_off_figure(
            self.trace,
            self.search_before,
            self.search_after,
            None if self.layer is None else (self.layer, self.relative_step),
            self.goals,
            self.limits(),
            self.near_limits(),
        )
        if self.strengths:
            figures["strength"] = self.strength_figure({self.concept: self.strengths})
        return figures | sample_figures(self.gallery, self.concept)

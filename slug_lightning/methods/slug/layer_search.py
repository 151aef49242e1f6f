"""Search the candidate layers: each finds a step that forgets, and what that costs the retain set decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from slug_lightning.methods.base import Context, Trial, recorded
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.choice import Choice, Decision
from slug_lightning.methods.slug.curves import Point
from slug_lightning.methods.slug.precision_check import rounding, usage_error
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.methods.slug.step_search import START, StepSearch
from slug_lightning.objective.log_capture import LogReader
from slug_lightning.objective.objective import LOSS
from slug_lightning.patches.temporary import EditStep


class LayerSearch:
    """Finds for every layer a step that just forgets, then measures the retain metrics, where the outcome depends on them.

    The forget metric comes first: it is measured on few samples and decides the step. The retain metrics are measured once
    for each layer that forgets, the most promising first, and the measurement of a layer that can no longer win is broken
    off. With replay, only what a layer changes is computed. If edits of other concepts are in the model, `retain_before` has
    the retain metrics on the validation split without any.
    """

    def __init__(
        self,
        concept: Concept,
        context: Context,
        points: Mapping[str, Point],
        *,
        search: StepSearch,
        choice: Choice,
        max_evaluations: int,
        step_margin: float = 0.0,
        retain_before: Mapping[str, float] | None = None,
    ) -> None:
        self.concept = concept
        self.objective = concept.objective
        self.context = context
        self.points = points
        self.search = search
        self.choice = choice
        self.max_evaluations = max_evaluations
        self.step_margin = step_margin
        self.retain_before = retain_before
        self.trials: list[Trial] = []
        self.error = 0.0
        """How far off rounding may put the constraint usage of a trial; known after `run`."""
        self.smallest: dict[str, Trial] = {}
        """By layer, the trial with the smallest step that forgets."""
        self._steps: dict[str, Trial] = {}
        # Of a loss, what is missing is known, and with it about where to start.
        self._gain = concept.target - concept.before if concept.metric.name == LOSS else None

    def run(self, layers: Sequence[LayerStatistics]) -> tuple[Decision, dict[str, float]]:
        """Search these layers.

        Returns:
            The decision over all trials so far, and the retain metrics on the validation split without a step of these layers.
        """
        begun = len(self.trials)
        tensors = [layer.layer for layer in layers]
        with (
            self.context.progress.bar("search", len(layers) * self.max_evaluations) as advance,
            recorded(self.objective, "forget", "val", tensors),
        ):
            for layer in layers:
                self._search_steps(layer, advance)
        able = [layer for layer in layers if layer.name in self._steps]
        # First order: a step λ raises the retain loss by λ·<g_f, g_r>.
        able.sort(key=self._first_order_cost)
        with recorded(self.objective, "retain", "val", [layer.layer for layer in able]) as without:
            before = without if self.retain_before is None else self.retain_before
            unit = rounding(self.objective.runner.precision)
            self.error = usage_error(self.objective.metrics_of("retain"), before, self.context.retain_tolerance, unit)
            for layer in self.context.progress.track(able, "search, retain metrics"):
                self._measure_retain(layer.name, before)
        for layer in layers:
            self.context.progress.say(_line(layer.name, [t for t in self.trials[begun:] if t.layer == layer.name]))
        return self.choice(self.trials), without

    def _first_order_cost(self, layer: LayerStatistics) -> float:
        step = self._steps[layer.name].relative_step * layer.weight_norm / layer.forget_norm  # as along the gradient
        return step * layer.forget_norm * layer.retain_norm * layer.alignment

    def edit(self, trial: Trial) -> EditStep:
        """The edit of a trial."""
        smallest = self.smallest.get(trial.layer, trial)
        return self.points[trial.layer](trial.relative_step, straight_after=smallest.relative_step)

    def _search_steps(self, layer: LayerStatistics, advance: Callable[[], None]) -> None:
        """Find the smallest step of a layer that forgets, and the one with the margin."""
        start = START if self._gain is None else _first_step(layer, self._gain)
        evaluate = partial(self._forget, layer.name, advance)
        tried = list(self.search(evaluate, self.concept.share, self.max_evaluations, start))
        if (found := smallest_step(tried)) is not None:
            self._gain = found.relative_step * layer.weight_norm / layer.forget_norm * layer.forget_norm**2
            self.smallest[layer.name] = self._steps[layer.name] = found
            if self.step_margin:
                tried.append(evaluate(found.relative_step * (1 + self.step_margin), found.relative_step))
                if tried[-1].forgotten and math.isfinite(tried[-1].forget):  # else the model breaks there
                    self._steps[layer.name] = tried[-1]
        self.trials += tried

    def _forget(self, layer: str, advance: Callable[[], None], distance: float, straight_after: float = math.inf) -> Trial:
        """Measure only whether a step forgets."""
        edit = self.points[layer](distance, straight_after=straight_after)
        with self.context.edits.applied(edit):
            (value,) = self.objective.measured("forget", "val", edited=layer).values()
        advance()
        # A model that gives NaN is broken: too large a step, whatever else.
        broken = not math.isfinite(value)
        forgotten = broken or self.concept.is_forgotten(value)
        return Trial(layer, edit.step, distance, forgotten, math.inf if broken else None, value, None)

    def _measure_retain(self, layer: str, before: Mapping[str, float]) -> None:
        """Measure what the step of a layer costs; if that is too much, the one without the margin."""
        for trial in dict.fromkeys((self._steps[layer], self.smallest[layer])):
            whole = self._retain(trial, before, self.choice.usage_limit(t for t in self.trials if t.retain is not None))
            self.trials[self.trials.index(trial)] = whole
            if whole.dropped or whole.feasible:
                break

    def _retain(self, trial: Trial, before: Mapping[str, float], limit: float) -> Trial:
        """Measure what a step costs, unless it can no longer win for certain."""
        metrics = self.objective.metrics_of("retain")

        def hopeless(reader: LogReader) -> bool:
            bounds = self.objective.at_best("retain", "val", reader) if limit < math.inf else {}
            known = {name: metric for name, metric in metrics.items() if name in bounds}
            return bool(known) and self.context.usage(bounds, before, known) > limit + self.error

        with self.context.edits.applied(self.edit(trial)):
            after = self.objective.measure("retain", "val", edited=trial.layer, stop=hopeless)
        if after is None:
            return replace(trial, dropped=True)
        return replace(trial, retain=after, constraint_usage=self.context.usage(after, before))


def smallest_step(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the smallest step that forgets and leaves a model that works."""
    found = [t for t in trials if t.forgotten and math.isfinite(t.forget)]
    return min(found, key=lambda t: t.relative_step, default=None)


def _first_step(layer: LayerStatistics, gain: float) -> float:
    """The relative step that raises the forget loss by `gain` at first order: a step λ raises it by λ‖g_f‖²."""
    return min(max(gain / (layer.forget_norm * layer.weight_norm), START / 100), 1.0)


def _line(layer: str, trials: Sequence[Trial]) -> str:
    """What became of a layer, for whoever watches."""
    last = next((trial for trial in trials if trial.dropped or trial.retain), None)
    if last is None:
        found = "does not reach the forget target"
    else:
        found = f"reaches the forget target at step {last.relative_step:.4f}"
        if last.dropped:
            found += ", retain metrics not measured to the end: it cannot win"
        else:
            found += "".join(f", {name}={value:.4f}" for name, value in (last.retain or {}).items())
            found += "" if last.feasible else " (violates retain_tolerance)"
    return f"{layer}: {len(trials)} evaluations, {found}"

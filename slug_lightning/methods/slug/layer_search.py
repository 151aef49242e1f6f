"""Let the layers of the front compete: each finds a step that forgets, and what that costs decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from slug_lightning.methods.slug.candidates import Score
from slug_lightning.methods.slug.precision_check import usage_error
from slug_lightning.methods.slug.step_search import START, Trial, search_step
from slug_lightning.objective.log_capture import LogReader
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.objective.objective import LOSS, Kind, Objective
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.tensors.dtensor import local, write_local
from slug_lightning.tensors.layers import Layer
from slug_lightning.utils.modules import patch_prefix
from slug_lightning.utils.progress import Progress


class LayerSearch:
    """Finds for every layer a step that just forgets, then measures what is kept, where the outcome depends on it.

    The forget metric comes first: it is measured on few samples and decides the step. What is kept is measured once for
    each layer that forgets, the most promising first, and the measurement of a layer that can no longer win is broken
    off. With `objective.replay` only what a layer changes is computed.

    Args:
        objective: measures.
        layers: by name.
        gradient: g_f, by tensor name.
        target: of the forget metric.
        before: the forget metric on search data, unedited.
        tolerance: of the retain metrics.
        max_evaluations: of the forget metric for each layer.
        progress: shows how far it is.
        unit: unit roundoff of the precision, where it is worse than 32 bits.
        margin: by what share of the smallest step that forgets a step goes beyond it.
        bench: where edits are tried, in the presence of others that are there already.
        kept: the retain metrics on search data, unedited, if there are other edits now.
    """

    def __init__(
        self,
        objective: Objective,
        layers: Mapping[str, Layer],
        gradient: Mapping[str, Tensor],
        *,
        target: float,
        before: float,
        tolerance: float,
        max_evaluations: int,
        progress: Progress,
        unit: float = 0.0,
        margin: float = 0.0,
        bench: TemporaryEdits | None = None,
        kept: Mapping[str, float] | None = None,
    ) -> None:
        self.objective = objective
        self.layers = layers
        self.gradient = gradient
        self.target = target
        self.before = before
        self.tolerance = tolerance
        self.max_evaluations = max_evaluations
        self.progress = progress
        self.unit = unit
        self.margin = margin
        self.bench = bench or TemporaryEdits()
        self.kept = kept
        self.error = 0.0
        """How far off rounding may put the damage of a trial; known after `run`."""
        (self.name,) = objective.names["forget"]
        self.metric = objective.metrics[self.name]

    def run(self, front: Sequence[Score]) -> tuple[list[Trial], dict[str, float]]:
        """Hold the competition.

        Args:
            front: scores of the layers that take part.

        Returns:
            Every trial, in order, and the retain metrics on search data without a step of these layers.
        """
        trials: list[Trial] = []
        smallest: dict[str, Trial] = {}
        steps: dict[str, Trial] = {}
        gain = self.target - self.before if self.name == LOSS else None
        with (
            self.progress.bar("search", len(front) * self.max_evaluations) as advance,
            recorded(self.objective, "forget", "val", self._of(front)),
        ):
            for score in front:
                start = START if gain is None else _first_step(score, gain)
                evaluate = partial(self._forget, score, advance)
                tried = search_step(evaluate, self._share, self.max_evaluations, start)
                if (found := smallest_step(tried)) is not None:
                    gain = found.step * score.forget_norm**2
                    smallest[score.layer] = found
                    steps[score.layer] = self._beyond(found, evaluate, tried)
                trials += tried
        able = [score for score in front if score.layer in steps]
        # First order: a step λ raises the retain loss by λ·<g_f, g_r>.
        able.sort(key=lambda s: steps[s.layer].step * s.forget_norm * s.retain_norm * s.alignment)
        best = math.inf
        with recorded(self.objective, "retain", "val", self._of(able)) as without:
            before = without if self.kept is None else self.kept
            self.error = usage_error(self.objective.metrics_of("retain"), before, self.tolerance, self.unit)
            for score in self.progress.track(able, "search, what is kept"):
                for trial in dict.fromkeys((steps[score.layer], smallest[score.layer])):
                    whole = self._retain(trial, before, best)
                    trials[trials.index(trial)] = whole
                    best = best if whole.constraint_usage is None else min(best, whole.constraint_usage)
                    if whole.dropped or whole.feasible:
                        break  # else without the margin, which is more than what is kept allows
        for score in front:
            self.progress.say(_line(score.layer, [t for t in trials if t.layer == score.layer]))
        return trials, without

    def _beyond(self, found: Trial, evaluate: Callable[[float], Trial], tried: list[Trial]) -> Trial:
        """The step with the margin, which is tried, too; without one, or if the model breaks there, the smallest one."""
        if not self.margin:
            return found
        tried.append(evaluate(found.relative_step * (1 + self.margin)))
        return tried[-1] if tried[-1].forgotten and math.isfinite(tried[-1].forget) else found

    def _forget(self, score: Score, advance: Callable[[], None], relative_step: float) -> Trial:
        """Measure only whether a step forgets."""
        step = relative_step * score.weight_norm / score.forget_norm
        with self._step(score.layer, step):
            value = self.objective.measured("forget", "val", edited=score.layer)[self.name]
        advance()
        # A model that gives NaN is broken: too large a step, whatever else.
        broken = not math.isfinite(value)
        forgotten = broken or self.metric.reaches(value, self.target)
        return Trial(score.layer, step, relative_step, forgotten, math.inf if broken else None, value, None)

    def _retain(self, trial: Trial, before: Mapping[str, float], best: float) -> Trial:
        """Measure what a step costs, unless it costs more than the best one for certain."""
        metrics = self.objective.metrics_of("retain")

        def hopeless(reader: LogReader) -> bool:
            bounds = self.objective.at_best("retain", "val", reader) if best < math.inf else {}
            known = {name: metric for name, metric in metrics.items() if name in bounds}
            return bool(known) and constraint_usage(known, before, bounds, self.tolerance) > best + self.error

        with self._step(trial.layer, trial.step):
            after = self.objective.measure("retain", "val", edited=trial.layer, stop=hopeless)
        if after is None:
            return replace(trial, dropped=True)
        return replace(trial, retain=after, constraint_usage=constraint_usage(metrics, before, after, self.tolerance))

    def _step(self, layer: str, step: float) -> AbstractContextManager[None]:
        return self.bench.step(EditStep(self.layers[layer], self.gradient, step, patch_prefix(self.objective.module)))

    def _of(self, scores: Iterable[Score]) -> list[Layer]:
        return [self.layers[score.layer] for score in scores]

    def _share(self, value: float) -> float:
        """How much of the way from before to the target a value of the forget metric has gone.

        Infinite where that cannot be told: the model is broken, or no answer is right any more, as after any larger step.
        """
        at_the_end = self.metric.higher_is_better and value <= 0 <= self.target
        return (value - self.before) / (self.target - self.before) if math.isfinite(value) and not at_the_end else math.inf


def smallest_step(trials: Iterable[Trial], layer: str | None = None) -> Trial | None:
    """The trial with the smallest step that forgets and leaves a model that works, of one layer or of all."""
    found = [t for t in trials if t.forgotten and math.isfinite(t.forget) and layer in (None, t.layer)]
    return min(found, key=lambda t: t.relative_step, default=None)


def _first_step(score: Score, gain: float) -> float:
    """The relative step that raises the forget loss by `gain` at first order: a step λ raises it by λ‖g_f‖²."""
    return min(max(gain / (score.forget_norm * score.weight_norm), START / 100), 1.0)


def _line(layer: str, trials: Sequence[Trial]) -> str:
    """What became of a layer, for whoever watches."""
    last = next((trial for trial in trials if trial.dropped or trial.retain), None)
    if last is None:
        found = "does not forget"
    elif last.dropped:
        found = f"forgets at step {last.relative_step:.4f}, and costs more than another layer"
    else:
        values = ", ".join(f"{name} {value:.4f}" for name, value in (last.retain or {}).items())
        found = f"forgets at step {last.relative_step:.4f}, keeps {values}" + ("" if last.feasible else ": too little")
    return f"{layer}: {len(trials)} evaluations, {found}"


@contextmanager
def recorded(objective: Objective, kind: Kind, split: str, layers: Sequence[Layer]) -> Iterator[dict[str, float]]:
    """Measure before any edit, and inside spare the evaluations of these layers what they don't change."""
    _rewrite(layers)
    before = objective.measured(kind, split, record=[layer.name for layer in layers])
    try:
        yield before
    finally:
        if objective.replay:
            objective.replay.forget()


def _rewrite(layers: Iterable[Layer]) -> None:
    """Let the layers' tensors count as changed, though they hold the same values.

    A module may remember what it computed of weights that have not changed since, by their version (`ClipModule` does so
    with class prompts). What an edit of these layers will make it compute again must be computed while recording, too.
    """
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters.values():
                write_local(parameter, local(parameter).clone())

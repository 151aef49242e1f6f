"""What an edit of a layer does to the forget set, to what is near, and to the retain set, on the validation split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from slug_lightning.methods.base import Context, record
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.trial import RetainDetails, Trial
from slug_lightning.objective.log_capture import LogReader
from slug_lightning.objective.metrics import Metric, constraint_usage
from slug_lightning.objective.objective import Kind
from slug_lightning.patches.temporary import EditStep
from slug_lightning.tensors.layers import Layer


class Evaluation:
    """Evaluates edits for one concept, cheapest first: the forget set alone, then near data, then the retain set.

    `before` has the retain metrics on the validation split that losses are counted from; known before anything is kept.
    """

    def __init__(self, concept: Concept, context: Context, before: Mapping[str, float] | None) -> None:
        self.concept = concept
        self.objective = concept.objective
        self.context = context
        self._given = before
        self._recorded: dict[str, tuple[set[str], dict[str, float]]] = {}
        """Which layers' evaluations were recorded, and what was measured meanwhile, by kind."""

    @property
    def before(self) -> Mapping[str, float]:
        """The retain metrics without an edit."""
        return self.context.retain_before() if self._given is None else self._given

    def record(self, kind: Kind, layers: Sequence[Layer]) -> dict[str, float]:
        """Measure before any edit of these layers, whose evaluations are then spared what they don't change."""
        names = {layer.name for layer in layers}
        known, values = self._recorded.get(kind, (set(), {}))
        if kind not in self._recorded or not names <= known:
            if kind in self._recorded:
                self.let_go()  # else its memory would count twice
            values = record(self.objective, kind, "val", layers)
            self._recorded[kind] = names, values
        return values

    def record_retained(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Record what `cost` measures; returns the retain metrics without a step of these layers."""
        if self._near_binds:
            self.record("near", layers)
        return self.record("retain", layers)

    def let_go(self) -> None:
        """Let go of what evaluations have recorded."""
        self.objective.evaluator.forget()
        self._recorded.clear()

    def forgetting(self, edit: EditStep, relative_step: float) -> Trial:
        """Measure only whether an edit forgets."""
        with self.context.edits.applied(edit):
            values = self.objective.measured("forget", "val", edited=edit.layer.name)
        return self.concept.trial(edit, relative_step, values)

    def cost(self, trial: Trial, edit: EditStep, limit: float = math.inf, error: float = 0.0) -> Trial:
        """Measure what the edit of a trial costs, near data first, unless it can no longer win for certain.

        Args:
            trial: which forgets.
            edit: its edit.
            limit: constraint usage above which it can't win.
            error: how far off rounding may put a constraint usage.
        """
        name, seen = self.concept.name, list[LogReader]()

        def hopeless(so_far: LogReader) -> bool:
            seen[:] = [so_far]
            best = self.objective.at_best("retain", "val", so_far) if limit < math.inf else {}
            return bool(best) and self.context.damage(best, near, self.before) > limit + error

        with self.context.edits.applied(edit):
            measured = self._near(trial)
            near = {} if measured is None else {name: measured[0]}
            usage = self.context.damage({}, near, self.before)
            if usage > min(limit + error, 1.0):
                return replace(trial, near=near[name], constraint_usage=usage, dropped=usage > limit + error)
            after = self.objective.measure("retain", "val", edited=trial.layer, stop=hopeless)
        if after is None:
            return replace(trial, near=near.get(name), dropped=True)
        usage = self.context.damage(after, near, self.before)
        details = self._details(seen[0], None if measured is None else measured[1]) if seen else None
        return replace(trial, retain=after, near=near.get(name), constraint_usage=usage, details=details)

    @property
    def _near_binds(self) -> bool:
        return self.concept.near is not None and self.concept.near.binds

    def _near(self, trial: Trial) -> tuple[dict[str, float], LogReader] | None:
        """Measure near data where they bind, with what was logged batch by batch."""
        if not self._near_binds:
            return None
        seen: list[LogReader] = []

        def look(so_far: LogReader) -> bool:
            seen[:] = [so_far]
            return False

        values = self.objective.measure("near", "val", edited=trial.layer, stop=look)
        assert values is not None
        return values, seen[0]

    def _details(self, reader: LogReader, near: LogReader | None) -> RetainDetails | None:
        """What the retain metrics were batch by batch, those of near data as well; None where one isn't a mean over batches."""
        metrics = self.objective.metrics_of("retain")
        usage = _by_batch(reader, metrics, self.before, self.context.retain_tolerance)
        if near is not None and (own := self.concept.near) is not None:
            usage |= {f"near {name}": found for name, found in _by_batch(near, own.metrics, own.before, own.tolerance).items()}
        if not all(usage.values()):
            return None
        losses = [reader.of(name) for name in reader.logged() if name == "nll" or name.endswith("_nll")]
        total = sum(sum(weights) for _, weights in losses)
        summed = math.fsum(v * w for values, weights in losses for v, w in zip(values, weights, strict=True))
        return RetainDetails(usage, summed / total if total else None)


def _by_batch(
    reader: LogReader, metrics: Mapping[str, Metric], before: Mapping[str, float], tolerance: float
) -> dict[str, dict[int, tuple[float, int]]]:
    """By metric, then by batch: how much of a tolerance it has used, and its samples."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for name, metric in metrics.items():
        entries = [entry for entry in reader.entries if entry.name == name]
        usages = [constraint_usage({name: metric}, before, {name: float(e.value)}, tolerance) for e in entries]
        found[name] = {e.number: (usage, e.weight) for e, usage in zip(entries, usages, strict=True)}
    return found

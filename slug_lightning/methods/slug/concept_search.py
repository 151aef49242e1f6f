"""State of one concept's search: its gradients, its trials, and the edit that was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context, Outcome, Trial
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.norms import direction_norm
from slug_lightning.methods.slug.candidates import Candidate, LayerScore
from slug_lightning.methods.slug.choice import Choice
from slug_lightning.methods.slug.curves import Curve, Point, Tangent
from slug_lightning.methods.slug.directions import FACTORS, Direction
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.precision_check import Errors, close_calls, close_scores, score_errors
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.methods.slug.step_search import StepSearch
from slug_lightning.patches.temporary import EditStep
from slug_lightning.tensors.layers import refuse_unmovable
from slug_lightning.utils.names import some_of

ALTERNATIVES = 3
"""Layers whose direction is kept after the search, for another one where the edits of several concepts do not go together."""


@dataclass(frozen=True)
class Rules:
    """What a search is made of; `slug_lightning.methods.slug.SLUG` says what each is."""

    direction: Direction
    curve: Curve
    score: LayerScore
    choice: Choice
    search: StepSearch
    max_evaluations: int
    step_margin: float
    check_rounding: bool


class ConceptSearch:
    """Finds the edit of one concept."""

    def __init__(self, concept: Concept, context: Context, rules: Rules) -> None:
        self.concept = concept
        self.name = concept.name
        self.objective = concept.objective
        self.context = context
        self.rules = rules
        self.outcome = Outcome(concept.name)
        self.chosen: Trial | None = None
        """The step to take; None as long as there is none within the bounds."""
        self.statistics: list[LayerStatistics] = []
        """Of the candidates; after the search, of the chosen layer and its alternatives."""
        self._all_statistics: list[LayerStatistics] = []
        self._gradient: dict[str, Tensor] = {}
        self._points: dict[str, Point] = {}
        self._edit: EditStep | None = None
        self._candidates: list[Candidate] = []
        self._errors: Errors = {}
        if concept.edit is not None and concept.report is not None:
            self._take_over(concept.edit, concept.report.relative_step or 0.0)

    @property
    def is_taken_over(self) -> bool:
        """Whether an earlier run has found the edit, which then stays as it is."""
        return self.concept.edit is not None

    # ---- the steps of a search, in order

    def score(self, is_last: bool) -> None:
        """Compute both gradients, and score the layers; of the gradients only what a candidate needs is kept.

        Args:
            is_last: whether no other concept needs the retain gradient any more.
        """
        context = self.context
        if self.rules.check_rounding and self.objective.runner.precision.endswith("-mixed"):
            self._errors = score_errors(self.objective, context.layers, self.outcome.notes)
        forget = context.gradient("forget", context.layers, self.concept)
        retain = context.shared_retain_gradient(is_last)
        self._all_statistics = layer_statistics(context.layers, forget, retain, self.objective.processes)
        del retain  # before the few that are needed are copied
        if not self._all_statistics:
            refuse_unmovable(context.layers)
        self._candidates = list(self.rules.score(self._all_statistics))
        if not all(isinstance(candidate, Candidate) for candidate in self._candidates):
            raise UnlearnError(f"score must return Candidates, got {self._candidates}")
        names = {candidate.layer for candidate in self._candidates}
        self.outcome.layers = [one.row(one.name in names) for one in self._all_statistics]
        by_name = {one.name: one for one in self._all_statistics}
        if unknown := names - by_name.keys():
            raise UnlearnError(f"score: {some_of(sorted(unknown))} cannot be searched; give names of the layers it was given")
        self.statistics = [by_name[name] for name in dict.fromkeys(candidate.layer for candidate in self._candidates)]
        # Copies: the gradients lie in one piece, which would be kept for the sake of a few.
        self._gradient = {name: forget[name].clone() for one in self.statistics for name in one.layer.parameters}
        del forget
        self._add_factors()
        curve = self.rules.curve
        self._points = {one.name: curve(one, partial(self._tangent, one)) for one in self.statistics}

    def search(self) -> None:
        """Search the candidates round by round, as if nothing else were forgotten."""
        search = self._layer_search()
        for number in sorted({candidate.round for candidate in self._candidates}):
            names = [candidate.layer for candidate in self._candidates if candidate.round == number]
            decision, without = search.run([one for one in self.statistics if one.name in names])
            self.chosen = decision.trial
            self.context.retain_before(known=without)
            if not decision.search_more:
                break
        trials = search.trials
        self.outcome.trials = list(trials)
        self._edit = search.edit(self.chosen) if self.chosen else None
        precision = self.objective.runner.precision
        self.outcome.notes += close_calls(precision, trials, self.chosen, search.error)
        self.outcome.notes += close_scores(precision, self._all_statistics, self._errors, self.chosen)
        self._keep_alternatives(trials)

    def search_again(self) -> float:
        """Search the layers that were kept once more, in the presence of the edits that are in the model now.

        Returns:
            How much of the constraint usage is this edit's.
        """
        before = self.context.retain_before()
        search = self._layer_search(before)
        _, without = search.run(self.statistics)
        self.outcome.trials += [replace(trial, together=True) for trial in search.trials]
        able = [t for t in search.trials if t.forgotten and t.constraint_usage is not None and math.isfinite(t.constraint_usage)]
        self.chosen = min(able, key=lambda t: (t.constraint_usage, t.relative_step), default=None)
        if self.chosen is None or self.chosen.constraint_usage is None:
            return math.inf
        self._edit = search.edit(self.chosen)
        return self.chosen.constraint_usage - self.context.usage(without)

    # ---- what it has found

    @property
    def edit(self) -> EditStep:
        """The chosen edit, with the step of `chosen`."""
        assert self.chosen is not None and self._edit is not None
        return replace(self._edit, step=self.chosen.step)

    def set_step(self, step: float) -> None:
        """Go further, or less far, along the chosen direction."""
        assert self.chosen is not None
        relative = self.chosen.relative_step * step / self.chosen.step
        self.chosen = replace(self.chosen, step=step, relative_step=relative)

    def finished(self) -> Outcome:
        """The outcome, with the edit if one is chosen."""
        if self.chosen is not None:
            self.outcome.edit, self.outcome.relative_step = self.edit, self.chosen.relative_step
        return self.outcome

    # ---- inside

    def _take_over(self, edit: EditStep, relative_step: float) -> None:
        assert self.concept.report is not None
        (forget,) = self.concept.report.search_after["forget"].values()
        self._edit = edit
        self.chosen = Trial(edit.layer.name, edit.step, relative_step, True, None, forget, None)

    def _add_factors(self) -> None:
        """Compute what the direction needs to know of the candidates."""
        factors: dict[str, dict[str, Tensor]] = {}
        for need in sorted(getattr(self.rules.direction, "needs", ())):  # a function needs nothing more
            factors[need] = FACTORS[need](self.objective, [one.layer for one in self.statistics])
        if factors:
            self.statistics = [
                replace(
                    one, factors={need: {name: found[name] for name in one.layer.parameters} for need, found in factors.items()}
                )
                for one in self.statistics
            ]

    def _tangent(self, layer: LayerStatistics, at: EditStep | None = None) -> Tangent:
        """The direction of a layer at W, or at an edit of it."""
        if at is None:
            gradient = {name: self._gradient[name] for name in layer.layer.parameters}
        else:
            gradient = self.context.gradient("forget", [layer.layer], self.concept, at=[at])
        direction = self.rules.direction(layer, gradient)
        if {n: d.shape for n, d in direction.items()} != {n: g.shape for n, g in gradient.items()}:
            raise UnlearnError(f"direction: for {layer.name} it must return a tensor of the gradient's shape for each tensor")
        return Tangent(direction, direction_norm(layer.layer, direction, self.objective.processes))

    def _layer_search(self, retain_before: dict[str, float] | None = None) -> LayerSearch:
        rules = self.rules
        return LayerSearch(
            self.concept,
            self.context,
            self._points,
            search=rules.search,
            choice=rules.choice,
            max_evaluations=rules.max_evaluations,
            step_margin=rules.step_margin,
            retain_before=retain_before,
        )

    def _keep_alternatives(self, trials: Sequence[Trial]) -> None:
        """Let go of the layers that neither were chosen nor may be later, and of their directions."""
        measured = [t for t in trials if t.dropped or (t.forgotten and t.retain is not None)]
        measured.sort(key=lambda t: (t is not self.chosen, math.inf if t.constraint_usage is None else t.constraint_usage))
        alternatives = ALTERNATIVES if len(self.context.concepts) > 1 else 0
        keep = [t.layer for t in measured[: alternatives + 1]] if self.chosen else []
        self.statistics = [one for one in self.statistics if one.name in keep]
        self._points = {name: point for name, point in self._points.items() if name in keep}
        held = {name for one in self.statistics for name in one.layer.parameters}
        self._gradient = {name: gradient for name, gradient in self._gradient.items() if name in held}

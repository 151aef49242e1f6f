"""State of one concept's search: its gradients, its trials, and the edit that was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context, Outcome
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.norms import norm
from slug_lightning.methods.slug.candidates import Candidate, LayerScore, measured, pareto
from slug_lightning.methods.slug.choice import Choice
from slug_lightning.methods.slug.curves import Curve
from slug_lightning.methods.slug.directions import Direction
from slug_lightning.methods.slug.first_steps import Way, layers_of
from slug_lightning.methods.slug.layer_search import FOLLOWED, LayerSearch
from slug_lightning.methods.slug.precision_check import Errors, close_calls, close_scores, score_errors
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.methods.slug.step_search import StepSearch
from slug_lightning.methods.slug.structure import short_list
from slug_lightning.methods.slug.ways import Ways
from slug_lightning.methods.trial import Trial
from slug_lightning.patches.temporary import EditStep, merged
from slug_lightning.tensors.dtensor import local
from slug_lightning.tensors.layers import Layer, refuse_unmovable
from slug_lightning.utils.names import some_of

SCREENED = 6
"""Layers and directions that are searched first where ways compete; the others of their round only where none is feasible."""
ALTERNATIVES = 3
"""Ways that are kept after the search, for another one where the edits of several concepts do not go together."""


@dataclass(frozen=True)
class Rules:
    """What a search is made of; `slug_lightning.methods.slug.SLUG` says what each is."""

    directions: Mapping[str, Direction]
    curves: Mapping[str, Curve]
    """Those of all candidates first; where there is another, it is followed for the layers that did best."""
    score: LayerScore
    choice: Choice
    search: StepSearch
    max_evaluations: int
    max_step: float
    max_layers: int
    step_margin: float
    front: bool
    check_rounding: bool


def is_contest(directions: Mapping[str, Direction], curves: Mapping[str, Curve]) -> bool:
    """Whether more than lines of the gradient are searched."""
    return (list(directions), list(curves)) != (["gradient"], ["line"])


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
        self._ways = Ways(concept, context, rules.directions, rules.front, self.outcome.notes)
        self._kept: list[Way] = []
        """After the search, the chosen way and its alternatives."""
        self._statistics: list[LayerStatistics] = []
        self._edit: EditStep | None = None
        self._candidates: list[Candidate] = []
        self._front: set[str] = set()
        self._errors: Errors = {}
        if concept.edit is not None and concept.report is not None:
            self._take_over(concept.edit, concept.report.relative_step or 0.0)

    @property
    def is_taken_over(self) -> bool:
        """Whether an earlier run has found the edit, which then stays as it is."""
        return self.concept.edit is not None

    @property
    def can_be_searched_again(self) -> bool:
        """Whether ways were kept: not where several layers are edited, as theirs begin where other edits end."""
        return bool(self._kept)

    @property
    def layers(self) -> list[Layer]:
        """The layers that may be searched, known after `score`."""
        names = {candidate.layer for candidate in self._candidates}
        return [one.layer for one in self._statistics if one.name in names or self.rules.max_layers > 1]

    # ---- the steps of a search, in order

    def score(self, is_last: bool) -> None:
        """Compute both gradients, and score the layers; of the gradients only what a candidate needs is kept.

        Args:
            is_last: whether no other concept needs the retain gradient any more.
        """
        context = self.context
        if self.rules.check_rounding and self.objective.runner.precision.endswith("-mixed"):
            self._errors = score_errors(self.objective, context.layers, self.outcome.notes)
        self._score(context.layers, is_last)
        self.outcome.layers = [one.row(one.name in self._front) for one in self._statistics]

    def search(self) -> None:
        """Search the candidates round by round, as if nothing else were forgotten; then for further layers."""
        search = self._search_rounds()
        searches, all_statistics, base, said = [search], self._statistics, list[EditStep](), list[str]()
        with ExitStack() as stack:
            while self.chosen is None and len(base) < self.rules.max_layers - 1:
                furthest = search.furthest_within_bounds()
                if furthest is not None and furthest.feasible:
                    self.chosen = search.go_on(furthest)
                edited = {edit.layer.name for edit in base} | {furthest.layer if furthest else ""}
                rest = [layer for layer in self.context.layers if layer.name not in edited]
                if furthest is None or self.chosen is not None or not rest:
                    break
                base.append(search.edit(furthest))
                gone = self.concept.share(furthest)
                said.append(
                    f"max_layers: no single layer meets both bounds; {furthest.layer} stays at relative step "
                    f"{furthest.relative_step:.4f}, {gone:.0%} of the way to the target, and another layer is searched"
                )
                stack.enter_context(self.context.edits.applied(base[-1]))
                self._score(rest, is_last=True)
                search = self._search_rounds()
                searches.append(search)
            if self.chosen is not None:
                self._say_margin(self.chosen)
        self._statistics = all_statistics
        trials = self.outcome.trials = [trial for one in searches for trial in one.trials]
        self.outcome.notes += said if self.chosen is not None else []
        precision = self.objective.runner.precision
        self.outcome.notes += close_calls(precision, trials, self.chosen, search.error)
        self.outcome.notes += close_scores(precision, self._statistics, self._errors, self.chosen)
        if self.chosen is not None:
            self._edit = search.edit(self.chosen)
            self._say_choice(self.chosen, search)
        self._keep_alternatives(search)
        if self.chosen is not None and base:
            self._merge(base, search)

    def search_again(self) -> float:
        """Search the ways that were kept once more, in the presence of the edits that are in the model now.

        Returns:
            How much of the constraint usage is this edit's.
        """
        before = self.context.retain_before()
        search = self._layer_search(before)
        _, without = search.run(self._kept)
        if (cheapest := _cheapest(search.trials)) is not None:
            search.refine(cheapest)
        search.let_go()
        self.chosen = _cheapest(search.trials)
        self.outcome.trials += [replace(trial, together=True) for trial in search.trials]
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
        """Go further, or less far, along the chosen direction; of a path, the whole change is scaled."""
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
        self._edit = edit
        trial = self.concept.trial(edit, relative_step, self.concept.report.search_after["forget"])
        self.chosen = replace(trial, forgotten=True)  # as that run has found

    def _score(self, layers: Sequence[Layer], is_last: bool) -> None:
        """Compute gradients and statistics of layers at the model as it is now, and settle the candidates."""
        context, rules = self.context, self.rules
        known = short_list(layers, self.objective.module) if rules.score is measured else []
        watched = [layer for layer in layers if layer.name in known]
        forget = context.passes.forget_gradient(self.concept, layers)
        retain = context.shared_retain_gradient(is_last, layers, watched, self._ways.needs) if rules.front else None
        self._statistics = layer_statistics(layers, forget.tensors, retain, self.objective.processes, known)
        del retain  # before the few that are needed are copied
        if not self._statistics and not context.edits.active:
            refuse_unmovable(layers)
        self._front = {candidate.layer for candidate in pareto(self._statistics)} if rules.front else set()
        self._candidates = list(rules.score(self._statistics))
        if not all(isinstance(candidate, Candidate) for candidate in self._candidates):
            raise UnlearnError(f"score must return Candidates, got {self._candidates}")
        by_name = {one.name: one for one in self._statistics}
        if unknown := {candidate.layer for candidate in self._candidates} - by_name.keys():
            raise UnlearnError(f"score: {some_of(sorted(unknown))} cannot be searched; give names of the layers it was given")
        first = dict.fromkeys(candidate.layer for candidate in self._candidates if candidate.round == 0)
        self._ways.keep(forget.tensors, forget.loss, [by_name[name] for name in first])

    def _search_rounds(self) -> LayerSearch:
        """Search round by round until the choice is content."""
        # What edits that stay have cost already counts as well.
        search = self._layer_search(self.context.retain_before() if self.context.edits.active else None)
        for pairs in self._rounds():
            for name, curve in self.rules.curves.items():
                ways = self._ways.along(pairs, name, curve)
                with self._recorded(name, ways):
                    decision, _ = search.run(ways)
                found = decision.trial
                if found is not None and not decision.search_more and found.margin >= search.step_margin and _is_free(found):
                    break  # nothing is lost, which no other curve can better
                # For the next curve, if there is one: the cheapest suffix first, and none of a direction that never turns.
                best = search.best([way for way in ways if not self._ways.is_fixed(way.direction)])[:FOLLOWED]
                pairs = [(way.layer, way.direction) for way in sorted(best, key=lambda way: -way.layer.depth)]
                if not pairs:
                    break
            self.chosen = search.refine(decision.trial)
            if self.chosen is not None:
                self.chosen = search.go_on(self.chosen)
            search.let_go()
            if not decision.search_more or (decision.trial is None and self.chosen is not None):
                break
        return search

    def _rounds(self) -> Iterator[list[tuple[LayerStatistics, str]]]:
        """Layers and directions to search, round by round; of many, those first that change least of what is retained."""
        done = set[tuple[str, str]]()
        for number in sorted({candidate.round for candidate in self._candidates}):
            pairs = [(one, direction) for one, direction in self._pairs(number) if (one.name, direction) not in done]
            done |= {(one.name, direction) for one, direction in pairs}
            if is_contest(self.rules.directions, self.rules.curves) and len(pairs) > SCREENED:
                changes = self._ways.output_changes(pairs)
                if any(map(math.isfinite, changes)):
                    first = sorted(range(len(pairs)), key=lambda i: changes[i])[:SCREENED]
                    yield [pair for i, pair in enumerate(pairs) if i in first]
                    pairs = [pair for i, pair in enumerate(pairs) if i not in first]
            if pairs:
                yield pairs

    def _pairs(self, number: int) -> list[tuple[LayerStatistics, str]]:
        """Layers and directions of a round, in the order of the candidates."""
        by_name = {one.name: one for one in self._statistics}
        chosen = [candidate for candidate in self._candidates if candidate.round == number]
        return list(
            dict.fromkeys((by_name[c.layer], name) for c in chosen for name in ([c.along] if c.along else self.rules.directions))
        )

    def _recorded(self, curve: str, ways: Sequence[Way]) -> AbstractContextManager[None]:
        """Keep what makes the further gradients of a curve that bends cheap."""
        return nullcontext() if curve == "line" else self.context.passes.path_recorded(self.concept, layers_of(ways))

    def _say_choice(self, chosen: Trial, search: LayerSearch) -> None:
        """Note what was chosen and why, where more than the paper's front competed along the gradient."""
        ways = {trial.way for trial in search.trials}
        if chosen.layer in self._front and all(way[1:] == ("gradient", "line") for way in ways):
            return
        place = ("on" if chosen.layer in self._front else "off") + " the front of importance and alignment; "
        able = {trial.way for trial in search.trials if trial.feasible}
        self.outcome.notes.append(
            f"choice: {chosen.layer} along {chosen.direction}, {chosen.curve}; {place if self.rules.front else ''}"
            f"constraint usage {chosen.constraint_usage:.2f}; {len(able)} of {len(ways)} ways met both bounds"
        )

    def _say_margin(self, chosen: Trial) -> None:
        """Note how much of the margin is within all bounds."""
        if asked := self._margin:
            held = "all" if chosen.margin >= asked else f"{chosen.margin / asked:.0%}" if chosen.margin else "none"
            self.outcome.notes.append(
                f"step_margin: {asked:.3g} beyond the smallest step that forgets; {held} of it is within all bounds"
            )

    @property
    def _margin(self) -> float:
        """How far to go beyond the smallest step; no further where a target has two sides."""
        return 0.0 if any(target.has_two_sides for target in self.concept.targets) else self.rules.step_margin

    def _layer_search(self, retain_before: dict[str, float] | None = None) -> LayerSearch:
        rules = self.rules
        return LayerSearch(
            self.concept,
            self.context,
            search=rules.search,
            choice=rules.choice,
            max_evaluations=rules.max_evaluations,
            step_margin=self._margin,
            max_step=rules.max_step,
            retain_before=retain_before,
            is_contest=is_contest(rules.directions, rules.curves),
        )

    def _merge(self, base: Sequence[EditStep], search: LayerSearch) -> None:
        """Make one edit of those that stay and the one that was chosen."""
        assert self.chosen is not None
        self._edit = merged([*base, search.edit(self.chosen)])
        processes, layer = self.objective.processes, self._edit.layer
        weights = {name: local(p) for name, p in layer.parameters.items()}  # asked for outside of all edits
        relative = norm(layer, self._edit.direction, processes) / norm(layer, weights, processes)
        self.chosen = replace(self.chosen, layer=layer.name, step=1.0, relative_step=relative)
        self._kept = []

    def _keep_alternatives(self, search: LayerSearch) -> None:
        """Let go of the ways that neither were chosen nor may be later, and of their directions."""
        able = [t for t in search.trials if t.dropped or (t.forgotten and t.retain is not None)]
        able.sort(key=lambda t: (t is not self.chosen, math.inf if t.constraint_usage is None else t.constraint_usage))
        alternatives = ALTERNATIVES if len(self.context.concepts) > 1 else 0
        keep = list(dict.fromkeys(t.way for t in able))[: alternatives + 1] if self.chosen else []
        self._kept = [way for way in search.ways if way.key in keep]
        self._ways.let_go(self._kept)


def _is_free(trial: Trial) -> bool:
    """Whether a step loses nothing of what was measured."""
    return trial.constraint_usage is not None and trial.constraint_usage <= 0


def _cheapest(trials: Sequence[Trial]) -> Trial | None:
    """The trial that forgets and costs least, whether it is within bounds or not."""
    able = [t for t in trials if t.forgotten and t.constraint_usage is not None and math.isfinite(t.constraint_usage)]
    # One that was broken off may cost more than is known.
    return min(able, key=lambda t: (t.retain is None, t.constraint_usage, t.relative_step), default=None)

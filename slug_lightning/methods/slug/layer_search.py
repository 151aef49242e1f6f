"""Search ways to edit layers: each finds a step that forgets, and what that costs the retain set decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from slug_lightning.methods.base import Context
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.norms import norm
from slug_lightning.methods.slug.choice import Choice, Decision
from slug_lightning.methods.slug.curves import CurveEnd
from slug_lightning.methods.slug.evaluation import Evaluation
from slug_lightning.methods.slug.first_steps import FirstSteps, Way, layers_of
from slug_lightning.methods.slug.precision_check import rounding, usage_error
from slug_lightning.methods.slug.step_search import START, StepSearch
from slug_lightning.methods.trial import Trial
from slug_lightning.patches.temporary import EditStep

FOLLOWED = 3
"""Layers whose path is followed where lines compete with paths, and that are looked at for a first of several edits."""
HALVED = 5
"""How often a step is halved that costs too much."""
HALVINGS = 3
"""How often the margin is halved in search of the part that is within all bounds."""
ROUGH = 0.25
"""Where ways compete, their searches rest when the bracket is this narrow, relative to its upper end; the winner's goes on."""


class _RoughlyKnown(Exception):
    """The step of a way is known well enough to compare it with others."""


class LayerSearch:
    """Finds for every way a step that just forgets, then measures the retain metrics, where the outcome depends on them.

    The forget metric comes first: it is measured on few samples and decides the step. The retain metrics are measured once
    for each way that forgets, the most promising first, and the measurement of one that can no longer win is broken
    off. Where more than lines of the gradient compete, steps are found roughly first (`ROUGH`), and `refine` narrows the one
    that wins. With replay, only what a layer changes is computed. If edits of other concepts are in the model, `retain_before`
    has the retain metrics on the validation split without any.
    """

    def __init__(
        self,
        concept: Concept,
        context: Context,
        *,
        search: StepSearch,
        choice: Choice,
        max_evaluations: int,
        step_margin: float = 0.0,
        max_step: float = math.inf,
        retain_before: Mapping[str, float] | None = None,
        is_contest: bool = False,
    ) -> None:
        self.concept = concept
        self.objective = concept.objective
        self.context = context
        self.search = search
        self.choice = choice
        self.max_evaluations = max_evaluations
        self.step_margin = step_margin
        self.max_step = max_step
        self.retain_before = retain_before
        self.is_contest = is_contest
        """Whether more than lines of the gradient are searched."""
        self.evaluation = Evaluation(concept, context, retain_before)
        self.trials: list[Trial] = []
        self.error = 0.0
        """How far off rounding may put the constraint usage of a trial; known after `run`."""
        self.smallest: dict[tuple[str, str, str], Trial] = {}
        """By way, the trial with the smallest step that forgets."""
        self._tried: dict[tuple[str, str, str], dict[float, Trial]] = {}
        """By way, then by distance, what was measured of the forget set, so that a search can go on where it rested."""
        self._starts: dict[tuple[str, str, str], tuple[float, ...]] = {}
        self._bent: dict[tuple[tuple[str, str, str], float, float], float] = {}
        """By way, distance and margin of a trial, where its way goes on straight."""
        self._complete: set[tuple[str, str, str]] = set()
        """Ways whose search has not rested."""
        self._ways: dict[tuple[str, str, str], Way] = {}
        self._first = FirstSteps(concept.targets[0], is_contest)

    def run(self, ways: Sequence[Way]) -> tuple[Decision, dict[str, float]]:
        """Search these ways; where ways compete, what evaluations have recorded is kept for further calls, until `let_go`.

        Args:
            ways: each of another layer, direction or curve than those before.

        Returns:
            The decision over all trials so far, and the retain metrics on the validation split without a step of these layers.
        """
        begun = len(self.trials)
        with self.context.progress.bar("search", len(ways) * self.max_evaluations) as advance:
            self.evaluation.record("forget", layers_of(ways))
            for way in ways:
                self.search_steps(way, advance, roughly=self.is_contest)
        if not self.is_contest and not self.step_margin:
            self.let_go()  # nothing asks for the forget set again
        able = [way for way in ways if way.key in self.smallest]
        # First order: a step λ raises the retain loss by λ·<g_f, g_r>.
        able.sort(key=self._first_order_cost)
        without = self.evaluation.record_retained(layers_of(able))
        if self.retain_before is None:
            self.context.retain_before(known=without)
        before = self.evaluation.before
        unit = rounding(self.objective.runner.precision)
        self.error = usage_error(self.objective.metrics_of("retain"), before, self.context.retain_tolerance, unit)
        for way in self.context.progress.track(able, "search, retain metrics"):
            self._measure_retain(way)
        if not self.is_contest:
            self.let_go()
        for way in ways:
            self.context.progress.say(_line(way, [t for t in self.trials[begun:] if t.way == way.key]))
        return self.choice(self._eligible()), without

    def search_steps(self, way: Way, advance: Callable[[], None] = lambda: None, roughly: bool = False) -> None:
        """Find the smallest step of a way that forgets; calls `advance` at each evaluation.

        Where it is `roughly` known the search rests, and a further call goes on from there.
        """
        self._ways[way.key] = way
        self._complete.add(way.key)
        known = self._tried.setdefault(way.key, {})
        before, tried = set(known), list[Trial]()

        def evaluate(distance: float) -> Trial:
            is_beyond = distance > self.max_step
            if is_beyond and tried and _distance(tried[-1]) >= self.max_step:
                raise CurveEnd(f"max_step: {distance:.3g} would be beyond {self.max_step:.3g}")
            if roughly and _is_rough_enough(tried):
                self._complete.discard(way.key)
                raise _RoughlyKnown
            at = min(distance, self.max_step)
            if at not in known:
                known[at] = self._forget(way, advance, at)
            tried.append(known[at])
            if is_beyond and not tried[-1].forgotten:
                raise CurveEnd(f"max_step: {distance:.3g} would be beyond {self.max_step:.3g}")
            return tried[-1]

        if way.key not in self._starts:
            self._starts[way.key] = tuple(dict.fromkeys((self._first.start(way, self.smallest), START)))
        for start in self._starts[way.key]:
            earlier = list(tried)
            try:
                tried = earlier + list(self.search(evaluate, self.concept.share, self.max_evaluations, min(start, self.max_step)))
                break
            except _RoughlyKnown:
                break
            except CurveEnd as end:
                if tried:
                    tried[-1] = replace(tried[-1], ended=str(end))
            if way.curve == "line" or smallest_step(tried) is not None:
                break  # else a path that began far along may have passed what it was sought for
        self.trials += [trial for trial in tried if _distance(trial) not in before]
        if (found := smallest_step(tried)) is not None:
            if way.key not in self.smallest:
                self._first.learn(way, found)
            self.smallest[way.key] = found

    def let_go(self) -> None:
        """Let go of what evaluations have recorded."""
        self.evaluation.let_go()

    @property
    def ways(self) -> list[Way]:
        """All ways that were searched."""
        return list(self._ways.values())

    def best(self, ways: Sequence[Way]) -> list[Way]:
        """Rank ways that were searched, the best of each layer: feasible ones by usage, else those that went furthest."""
        ranked: dict[str, tuple[tuple[int, float], Way]] = {}
        for way in ways:
            trials = [trial for trial in self.trials if trial.way == way.key]
            usages = [t.constraint_usage for t in trials if t.feasible and t.constraint_usage is not None]
            gone = [min(self.concept.share(trial), 1.0) for trial in trials]
            rank = (0, min(usages)) if usages else (1, -max(gone, default=0.0))
            name = way.layer.name
            if name not in ranked or rank < ranked[name][0]:
                ranked[name] = rank, way
        in_order = sorted(ranked.values(), key=lambda pair: pair[0])
        return [way for rank, way in in_order if rank[0] == in_order[0][0][0]]

    def furthest_within_bounds(self) -> Trial | None:
        """Find the trial that goes furthest towards the target within the retain bounds, where none reaches it.

        Only the ways that went furthest are looked at; where their last point costs too much, the way to
        it is halved.
        """
        found: list[Trial] = []
        for way in self.best(self.ways)[:FOLLOWED]:
            trials = [t for t in self.trials if t.way == way.key and not t.is_broken]
            trial = max(trials, key=_distance, default=None)
            for halving in range(HALVED if trial else 0):
                assert trial is not None
                if trial.constraint_usage is None or trial.dropped:
                    measured = self.evaluation.cost(trial, self.edit(trial))
                    self.trials[self.trials.index(trial)] = trial = measured
                if trial.constraint_usage is not None and trial.constraint_usage <= 1:
                    found.append(trial)
                    break
                if halving < HALVED - 1:
                    trial = self._forget(way, lambda: None, _distance(trial) / 2)
                    self.trials.append(trial)
        able = [trial for trial in found if trial.forgotten or 0 < self.concept.share(trial) <= 1]  # not beyond a target
        return max(able, key=lambda trial: self.concept.share(trial), default=None)

    def _first_order_cost(self, way: Way) -> float:
        layer = way.layer
        step = self.smallest[way.key].relative_step * layer.weight_norm / layer.forget_norm  # as along the gradient
        return step * layer.forget_norm * (layer.retain_norm or 0.0) * (layer.alignment or 0.0)

    def edit(self, trial: Trial) -> EditStep:
        """The edit of a trial."""
        distance = _distance(trial)
        return self._ways[trial.way].point(distance, straight_after=self._bent.get((trial.way, distance, trial.margin), math.inf))

    def _forget(self, way: Way, advance: Callable[[], None], distance: float, straight_after: float = math.inf) -> Trial:
        """Measure only whether a step forgets."""
        edit = way.point(distance, straight_after=straight_after)
        relative = distance
        if way.curve != "line":
            relative = edit.step * norm(edit.layer, edit.direction, self.objective.processes) / way.layer.weight_norm
        trial = self.evaluation.forgetting(edit, relative)
        advance()
        return replace(trial, direction=way.direction, curve=way.curve, distance=None if way.curve == "line" else distance)

    def _beyond(self, way: Way, smallest: Trial, margin: float, advance: Callable[[], None] = lambda: None) -> Trial:
        """Go further than the smallest step that forgets, by a share of it."""
        at = _distance(smallest)
        trial = replace(self._forget(way, advance, min(at * (1 + margin), self.max_step), at), margin=margin)
        self._bent[way.key, _distance(trial), margin] = at
        return trial

    def go_on(self, chosen: Trial) -> Trial:
        """Go as far into the margin as all bounds hold, where the whole of it isn't within them; halving finds how far."""
        way, smallest = self._ways[chosen.way], self.smallest.get(chosen.way)
        held, failed = chosen, self.step_margin
        for _ in range(HALVINGS if smallest is not None and chosen.margin < self.step_margin else 0):
            assert smallest is not None
            trial = self._beyond(way, smallest, (held.margin + failed) / 2)
            if trial.forgotten and not trial.is_broken:
                trial = self.evaluation.cost(trial, self.edit(trial))
            self.trials.append(trial)
            if trial.feasible:
                held = trial
            else:
                failed = trial.margin
        return held

    def _eligible(self) -> list[Trial]:
        """What the choice is among: of the feasible trials, those that hold most of the margin."""
        most = max((trial.margin for trial in self.trials if trial.feasible), default=0.0)
        return [trial for trial in self.trials if trial.margin >= most or not trial.feasible]

    def _measure_retain(self, way: Way) -> list[Trial]:
        """Measure what the smallest step of a way costs, and if all bounds hold, also the one with the margin."""
        smallest = self._cost(self.smallest[way.key])
        if not self.step_margin or not smallest.feasible or _distance(smallest) >= self.max_step:
            return [smallest]
        further = self._beyond(way, smallest, self.step_margin)
        self.trials.append(further)
        return [smallest, self._cost(further) if further.forgotten and not further.is_broken else further]

    def _cost(self, trial: Trial) -> Trial:
        """Measure what a trial costs, unless it can't win against those that hold the whole margin."""
        rivals = [t for t in self.trials if t.retain is not None and t.margin >= self.step_margin]
        if self.is_contest:  # a step that is known roughly and breaks a bound sets none, as it may yet come within
            rivals = [t for t in rivals if t.feasible]
        whole = self.evaluation.cost(trial, self.edit(trial), self.choice.usage_limit(rivals), self.error)
        self.trials[self.trials.index(trial)] = whole
        return whole

    def refine(self, chosen: Trial | None) -> Trial | None:
        """Search on from where the chosen way's search rested; without one, along the ways that came nearest to all bounds.

        Returns:
            The trial to take: with the smaller step, if it holds as much of the margin.
        """
        if not self.is_contest:
            return chosen
        if chosen is not None:
            rough = self.smallest[chosen.way]
            best = max([*self._refined(self._ways[chosen.way]), chosen], key=lambda trial: trial.margin)
            if best is chosen:
                self.smallest[chosen.way] = rough  # which its margin is counted from
            return best
        costs = {
            t.way: t.constraint_usage for t in self.trials if t.forgotten and t.constraint_usage is not None and not t.margin
        }
        for way in sorted(costs.keys() - self._complete, key=lambda way: costs[way]):
            # A step that is smaller by what the bracket leaves open hardly costs less by more.
            if costs[way] * (1 - ROUGH) <= 1:
                self._refined(self._ways[way])
        return self.choice(self._eligible()).trial

    def _refined(self, way: Way) -> list[Trial]:
        """Search a way on; returns what is within all bounds of what that has found."""
        if way.key in self._complete:
            return []
        rough = self.smallest[way.key]
        self.search_steps(way)
        return [] if self.smallest[way.key] == rough else [trial for trial in self._measure_retain(way) if trial.feasible]


def _distance(trial: Trial) -> float:
    """How far along its way a trial is."""
    return trial.relative_step if trial.distance is None else trial.distance


def smallest_step(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the smallest step that forgets and leaves a model that works."""
    found = [t for t in trials if t.forgotten and not t.is_broken]
    return min(found, key=lambda t: t.relative_step, default=None)


def _is_rough_enough(trials: Sequence[Trial]) -> bool:
    """Whether the smallest step that forgets is little above the largest below it that doesn't."""
    found = smallest_step(trials)
    if found is None:
        return False
    high = _distance(found)
    low = max((_distance(trial) for trial in trials if _distance(trial) < high), default=0.0)
    return high - low <= ROUGH * high


def _line(way: Way, trials: Sequence[Trial]) -> str:
    """What became of a way, for whoever watches."""
    name = way.layer.name if way.key[1:] == ("gradient", "line") else f"{way.layer.name} ({way.direction}, {way.curve})"
    measured = [trial for trial in trials if trial.dropped or trial.retain or trial.near]
    smallest = smallest_step(trials)
    if not measured or smallest is None:
        found = "does not reach the forget target" + "".join(f" ({trial.ended})" for trial in trials if trial.ended)
    else:
        last, found = measured[-1], f"reaches the forget target at step {smallest.relative_step:.4f}"
        found += f", measured at {last.relative_step:.4f}" if last.relative_step != smallest.relative_step else ""
        found += "".join(f", near {name}={value:.4f}" for name, value in (last.near or {}).items())
        found += "".join(f", {name}={value:.4f}" for name, value in (last.retain or {}).items())
        if last.dropped:
            found += ", retain metrics not measured to the end: it cannot win"
        elif not last.feasible:
            found += f" (violates {'retain_tolerance' if last.retain else 'near_tolerance'})"
    return f"{name}: {len(trials)} evaluations, {found}"

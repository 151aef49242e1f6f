"""The edits of several concepts together: their sum is measured, and where it fails steps and layers are searched again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slug_lightning.methods.base import Context
from slug_lightning.methods.slug.concept_search import ConceptSearch
from slug_lightning.methods.targets import share_of
from slug_lightning.methods.trial import Trial
from slug_lightning.utils.names import some_of

SHRINK, GROW, GENTLY = 0.85, 1.1, 0.3
"""Factors of steps that cost too much, and of one that forgets too little; the former is nearer 1 the less is too much."""
ROOM = 0.7
"""Constraint usage below which a step may grow at once to one that was enough."""
NEAR = 1.02
"""Steps nearer to each other than this factor tell nothing: what matters there is what other edits have become."""
SEARCHES = 2
"""Concepts whose layers are searched again where changing steps has not helped."""
AFTER_LEAVING_OUT = 6
"""Rounds in which steps may be changed anew, once edits are left out; half as many the next time, and so on."""


@dataclass
class Round:
    """One measurement of all edits together, on the validation split.

    `measured` has the forget metrics by concept, then by name, `near` likewise those of near data that bind, and `forget` the
    forget metrics that count; `change` says what was done about what failed.
    """

    measured: dict[str, dict[str, float]]
    near: dict[str, dict[str, float]]
    forget: dict[str, float]
    retain: dict[str, float]
    constraint_usage: float
    steps: dict[str, float]
    remembered: list[str]
    change: str | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the model gives no numbers any more."""
        return not math.isfinite(self.constraint_usage) or not all(
            math.isfinite(value) for values in self.measured.values() for value in values.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {name: value for name, value in vars(self).items() if name != "measured" and (name != "near" or value)}

    def overshoots(self, search: ConceptSearch) -> bool:
        """Whether a concept is remembered because its step is too large: its target has two sides."""
        return search.name in self.remembered and share_of(search.concept.targets, self.measured[search.name]) > 1

    @property
    def is_fine(self) -> bool:
        """Whether all bounds hold."""
        return not self.remembered and self.constraint_usage <= 1


class JointSearch:
    """Settles which edits are made together, and how far each goes.

    Each concept comes with a layer and a step that forget it within the bounds, alone. Together they may fail: what one
    edit forgets another may bring back, and what each costs adds up, while edits also help each other to forget. So steps
    are searched again, all at once: a step that forgets is made smaller where the retain metrics lose too much, and one that
    does not is made larger. If that does not do, the layers of the costliest concepts are searched again in the presence of
    the others. What cannot be settled is left out, the costliest first. Edits of an earlier run are never changed.
    """

    def __init__(self, searches: Sequence[ConceptSearch], context: Context, *, max_rounds: int, step_margin: float) -> None:
        self.searches = list(searches)
        self.context = context
        self.max_rounds = max_rounds
        self.step_margin = step_margin
        self.rounds: list[Round] = []
        self.final: Round | None = None
        """The one whose steps are taken."""
        self._costs = {s.name: s.chosen.constraint_usage or 0.0 for s in searches if s.chosen}
        self._too_small: dict[str, float] = {}
        self._enough: dict[str, float] = {}
        """The last step of each concept that did not forget it, and that did: in the presence of steps that change, too."""
        self._searched: set[str] = set()

    def settle(self) -> list[ConceptSearch]:
        """Measure, change, leave out, until what is left is within all bounds.

        Returns:
            The searches whose edits are made; of the others, `chosen` is None.
        """
        changes, anew = 0, AFTER_LEAVING_OUT
        while self.searches:
            found = self._measure()
            self.rounds.append(found)
            if found.is_fine:
                # Steps that were not changed have their margin already.
                self.final = self._go_further(found) if len(self.rounds) > 1 else found
                break
            if changes < self.max_rounds and (changed := self._change_steps(found)):
                changes += 1
                found.change = changed
            elif (again := self._costliest()) is not None:
                found.change = self._search_again(again)
            else:
                found.change = self._leave_out(found)
                changes = max(0, changes - anew)
                anew //= 2
            self.context.progress.say(
                f"together: {len(found.remembered)} of {len(found.forget)} remembered, constraint usage "
                f"{found.constraint_usage:.2f}; {found.change}"
            )
        return self.searches

    def _measure(self) -> Round:
        """All edits together, on the validation split."""
        measured: dict[str, dict[str, float]] = {}
        with self.context.edits.applied(*(s.edit for s in self.searches)):
            for search in self.context.progress.track(self.searches, "together, forget metrics"):
                measured[search.name] = search.objective.measured("forget", "val", edited="together")
            near = self.context.near([s.concept for s in self.searches], "together")
            retain = self.context.objective.measured("retain", "val", edited="together")
        lost = self.context.damage(retain, near)
        steps = {s.name: s.chosen.relative_step for s in self.searches if s.chosen}
        forget = {s.name: s.concept.value_that_counts(measured[s.name]) for s in self.searches}
        remembered = [s.name for s in self.searches if not s.concept.is_forgotten(measured[s.name])]
        return Round(measured, near, forget, retain, lost, steps, remembered)

    def _go_further(self, found: Round) -> Round:
        """Make all steps larger, up to the margin, while the retain metrics allow it."""
        gone = GROW
        while self._own and gone <= 1 + self.step_margin:
            before = [(search, search.chosen) for search in self._own]
            for search, trial in before:
                assert trial is not None
                search.set_step(GROW * trial.step)
            further = self._measure()
            self.rounds.append(further)
            if not further.is_fine:
                for search, trial in before:
                    search.chosen = trial
                further.change = "steps as they were before"
                break
            found.change = "all steps larger, for the margin"
            found = further
            gone *= GROW
        return found

    @property
    def _own(self) -> list[ConceptSearch]:
        """The searches whose edits may be changed."""
        return [search for search in self.searches if not search.is_taken_over]

    def _change_steps(self, found: Round) -> str:
        """Larger where something is remembered, smaller where what is forgotten costs too much; says what has changed."""
        larger, smaller = [], []
        # What an earlier run has forgotten has a step that stays: then the others must weaken it less.
        weakens = any(s.is_taken_over and s.name in found.remembered for s in self.searches)
        shrink = max(SHRINK, 1 - GENTLY * (found.constraint_usage - 1)) if found.constraint_usage > 1 else SHRINK
        for search in self._own:
            assert search.chosen is not None
            step = search.chosen.step
            if search.name in found.remembered and not found.is_broken and not found.overshoots(search):
                self._too_small[search.name] = step
                search.set_step(self._larger(search.name, step, found.constraint_usage))
                larger.append(search.name)
            # A model that breaks went too far.
            elif found.is_broken or found.constraint_usage > 1 or weakens or found.overshoots(search):
                if search.name not in found.remembered:
                    self._enough[search.name] = step
                low = self._too_small.get(search.name, 0.0)
                search.set_step(max(shrink * step, (low + step) / 2 if low < step else 0.0))
                smaller.append(search.name)
        said = {"larger": larger, "smaller": smaller}
        return "; ".join(f"steps {how}: {some_of(names)}" for how, names in said.items() if names)

    def _larger(self, name: str, step: float, lost: float) -> float:
        """The next step of a concept that is remembered: towards the last that was enough, and to it where there is room."""
        enough = self._enough.get(name, 0.0)
        if enough <= NEAR * step:
            return GROW * step
        return enough if lost < ROOM else min(GROW * step, (step + enough) / 2)

    def _costliest(self) -> ConceptSearch | None:
        """The concept that costs most, of those whose layers were not searched again yet; None after a few."""
        left = [s for s in self._own if s.can_be_searched_again and s.name not in self._searched]
        left = left if len(self._searched) < SEARCHES else []
        return max(left, key=lambda s: self._costs[s.name], default=None)

    def _search_again(self, search: ConceptSearch) -> str:
        """Search a concept's layers and steps in the presence of the others; keep what it had where there is none."""
        self._searched.add(search.name)
        before = search.chosen
        with self.context.edits.applied(*(s.edit for s in self.searches if s is not search)):
            cost = search.search_again()
        if search.chosen is None:
            search.chosen = before
            return f"{search.name}: no step of its layers forgets it in the presence of the others"
        self._costs[search.name] = cost
        for known in (self._too_small, self._enough):
            known.pop(search.name, None)
        return f"{search.name}: {_words(before)} became {_words(search.chosen)}"

    def _leave_out(self, found: Round) -> str:
        """Take edits out: the one furthest from its target, or where the retain metrics lose too much, the costliest."""
        # Half as many as would do if all cost alike, as what they cost together grows faster than their number.
        excess = 1 - 1 / found.constraint_usage if 1 < found.constraint_usage < math.inf else 0.0
        costliest = sorted(self._own, key=lambda s: -self._costs[s.name])
        out = costliest[: max(1, round(excess * len(self.searches) / 2))]
        if found.constraint_usage <= 1 and (remembered := [s for s in self._own if s.name in found.remembered]):
            out = [max(remembered, key=lambda s: self._distance(s, found))]
        out = out or self.searches  # edits of an earlier run that do not go together any more
        for search in out:
            search.chosen = None
        self.searches = [s for s in self.searches if s not in out]
        return f"{', '.join(s.name for s in out)}: left out, as not all bounds hold together"

    def _distance(self, search: ConceptSearch, found: Round) -> float:
        """How far a concept is from its target, as a share of the whole way."""
        values = found.measured[search.name]
        if not all(map(math.isfinite, values.values())):
            return math.inf
        return 1.0 if found.overshoots(search) else 1 - share_of(search.concept.targets, values)


def _words(trial: Trial | None) -> str:
    return "nothing" if trial is None else f"{trial.layer} at relative step {trial.relative_step:.4f}"

"""The edits of several concepts together: their sum is measured, and where it fails steps and layers are searched again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slug_lightning.methods.slug.concept import Request
from slug_lightning.methods.slug.step_search import Trial
from slug_lightning.objective.metrics import constraint_usage
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.temporary import TemporaryEdits
from slug_lightning.utils.names import some_of
from slug_lightning.utils.progress import Progress

SHRINK, GROW, GENTLY = 0.85, 1.1, 0.3
"""Factors of steps that cost too much, and of one that forgets too little; the former is nearer 1 the less is too much."""
ROOM = 0.7
"""Share of the allowed damage below which a step may grow at once to one that was enough."""
NEAR = 1.02
"""Steps nearer to each other than this factor tell nothing: what matters there is what other edits have become."""
SEARCHES = 2
"""Concepts whose layers are searched again where changing steps has not helped."""
AFTER_LEAVING_OUT = 6
"""Rounds in which steps may be changed anew, once edits are left out; half as many the next time, and so on."""


@dataclass
class Round:
    """One measurement of all edits together, on search data.

    Attributes:
        forget: the forget metric of each concept whose edit takes part.
        retain: the retain metrics.
        constraint_usage: the worst retain metric's loss as a share of its tolerance.
        steps: the relative step of each concept.
        remembered: concepts that do not meet their target.
        change: what was done about it, in words; nothing where all is well.
    """

    forget: dict[str, float]
    retain: dict[str, float]
    constraint_usage: float
    steps: dict[str, float]
    remembered: list[str]
    change: str | None = None

    @property
    def is_broken(self) -> bool:
        """Whether the model gives no numbers any more."""
        return not math.isfinite(self.constraint_usage) or not all(map(math.isfinite, self.forget.values()))

    @property
    def is_fine(self) -> bool:
        """Whether all bounds hold."""
        return not self.remembered and self.constraint_usage <= 1


class JointSearch:
    """Settles which edits are made together, and how far each goes.

    Each concept comes with a layer and a step that forget it within the bounds, alone. Together they may fail: what one
    edit forgets another may bring back, and what each costs adds up, while edits also help each other to forget. So steps
    are searched again, all at once: a step that forgets is made smaller where too little is kept, and one that does not is
    made larger. If that does not do, the layers of the costliest concepts are searched again in the presence of the others.
    What cannot be settled is left out, the costliest first.

    Args:
        requests: with an edit each; those of an earlier run are never changed.
        objective: measures what is kept.
        bench: where edits are put together.
        kept: retain metrics on search data, unedited.
        tolerance: of the retain metrics.
        max_rounds: how often steps may be changed.
        margin: by what share steps go beyond those that were found together, as far as what is kept allows.
        progress: shows how far it is.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        objective: Objective,
        bench: TemporaryEdits,
        *,
        kept: dict[str, float],
        tolerance: float,
        max_rounds: int,
        margin: float,
        progress: Progress,
    ) -> None:
        self.requests = list(requests)
        self.objective = objective
        self.bench = bench
        self.kept = kept
        self.tolerance = tolerance
        self.max_rounds = max_rounds
        self.margin = margin
        self.progress = progress
        self.rounds: list[Round] = []
        self.final: Round | None = None
        """The one whose steps are taken."""
        self._costs = {r.name: r.chosen.constraint_usage or 0.0 for r in requests if r.chosen}
        self._too_small: dict[str, float] = {}
        self._enough: dict[str, float] = {}
        """The last step of each concept that did not forget it, and that did: in the presence of steps that change, too."""
        self._searched: set[str] = set()

    def settle(self) -> list[Request]:
        """Measure, change, leave out, until what is left is within all bounds.

        Returns:
            The requests whose edits are made; of the others, `chosen` is None.
        """
        changes, anew = 0, AFTER_LEAVING_OUT
        while self.requests:
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
            self.progress.say(
                f"together: {len(found.remembered)} of {len(found.forget)} remembered, {found.constraint_usage:.2f} of the "
                f"allowed damage; {found.change}"
            )
        return self.requests

    def _measure(self) -> Round:
        """All edits together, on search data."""
        forget: dict[str, float] = {}
        with self.bench.step(*(r.move() for r in self.requests)):
            for request in self.progress.track(self.requests, "together, what is forgotten"):
                (forget[request.name],) = request.objective.measured("forget", "val", edited="together").values()
            retain = self.objective.measured("retain", "val", edited="together")
        lost = constraint_usage(self.objective.metrics_of("retain"), self.kept, retain, self.tolerance)
        steps = {r.name: r.chosen.relative_step for r in self.requests if r.chosen}
        return Round(forget, retain, lost, steps, [r.name for r in self.requests if not r.is_forgotten(forget[r.name])])

    def _go_further(self, found: Round) -> Round:
        """Make all steps larger, up to the margin, while what is kept allows it."""
        gone = GROW
        while self._own and gone <= 1 + self.margin:
            before = [(request, request.chosen) for request in self._own]
            for request, trial in before:
                assert trial is not None
                request.set_step(GROW * trial.step)
            further = self._measure()
            self.rounds.append(further)
            if not further.is_fine:
                for request, trial in before:
                    request.chosen = trial
                further.change = "steps as they were before"
                break
            found.change = "all steps larger, for the margin"
            found = further
            gone *= GROW
        return found

    @property
    def _own(self) -> list[Request]:
        """The requests whose edits may be changed."""
        return [request for request in self.requests if not request.is_taken_over]

    def _change_steps(self, found: Round) -> str:
        """Larger where something is remembered, smaller where what is forgotten costs too much; says what has changed."""
        larger, smaller = [], []
        # What an earlier run has forgotten has a step that stays: then the others must weaken it less.
        weakens = any(r.is_taken_over and r.name in found.remembered for r in self.requests)
        shrink = max(SHRINK, 1 - GENTLY * (found.constraint_usage - 1)) if found.constraint_usage > 1 else SHRINK
        for request in self._own:
            assert request.chosen is not None
            step = request.chosen.step
            if request.name in found.remembered and not found.is_broken:
                self._too_small[request.name] = step
                request.set_step(self._larger(request.name, step, found.constraint_usage))
                larger.append(request.name)
            elif found.is_broken or found.constraint_usage > 1 or weakens:  # a model that breaks went too far
                if request.name not in found.remembered:
                    self._enough[request.name] = step
                low = self._too_small.get(request.name, 0.0)
                request.set_step(max(shrink * step, (low + step) / 2 if low < step else 0.0))
                smaller.append(request.name)
        said = {"larger": larger, "smaller": smaller}
        return "; ".join(f"steps {how}: {some_of(names)}" for how, names in said.items() if names)

    def _larger(self, name: str, step: float, lost: float) -> float:
        """The next step of a concept that is remembered: towards the last that was enough, and to it where there is room."""
        enough = self._enough.get(name, 0.0)
        if enough <= NEAR * step:
            return GROW * step
        return enough if lost < ROOM else min(GROW * step, (step + enough) / 2)

    def _costliest(self) -> Request | None:
        """The concept that costs most, of those whose layers were not searched again yet; None after a few."""
        left = [r for r in self._own if r.name not in self._searched and len(self._searched) < SEARCHES]
        return max(left, key=lambda r: self._costs[r.name], default=None)

    def _search_again(self, request: Request) -> str:
        """Search a concept's layers and steps in the presence of the others; keep what it had where there is none."""
        self._searched.add(request.name)
        before = request.chosen
        with self.bench.step(*(r.move() for r in self.requests if r is not request)):
            cost = request.search_again(self.bench, self.kept)
        if request.chosen is None:
            request.chosen = before
            return f"{request.name}: no step of its layers forgets it in the presence of the others"
        self._costs[request.name] = cost
        for known in (self._too_small, self._enough):
            known.pop(request.name, None)
        return f"{request.name}: {_words(before)} became {_words(request.chosen)}"

    def _leave_out(self, found: Round) -> str:
        """Take edits out: the one furthest from its target, or where too little is kept, the costliest."""
        # Half as many as would do if all cost alike, as what they cost together grows faster than their number.
        excess = 1 - 1 / found.constraint_usage if 1 < found.constraint_usage < math.inf else 0.0
        costliest = sorted(self._own, key=lambda r: -self._costs[r.name])
        out = costliest[: max(1, round(excess * len(self.requests) / 2))]
        if found.constraint_usage <= 1 and (remembered := [r for r in self._own if r.name in found.remembered]):
            out = [max(remembered, key=lambda r: self._distance(r, found))]
        out = out or self.requests  # edits of an earlier run that do not go together any more
        for request in out:
            request.chosen = None
        self.requests = [r for r in self.requests if r not in out]
        return f"{', '.join(r.name for r in out)}: left out, as not all bounds hold together"

    def _distance(self, request: Request, found: Round) -> float:
        """How far a concept is from its target, as a share of the whole way."""
        target, value = request.report.bounds["forget_target"], found.forget[request.name]
        (before,) = request.report.search_before["forget"].values()
        return (target - value) / (target - before) if math.isfinite(value) else math.inf


def _words(trial: Trial | None) -> str:
    return "nothing" if trial is None else f"{trial.layer} at relative step {trial.relative_step:.4f}"

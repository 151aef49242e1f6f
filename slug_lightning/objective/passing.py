"""One pass over data, of which nothing stays."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from slug_lightning.distributed.strategy import Runner
from slug_lightning.objective.stand_ins import silenced
from slug_lightning.objective.step_state import Scope, StepState


@contextmanager
def passing(runner: Runner, state: StepState, where: Hashable = None) -> Iterator[Scope]:
    """Inside, steps tell nobody; afterwards all that they have written is as it was.

    Args:
        runner: of the trainer's strategy.
        state: of the module whose steps run.
        where: names the pass, if it will run again (`StepState.undone`).

    Yields:
        The scope, whose `is_whole` says whether all batches were run.
    """
    with state.undone(where=where) as scope, silenced(state.module), runner.passing():
        state.put_stand_ins()
        yield scope

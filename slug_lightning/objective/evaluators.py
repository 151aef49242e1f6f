"""How the batches of an evaluation are run: whole, or (`replay`) only as far as an edit matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from slug_lightning.objective.log_capture import Attempt


class Evaluator(Protocol):
    """Runs evaluations batch by batch; each must log what a plain forward pass logs, bit for bit."""

    def run(
        self,
        where: tuple[str, ...],
        number: int,
        batch: Any,
        step: Attempt,
        record: Sequence[str] = (),
        edited: str | None = None,
    ) -> None:
        """Run one batch.

        Args:
            where: the step that runs, then the pass over the data.
            number: index of the batch in that pass.
            batch: the batch.
            step: runs it.
            record: layers that will be evaluated, if the weights are those that edits start from.
            edited: the layer that is edited now, if one is.
        """

    def forget(self) -> None:
        """Drop what was recorded."""


class WholeForward:
    """The plain evaluator: computes every batch whole."""

    def run(self, where: Any, number: int, batch: Any, step: Attempt, record: Any = (), edited: Any = None) -> None:
        """Run the step."""
        step()

    def forget(self) -> None:
        """Nothing is recorded."""

"""Passes over the gradient split, computed whole or (`replay`) only as far as an edited layer matters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from slug_lightning.distributed.batch_sharding import IndexedBatch
from slug_lightning.distributed.strategy import Runner
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.curvature import Curvature
from slug_lightning.objective.evaluators import Evaluator, WholeForward
from slug_lightning.objective.gradients import Gradient, mean_gradient
from slug_lightning.objective.log_capture import Attempt, LogReader, read_logs
from slug_lightning.objective.module_hooks import ModuleHooks
from slug_lightning.objective.passing import passing
from slug_lightning.objective.replay.replay import Replay
from slug_lightning.objective.step_state import Scope, StepState
from slug_lightning.utils.random import seed_for_batch

NOT_IN_CHECKPOINT = "None of the inputs have requires_grad=True"
"""What torch warns of where a reentrant checkpoint is given nothing to differentiate; the gradient is then zero."""


class LossStep(Attempt):
    """One batch's step, of which the loss is kept; of several runs, that of the last.

    Args:
        module: whose step it is.
        loss_of: runs the step; gives its loss, or None where it leaves the batch out.
        parameters: what the loss will be differentiated by; none while nothing will be.
        reader: gets what the step logs.
        kind: "forget" or "retain", for messages.
        state: undoes what the module writes; None for one of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[[], Tensor | None],
        parameters: Mapping[str, Tensor],
        reader: LogReader,
        kind: str = "forget",
        state: StepState | None = None,
    ) -> None:
        super().__init__(module, self._compute, reader, state)
        self.loss: Tensor | None = None
        self.parameters = parameters
        self.kind = kind
        self._loss_of = loss_of

    def _compute(self) -> None:
        self.loss = None  # and its graph, before another is built
        loss = self._loss_of()
        if self.parameters and loss is not None and not loss.requires_grad:
            raise UnlearnError(
                f"{self.kind}: the loss of the step has no graph; return it without detach() or item(), and if layers=… names "
                "what the loss does not reach, name other layers"
            )
        self.loss = loss

    @property
    def is_telling(self) -> bool:
        """Whether there is a loss that two ways of computing it can be compared by."""
        return self.loss is not None

    def seen(self) -> list[Any]:
        """List what was logged, the loss and its gradients.

        The gradients as well: equal values may lie in memory otherwise, which decides about kernels of the backward pass, and
        a checkpoint runs modules again in it, which may read what the forward pass did not.
        """
        if self.loss is None:
            return [*super().seen(), None]
        parameters = list(self.parameters.values())
        gradients = torch.autograd.grad(self.loss, parameters, retain_graph=True, allow_unused=True)
        return [*super().seen(), self.loss.detach(), *gradients]


class LossPasses:
    """Runs the step of one kind over batches, to differentiate its loss, or to record what a replay of that needs.

    Args:
        module: whose step it is.
        runner: of its strategy and precision.
        loss: gives the loss of a batch and its number, or None where the step leaves the batch out.
        kind: "forget" or "retain".
        forward: entered for every forward pass.
        state: undoes what steps write.
        data: the same in every pass over the same batches; None if they are not passed over again.
    """

    def __init__(
        self,
        module: nn.Module,
        runner: Runner,
        loss: Callable[[Any, int], Tensor | None],
        kind: str,
        forward: Callable[[], AbstractContextManager[None]],
        state: StepState,
        data: Hashable = None,
    ) -> None:
        self.module = module
        self.runner = runner
        self.samples_of = ModuleHooks(module).samples
        self.loss = loss
        self.kind = kind
        self.forward = forward
        self.state = state
        self.where = f"{kind}_step", kind, "train"
        self._pass = None if data is None else (*self.where, data)

    def gradient(
        self,
        parameters: Mapping[str, Tensor],
        batches: Iterable[IndexedBatch],
        watch: Curvature | None = None,
        replay: Replay | None = None,
        edited: str | None = None,
    ) -> Gradient:
        """Differentiate the mean loss over these batches; with a replay, by the layer that is edited since it was recorded.

        `watch` collects statistics meanwhile.
        """
        evaluator: Evaluator = replay or WholeForward()

        def loss_of(batch: Any, number: int) -> tuple[Tensor | None, int]:
            step = self._step(batch, number, parameters, reader)
            evaluator.run(self.where, number, batch, step, edited=edited)
            return step.loss, reader.samples

        differentiating = self.runner.differentiating(self.module, parameters)
        with torch.enable_grad(), self._passing(), differentiating, read_logs(self.module) as reader:
            try:
                with warnings.catch_warnings():  # torch only warns, and gives zeros
                    warnings.filterwarnings("error", NOT_IN_CHECKPOINT)
                    return mean_gradient(loss_of, batches, parameters, self.kind, self.runner.backward, watch)
            except UserWarning as warning:
                raise UnlearnError(
                    f"{self.kind}: a reentrant checkpoint hides the layers inside it from the gradient; use checkpoint(…, "
                    "use_reentrant=False)"
                ) from warning

    def observe(self, batches: Iterable[IndexedBatch], watch: Curvature) -> int:
        """Run the batches forward, and let a watch see what goes into its tensors; returns the number of samples."""
        with torch.no_grad(), self._passing(), read_logs(self.module), watch.watching(forward_only=True):
            for number, batch, is_real in batches:
                self._loss_of(batch, number)
                watch.fold(1.0, self.samples_of(batch) * is_real, batch)
        watch.finish()
        return watch.samples

    def summed(self, step: Callable[[Any, int], Tensor], batches: Iterable[IndexedBatch]) -> tuple[Tensor, int]:
        """Sum what a step gives, `[B, …]`, over the samples of all ranks, in fp32; returns their number as well; collective."""
        sums: list[Tensor] = []
        samples = 0
        with torch.no_grad(), self._passing(), read_logs(self.module):
            for number, batch, is_real in batches:
                seed_for_batch(number)
                with self.forward():
                    values = step(batch, number).float()
                sums.append(values.sum(0) * is_real)
                samples += len(values) * is_real
        processes = self.runner.processes
        total = torch.stack(sums).sum(0)
        processes.all_reduce_sum([total])
        return total, sum(processes.all_gather_object("samples of an anchor", samples, each_data_rank=True))

    def record(self, batches: Iterable[IndexedBatch], replay: Replay) -> int:
        """Run the batches forward, and let a replay keep what its layers don't change; returns the number of samples."""
        random_states = _collect_rng_states()  # a pass more than without replay, of which nothing may stay
        samples = 0
        # As a gradient pass runs what does not depend on its layer: graphs may be made, but of no weight.
        differentiating = self.runner.differentiating(self.module, {})
        try:
            with (
                torch.enable_grad(),
                self._passing() as scope,
                differentiating,
                read_logs(self.module) as reader,
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", NOT_IN_CHECKPOINT)
                for number, batch, _ in batches:
                    if not replay.is_of_use:
                        scope.is_whole = False
                        continue  # to the end all the same, as all ranks read together
                    step = self._step(batch, number, {}, reader)
                    samples += reader.samples
                    try:
                        replay.record(self.where, number, batch, step, list(replay.layers))
                    except Exception as error:  # if it isn't for want of a graph, the gradient pass fails as well, and says so
                        replay.refuse(f"a forward pass without gradients fails ({error})")
        finally:
            _set_rng_states(random_states)
        return samples

    def _step(self, batch: Any, number: int, parameters: Mapping[str, Tensor], reader: LogReader) -> LossStep:
        reader.number, reader.samples = number, self.samples_of(batch)
        return LossStep(self.module, partial(self._loss_of, batch, number), parameters, reader, self.kind, self.state)

    def _passing(self) -> AbstractContextManager[Scope]:
        return passing(self.runner, self.state, self._pass)

    def _loss_of(self, batch: Any, number: int) -> Tensor | None:
        seed_for_batch(number)  # again: a batch that is compared, or whose gradient overflows, is run a second time
        with self.forward():
            return self.loss(batch, number)

"""What forgetting and retaining mean for one module and its data: losses to differentiate, metrics to watch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from slug_lightning.distributed.batch_sharding import IndexedBatch
from slug_lightning.distributed.processes import Collectives
from slug_lightning.distributed.strategy import Runner
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import call_step, loss_in
from slug_lightning.objective.curvature import Curvature
from slug_lightning.objective.evaluators import Evaluator, WholeForward
from slug_lightning.objective.gradients import Gradient
from slug_lightning.objective.log_capture import Attempt, Logged, LogReader, read_logs
from slug_lightning.objective.loss_passes import LossPasses
from slug_lightning.objective.metrics import Metric, describe_metric
from slug_lightning.objective.module_hooks import ModuleHooks
from slug_lightning.objective.passing import passing
from slug_lightning.objective.replay.replay import Replay
from slug_lightning.objective.step_state import Scope, StepState
from slug_lightning.tensors.layers import Layer
from slug_lightning.utils.modules import LIGHTNING

Kind = Literal["forget", "retain", "near"]
LOSS = "loss"
"""Name of the metric that serves where none is named: the loss of the step itself."""


class Objective:
    """Losses and metrics of the forget and the retain set, by the module's own steps.

    The loss is `forget_step` or `retain_step` where the module defines it, else `training_step`. The metrics are
    what `validation_step` logs under the names given, by argument or by the module (`ModuleHooks`); without a name, the loss.
    The module is in evaluation mode; `loaders` has batches by kind and split.
    """

    def __init__(
        self,
        module: LightningModule,
        loaders: Mapping[Any, Mapping[Any, Iterable[Any]]],
        runner: Runner,
        forget_metric: str | Sequence[str] | None = None,
        retain_metric: str | Sequence[str] | None = None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, _: batches,
        replay_budget: int | None = None,
    ) -> None:
        self.module = module
        self.hooks = ModuleHooks(module)
        self.loaders = loaders
        self.runner = runner
        self.processes = runner.processes
        self.progress = progress
        forget = metric_names(forget_metric or self.hooks.forget_metric)
        retain = metric_names(retain_metric or self.hooks.retain_metric)
        self.names: dict[Kind, list[str]] = {"forget": forget, "retain": retain, "near": retain}
        self.metrics: dict[str, Metric] = {}
        """Filled by the first measurement: only a step tells what it logs."""
        self.complete: dict[tuple[Kind, str], LogReader] = {}
        """What the last pass over each set, unedited, has logged."""
        self.evaluator: Evaluator = WholeForward()
        self.gradient_replays: dict[Kind, Replay] = {}
        self.replays = False
        """Whether `replaying` and `replaying_gradients` replay."""
        self.replay_budget = replay_budget
        self.anchor: Tensor | None = None
        """Where it is set, forget gradients are those of `ModuleHooks.anchored_step`."""
        self.state = StepState(module)
        self.hint = ""
        """What the module said about the forget set, unedited (`ModuleHooks.nothing_to_forget`)."""
        self.replayed: list[Replay] = []
        """Every replay so far, of this objective and of those `about` other forget sets."""
        self.forward_samples = 0
        self.backward_samples = 0

    def about(self, forget: Mapping[Any, Iterable[Any]]) -> Objective:
        """The same module, metrics and retain set with another forget set; samples are counted apart."""
        other = copy.copy(self)
        other.loaders = {**self.loaders, "forget": forget}
        other.forward_samples = other.backward_samples = 0
        return other

    @property
    def is_replaying(self) -> bool:
        """Whether evaluations compute only what an edit changes."""
        return not isinstance(self.evaluator, WholeForward)

    @contextmanager
    def replaying(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, evaluations of edits of these layers may compute only what those change."""
        if not self.replays:
            yield
            return
        around, self.evaluator = self.evaluator, Replay(self.module, layers, self.replay_budget)
        self.replayed.append(self.evaluator)
        try:
            yield
        finally:
            self.evaluator = around

    @contextmanager
    def replaying_gradients(self, kind: Kind, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, gradients of `kind` by one of these layers, edited, may compute only what the edit changes.

        For that, one forward pass over the `train` split is recorded first; the weights must be those that edits start from.
        """
        if not self.replays or not layers:
            yield
            return
        replay = Replay(self.module, layers, self.replay_budget, "gradient pass")
        self.replayed.append(replay)
        around, self.gradient_replays = self.gradient_replays, {**self.gradient_replays, kind: replay}
        try:
            batches = self.progress(self._batches(kind, "train"), f"recording, {kind}")
            self.forward_samples += self._losses(kind).record(batches, replay)
            yield
        finally:
            self.gradient_replays = around
            replay.forget()

    def passing(self, where: Hashable = None) -> AbstractContextManager[Scope]:
        """One pass of steps over data, as `slug_lightning.objective.passing.passing`."""
        return passing(self.runner, self.state, where)

    # ---- gradients

    def gradient(
        self, kind: Kind, parameters: Mapping[str, Tensor], watch: Curvature | None = None, edited: str | None = None
    ) -> Gradient:
        """Differentiate the mean loss over the `train` split of `kind`.

        Args:
            kind: "forget" or "retain".
            parameters: what to differentiate, by name.
            watch: collects statistics in the same pass.
            edited: the layer that these belong to, if it alone is edited since `replaying_gradients` was entered.
        """
        batches = self.progress(self._batches(kind, "train"), f"gradient, {kind}")
        replay = self.gradient_replays.get(kind) if edited else None
        return self._counted(self._losses(kind).gradient(parameters, batches, watch, replay, edited))

    def forward_statistics(self, kind: Kind, watch: Curvature) -> None:
        """Let `watch` see the inputs of its tensors over the `train` split of `kind`, without a backward pass.

        All positions count, except those that an `attention_mask` in the batch excludes.
        """
        batches = self.progress(self._batches(kind, "train"), f"statistics, {kind}")
        self.forward_samples += self._losses(kind).observe(batches, watch)

    def mean_of(self, kind: Kind, step: Callable[[Any, int], Tensor]) -> Tensor:
        """The mean over samples of what a step gives, `[B, …]`, of the `train` split; collective."""
        total, samples = self._losses(kind).summed(step, self.progress(self._batches(kind, "train"), f"means, {kind}"))
        self.forward_samples += samples
        return total / samples

    def sample_gradient(self, kind: Kind, parameters: Mapping[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """Differentiate the mean loss of half a batch, which in 32 bits (`exact`) needs no more memory than a whole one in 16."""
        first = itertools.islice(self._batches(kind, "train"), 1)
        halves = (
            IndexedBatch(one.batch_idx, _first_half(one.batch, self.hooks.samples(one.batch)), is_real=one.batch_idx == 0)
            for one in first
        )
        losses = self._losses(kind, nullcontext if exact else self.runner.forward_context, is_whole=False)
        return self._counted(losses.gradient(parameters, halves)).tensors

    def _losses(
        self, kind: Kind, forward: Callable[[], AbstractContextManager[None]] | None = None, is_whole: bool = True
    ) -> LossPasses:
        anchored = self.hooks.anchored_step if kind == "forget" and self.anchor is not None else None
        loss = partial(anchored, anchor=self.anchor) if anchored else partial(self.loss, kind)
        data = (anchored is None, id(self.loaders[kind]["train"])) if is_whole else None
        return LossPasses(self.module, self.runner, loss, kind, forward or self.runner.forward_context, self.state, data)

    def _counted(self, gradient: Gradient) -> Gradient:
        self.forward_samples += gradient.samples
        self.backward_samples += gradient.samples
        return gradient

    def loss(self, kind: Kind, batch: Any, number: int) -> Tensor | None:
        """The loss of one batch, or None where the step leaves it out."""
        step = self.hooks.forget_step if kind == "forget" else self.hooks.retain_step
        return loss_in(call_step(step or self.module.training_step, batch, number))

    # ---- metrics

    def measure(
        self,
        kind: Kind,
        split: str,
        *,
        record: Sequence[str] = (),
        edited: str | None = None,
        stop: Callable[[LogReader], bool] | None = None,
    ) -> dict[str, float] | None:
        """Measure the metrics of `kind` on one split, each a mean over its samples.

        Args:
            kind: "forget" or "retain".
            split: "val" (search) or "test" (report).
            record: layers that will be evaluated next; the weights must be those that the edits start from.
            edited: the layer that is edited now, if only one is.
            stop: asked after each batch; gives up if it says so.

        Returns:
            Value by name, or None if given up.

        Raises:
            UnlearnError: if the split is empty or a named metric is never logged (the message lists what is).
        """
        _refuse_no_validation_step(self, kind)
        with (
            torch.no_grad(),
            self.passing((self.step_name(kind), kind, split, id(self.loaders[kind][split]))) as scope,
            self.runner.validating(),
            read_logs(self.module, self.processes, self.names[kind]) as reader,
        ):
            samples, stopped = self._run_batches(kind, split, reader, record, edited, stop)
            scope.is_whole = not stopped
            if kind == "forget" and edited is None and self.hooks.nothing_to_forget:
                self.hint = self.hooks.nothing_to_forget()
            reader.share()
            found = reader.values()
        samples = sum(self.processes.all_gather_object("samples", samples, each_data_rank=True))
        self.forward_samples += samples
        if samples == 0:
            raise UnlearnError(f"{kind}: the {split} set is empty; give at least one sample for it")
        if not stopped and kind != "near":  # rows of the retain set may not ask for all that the whole set does
            _refuse_not_logged(self, kind, found)
        self._describe(reader)
        if stopped:
            return None
        if edited is None:
            self.complete[kind, split] = reader
        return {name: found[name] for name in self.names[kind] if name in found}

    def _run_batches(
        self,
        kind: Kind,
        split: str,
        reader: LogReader,
        record: Sequence[str],
        edited: str | None,
        stop: Callable[[LogReader], bool] | None,
    ) -> tuple[int, bool]:
        """Run this process's batches; returns the number of samples and whether `stop` has ended it."""
        where = self.step_name(kind), kind, split
        samples, stopped = 0, False
        # Before anything is edited: does the module itself communicate? Then the processes must run every step together.
        collectives = Collectives() if self.processes.world_size > 1 and not self.complete else nullcontext()
        for number, batch, counts in self._batches(kind, split):
            reader.number, reader.samples = number, self.hooks.samples(batch)
            step = Attempt(self.module, partial(self._evaluate, kind, batch, number, reader), reader, self.state)
            if counts:
                with collectives:
                    self.evaluator.run(where, number, batch, step, record, edited)
            else:
                with step.undone():
                    step()
            samples += reader.samples * counts
            if stop is not None:
                reader.share()  # all or nobody stops
                stopped = stop(reader)
                if stopped:
                    break
        if isinstance(collectives, Collectives):
            self.processes.in_step |= any(self.processes.all_gather_object("who communicates", collectives.seen))
        return samples, stopped

    def _evaluate(self, kind: Kind, batch: Any, number: int, reader: LogReader) -> None:
        """One batch of a measurement."""
        with self.runner.forward_context():
            if self.step_name(kind) == "validation_step":
                call_step(self.module.validation_step, batch, number)
            else:
                loss = self.loss(kind, batch, number)
                reader.log(LOSS, loss if loss is not None else 0.0, batch_size=None if loss is not None else 0)

    def measured(self, kind: Kind, split: str, *, record: Sequence[str] = (), edited: str | None = None) -> dict[str, float]:
        """Measure to the end, as `measure` without `stop`."""
        values = self.measure(kind, split, record=record, edited=edited)
        assert values is not None
        return values

    def recall(self, kind: Kind, split: str, entries: Sequence[Logged]) -> dict[str, float]:
        """Take over what `measure` has logged before for the same model and data; gives the same values, bit for bit."""
        reader = LogReader()
        reader.entries += entries
        self._describe(reader)
        self.complete[kind, split] = reader
        found = reader.values()
        return {name: found[name] for name in self.names[kind]}

    def _describe(self, reader: LogReader) -> None:
        """Settle which way the metrics are better that were logged for the first time."""
        named = {name for names in self.names.values() for name in names}
        for name in sorted(set(reader.logged()) & named - set(self.metrics)):
            described = describe_metric(name, self.module, reader.objects.get(name))
            self.metrics[name] = self.processes.broadcast("a metric", described)

    def at_best(self, kind: Kind, split: str, reader: LogReader) -> dict[str, float]:
        """What the metrics of a pass can still become at best.

        A metric whose values lay within [0, 1] on the whole last pass and on this one so far is taken to be at most 1
        (an accuracy), and a loss that was never below 0 to be at least 0. A metric with other values is left out.
        """
        whole = self.complete[kind, split]
        best = {}
        for name in self.names[kind]:
            (known, weights), (values, own_weights) = whole.of(name), reader.of(name)
            total, weight = sum(weights), sum(own_weights)
            if not 0 < weight <= total:
                continue
            higher = self.metrics[name].higher_is_better
            if all(math.isfinite(v) and v >= 0 and (v <= 1 or not higher) for v in known + values):
                rest = (total - weight) * (1.0 if higher else 0.0)
                best[name] = (sum(v * w for v, w in zip(values, own_weights, strict=True)) + rest) / total
        return best

    def step_name(self, kind: Kind) -> str:
        """The step that measures a kind."""
        return f"{kind}_step" if self.names[kind] == [LOSS] else "validation_step"

    def metrics_of(self, kind: Kind) -> dict[str, Metric]:
        """The metrics of one kind, by name; known after its first measurement."""
        return {name: self.metrics[name] for name in self.names[kind]}

    def _batches(self, kind: Kind, split: str) -> Iterator[IndexedBatch]:
        return self.runner.batches(self.loaders[kind][split])


def metric_names(names: str | Sequence[str] | None) -> list[str]:
    """The names of metrics as a list; the loss where none is named."""
    names = names or LOSS
    return [names] if isinstance(names, str) else list(names)


def _refuse_no_validation_step(objective: Objective, kind: Kind) -> None:
    if objective.step_name(kind) == "validation_step" and not defines(objective.module, "validation_step"):
        raise UnlearnError(
            f"{kind}_metric: {objective.names[kind]} cannot be measured, {type(objective.module).__name__} has no "
            f"validation_step; define one that logs it, or leave {kind}_metric out to use the loss"
        )


def _refuse_not_logged(objective: Objective, kind: Kind, found: Mapping[str, float]) -> None:
    missing = [name for name in objective.names[kind] if name not in found]
    if missing and objective.step_name(kind) != "validation_step":
        raise UnlearnError(f"{kind}_metric: the step returns no loss; name one that it logs")
    if missing:
        raise UnlearnError(
            f"{kind}_metric: validation_step itself logs no {missing}, only {sorted(found)} (what hooks log is not seen; a "
            "torchmetrics object can be logged in the step); name one that it logs"
        )


def _first_half(batch: Any, count: int) -> Any:
    """The first half of `count` samples, rounded up; the whole batch where something in it has no entry for each sample."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
        return batch
    return tree_map(lambda leaf: leaf[: -(-count // 2)], batch)


def defines(module: LightningModule, name: str) -> bool:
    """Whether a module has a step of its own."""
    # By name, not by class: a module may come from the `pytorch_lightning` package.
    step = getattr(type(module), name)
    return not (step.__qualname__ == f"LightningModule.{name}" and step.__module__.startswith(LIGHTNING))

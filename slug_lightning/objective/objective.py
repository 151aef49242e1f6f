"""What forgetting and keeping mean for one module and its data: losses to differentiate, metrics to watch."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from slug_lightning.distributed.batch_sharding import DIFFERENT_BATCHES, IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Collectives, Processes
from slug_lightning.distributed.strategy import Runner
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples, call_step, loss_in
from slug_lightning.objective.gradients import Gradient, mean_gradient
from slug_lightning.objective.log_capture import Attempt, Logged, LogReader, read_logs
from slug_lightning.objective.metrics import Metric, describe_metric
from slug_lightning.objective.replay.replay import Replay
from slug_lightning.tensors.digests import digest
from slug_lightning.tensors.layers import Layer
from slug_lightning.utils.random import seed_for_batch

Kind = Literal["forget", "retain"]
LOSS = "loss"
"""Name of the metric that serves where none is named: the loss of the step itself."""


class Objective:
    """Losses and metrics of forget and retain data, by the module's own steps.

    The loss is `forget_step` or `retain_step` where the module defines it, else `training_step`. The metrics are
    what `validation_step` logs under the names given, by argument or as attributes `forget_metric` and
    `retain_metric` of the module; without a name, the loss.

    Args:
        module: the model, in evaluation mode.
        loaders: batches by kind and split.
        runner: moves batches, sets the precision.
        forget_metric: name, or None for the module's own choice.
        retain_metric: name or names, or None.
        progress: wraps an iterable of batches to show how far it is; takes it and a description.
        spares: whether evaluations of edits may compute only what they change (`sparing`).
        replay_budget: bytes for that.
    """

    def __init__(
        self,
        module: LightningModule,
        loaders: Mapping[Any, Mapping[Any, Iterable[Any]]],
        runner: Runner,
        forget_metric: str | None = None,
        retain_metric: str | Sequence[str] | None = None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, _: batches,
        spares: bool = False,
        replay_budget: int | None = None,
    ) -> None:
        self.module = module
        self.loaders = loaders
        self.runner = runner
        self.processes = runner.processes
        self.progress = progress
        forget = forget_metric or getattr(module, "forget_metric", None) or LOSS
        retain = retain_metric or getattr(module, "retain_metric", None) or LOSS
        self.names: dict[Kind, list[str]] = {"forget": [forget], "retain": [retain] if isinstance(retain, str) else list(retain)}
        self.metrics: dict[str, Metric] = {}
        """Filled by the first measurement: only a step tells what it logs."""
        self.complete: dict[tuple[Kind, str], LogReader] = {}
        """What the last pass over each set, unedited, has logged."""
        self.replay: Replay | None = None
        """Spares evaluations what an edit does not change, where it is set."""
        self.spares = spares
        self.replay_budget = replay_budget
        self.spared: list[tuple[dict[str, Any], list[str]]] = []
        """What every `Replay` so far has to report, and its notes."""
        self.forward_samples = 0
        self.backward_samples = 0

    def about(self, forget: Mapping[Any, Iterable[Any]]) -> Objective:
        """The same module, metrics and data to keep, with other data to forget; samples are counted apart."""
        other = copy.copy(self)
        other.loaders = {**self.loaders, "forget": forget}
        other.forward_samples = other.backward_samples = 0
        return other

    @contextmanager
    def sparing(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, evaluations of edits of single layers may compute only what those change."""
        if not self.spares:
            yield
            return
        self.replay = Replay(self.module, layers, self.replay_budget)
        try:
            yield
            self.spared.append((self.replay.report(), self.replay.notes()))
        finally:
            self.replay = None

    def gradient(self, kind: Kind, parameters: Mapping[str, Tensor]) -> Gradient:
        """Differentiate the mean loss over the `train` split of `kind`."""
        turns = self.progress(self._batches(kind, "train"), f"gradient, {kind}")
        return self._differentiated(kind, parameters, turns, self.runner.forward_context)

    def sample_gradient(self, kind: Kind, parameters: Mapping[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """Differentiate the mean loss of half a batch, which in 32 bits needs no more memory than all of it in 16.

        Args:
            kind: "forget" or "retain".
            parameters: by name.
            exact: without the autocasting of the trainer's precision.
        """
        turns = (
            IndexedBatch(turn.number, _first_half(turn.batch), counts=turn.number == 0)
            for turn in itertools.islice(self._batches(kind, "train"), 1)
        )
        return self._differentiated(kind, parameters, turns, nullcontext if exact else self.runner.forward_context).tensors

    def _differentiated(
        self,
        kind: Kind,
        parameters: Mapping[str, Tensor],
        turns: Iterable[IndexedBatch],
        forward: Callable[[], AbstractContextManager[None]],
    ) -> Gradient:
        def loss_of(batch: Any, number: int) -> tuple[Tensor | None, int]:
            seed_for_batch(number)  # again: a batch whose gradient overflows is run a second time
            with forward():
                loss = self._loss(kind, batch, number)
            if loss is not None and not loss.requires_grad:
                raise UnlearnError(
                    f"{kind}: the loss of the step has no graph; return it without detach() or item(), and if layers=… names "
                    "what the loss does not reach, name other layers"
                )
            return loss, batch_samples(batch)

        differentiating = self.runner.differentiating(self.module, parameters)
        with torch.enable_grad(), self.runner.passing(), differentiating, read_logs(self.module):
            try:
                with warnings.catch_warnings():  # torch only warns, and gives zeros
                    warnings.filterwarnings("error", "None of the inputs have requires_grad=True")
                    gradient = mean_gradient(loss_of, turns, parameters, kind, self.runner.backward)
            except UserWarning as warning:
                raise UnlearnError(
                    f"{kind}: a reentrant checkpoint hides the layers inside it from the gradient; use checkpoint(…, "
                    "use_reentrant=False)"
                ) from warning
        self.forward_samples += gradient.samples
        self.backward_samples += gradient.samples
        return gradient

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
            record: layers whose evaluations `replay` shall spare later; the weights must be the original ones.
            edited: the layer that is edited now, if only one is.
            stop: asked after each batch; gives up if it says so.

        Returns:
            Value by name, or None if given up.

        Raises:
            UnlearnError: if the split is empty or a named metric is never logged (the message lists what is).
        """
        names = self.names[kind]
        by_loss = self.step_name(kind) != "validation_step"
        if not by_loss and not _defines(self.module, "validation_step"):
            raise UnlearnError(
                f"{kind}_metric: {names} cannot be measured, {type(self.module).__name__} has no validation_step; define "
                f"one that logs it, or leave {kind}_metric out to use the loss"
            )
        where = self.step_name(kind), kind, split
        samples = 0
        stopped = False
        # Before anything is edited: does the module itself communicate? Then the processes must run every step alike.
        collectives = Collectives() if self.processes.world_size > 1 and not self.complete else nullcontext()
        with (
            torch.no_grad(),
            self.runner.passing(),
            self.runner.validating(),
            read_logs(self.module, self.processes) as reader,
        ):
            for number, batch, counts in self._batches(kind, split):
                reader.number, reader.samples = number, batch_samples(batch)
                step = Attempt(self.module, partial(self._evaluate, kind, batch, number, by_loss, reader), reader)
                if not counts:
                    with step.undone():
                        step()
                elif self.replay and record:
                    self.replay.record(where, number, batch, step, record)
                elif self.replay and edited:
                    self.replay.evaluate(where, number, batch, step, edited)
                else:
                    with collectives:
                        step()
                samples += reader.samples * counts
                if stop is not None:
                    reader.share()  # all or nobody stops
                    stopped = stop(reader)
                    if stopped:
                        break
            reader.share()
            found = reader.values()
        if isinstance(collectives, Collectives):
            self.processes.in_step |= any(self.processes.all_gather_object("who communicates", collectives.seen))
        samples = sum(self.processes.all_gather_object("samples", samples, each_share=True))
        self.forward_samples += samples
        if samples == 0:
            raise UnlearnError(f"{kind}: the {split} set is empty; give at least one sample for it")
        missing = [name for name in names if name not in found]
        if missing and not stopped:
            problem = (
                "the step returns no loss"
                if by_loss
                else (
                    f"validation_step itself logs no {missing}, only {sorted(found)} (what hooks log is not seen; a torchmetrics "
                    "object can be logged in the step)"
                )
            )
            raise UnlearnError(f"{kind}_metric: {problem}; name one that it logs")
        self._describe(reader)
        if stopped:
            return None
        if edited is None:
            self.complete[kind, split] = reader
        return {name: found[name] for name in names}

    def recall(self, kind: Kind, split: str, entries: Sequence[Logged]) -> dict[str, float]:
        """Take over what `measure` has found out about one split before, for the same model and data.

        Args:
            kind: "forget" or "retain".
            split: "val" or "test".
            entries: all that was logged, of `complete`.

        Returns:
            As `measure`, to the last bit.
        """
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

    def measured(self, kind: Kind, split: str, *, record: Sequence[str] = (), edited: str | None = None) -> dict[str, float]:
        """Measure to the end, as `measure` without `stop`."""
        values = self.measure(kind, split, record=record, edited=edited)
        assert values is not None
        return values

    def rehearse(self, *kinds: Kind) -> None:
        """Find out early what a long run would stumble over; the forget metric is measured already.

        Every set of these kinds (default: both) is opened. If nothing has yet logged a retain metric, the search data are
        measured until something has.

        Raises:
            UnlearnError: as `measure`.
        """
        kinds = kinds or ("forget", "retain")
        for kind in kinds:
            for split in ("val", "test"):
                if next(iter(self.loaders[kind][split]), None) is None:
                    raise UnlearnError(f"{kind}: the {split} set is empty; give at least one sample for it")
        if "retain" in kinds and not all(name in self.metrics for name in self.names["retain"]):
            self.measure("retain", "val", stop=lambda reader: all(name in reader.logged() for name in self.names["retain"]))

    def refuse_different_data(self) -> None:
        """Compare the first batch of every set between the processes, as each reads its own share of it.

        Raises:
            UnlearnError: if it differs, as where the files are listed in another order.
        """
        if self.processes.world_size == 1:
            return
        for kind, splits in self.loaders.items():
            for split in splits:
                if len(set(self.processes.all_gather_object("the first batch", self.fingerprint(kind, split)))) > 1:
                    raise UnlearnError(f"{kind}: {DIFFERENT_BATCHES}")

    def fingerprint(self, kind: Kind, split: str) -> str:
        """What tells these data from others: a digest of the tensors and plain values of the first batch."""
        alone = shard_batches(self.loaders[kind][split], Processes.alone())  # of the whole set, not of this process's share
        # What nobody can look into counts by its kind alone.
        return digest(next((turn.batch for turn in alone), None), lambda leaf: type(leaf).__qualname__)

    def digest(self, kind: Kind, split: str) -> str | None:
        """A digest of everything that the steps get to see of one split, and of how it is batched; all of it is read.

        Returns:
            The same in every process, or None if a batch holds something that nobody can look into.
        """
        told: list[tuple[int, str | None]] = []
        with nullcontext() if split == "train" else self.runner.validating():
            for turn in self._batches(kind, split):
                if turn.counts:
                    told.append((turn.number, _digest_or_none(turn.batch)))
        found = sorted(itertools.chain(*self.processes.all_gather_object("a digest of data", told, each_share=True)))
        return None if any(batch is None for _, batch in found) else digest([batch for _, batch in found])

    def first_loss(self, kind: Kind, split: str) -> str | None:
        """The loss of the first batch of a gradient's pass, to the last bit; the same in every process.

        Returns:
            As text, or None if there is no batch, or it has no loss.
        """
        told, samples = None, 0
        with torch.no_grad(), self.runner.passing(), read_logs(self.module):
            for turn in itertools.islice(self._batches(kind, split), 1):
                seed_for_batch(turn.number)
                with self.runner.forward_context():
                    loss = self._loss(kind, turn.batch, turn.number)
                told = None if loss is None else repr(loss.item())
                samples = batch_samples(turn.batch) * turn.counts
        found = self.processes.all_gather_object("the first loss", (told, samples), each_share=True)
        self.forward_samples += sum(samples for _, samples in found)
        return found[0][0]

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

    def _evaluate(self, kind: Kind, batch: Any, number: int, by_loss: bool, reader: LogReader) -> None:
        """One batch of a measurement."""
        with self.runner.forward_context():
            if by_loss:
                loss = self._loss(kind, batch, number)
                reader.log(LOSS, loss if loss is not None else 0.0, batch_size=None if loss is not None else 0)
            else:
                call_step(self.module.validation_step, batch, number)

    def step_name(self, kind: Kind) -> str:
        """The step that measures a kind."""
        return f"{kind}_step" if self.names[kind] == [LOSS] else "validation_step"

    def metrics_of(self, kind: Kind) -> dict[str, Metric]:
        """The metrics of one kind, by name; known after its first measurement."""
        return {name: self.metrics[name] for name in self.names[kind]}

    def _batches(self, kind: Kind, split: str) -> Iterator[IndexedBatch]:
        return self.runner.batches(self.loaders[kind][split])

    def _loss(self, kind: Kind, batch: Any, number: int) -> Tensor | None:
        return loss_in(call_step(getattr(self.module, f"{kind}_step", None) or self.module.training_step, batch, number))


def _digest_or_none(batch: Any) -> str | None:
    try:
        return digest(batch)
    except (RuntimeError, TypeError):  # a kind of object, or of tensor, that nobody here can look into
        return None


def _first_half(batch: Any) -> Any:
    """The first half of the samples, rounded up; all of a batch of which anything has no place for each sample."""
    leaves = tree_leaves(batch)
    count = batch_samples(batch)
    if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves):
        return batch
    return tree_map(lambda leaf: leaf[: -(-count // 2)], batch)


def refuse_unusable_steps(module: LightningModule) -> None:
    """Refuse a module whose loss cannot be had, before anything is computed.

    Raises:
        UnlearnError: if it optimises by hand, since its `training_step` would then train the model, or if it has no
            step that gives a loss.
    """
    own = all(hasattr(module, name) for name in ("forget_step", "retain_step"))
    if own:
        return
    remedy = "define forget_step(batch, batch_idx) and retain_step(batch, batch_idx) that return the loss"
    if not module.automatic_optimization:
        raise UnlearnError(f"{type(module).__name__}: its training_step optimises by hand and would train the model; {remedy}")
    if not _defines(module, "training_step"):
        raise UnlearnError(f"{type(module).__name__}: it has no training_step; {remedy}")


def _defines(module: LightningModule, name: str) -> bool:
    # By name, not by class: a module may come from the `pytorch_lightning` package.
    step = getattr(type(module), name)
    inherited = step.__qualname__ == f"LightningModule.{name}"
    return not (inherited and step.__module__.startswith(("lightning.", "pytorch_lightning.")))

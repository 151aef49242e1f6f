"""What forgetting and keeping mean for one module and its data: losses to differentiate, metrics to watch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.gradients import Gradient, mean_gradient
from slug_lightning.metrics import Metric, describe_metric
from slug_lightning.steps import batch_samples, call_step, loss_in, read_logs
from slug_lightning.strategies import Runner

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
    """

    def __init__(
        self,
        module: LightningModule,
        loaders: Mapping[Any, Mapping[Any, Iterable[Any]]],
        runner: Runner,
        forget_metric: str | None = None,
        retain_metric: str | Sequence[str] | None = None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, _: batches,
    ) -> None:
        self.module = module
        self.loaders = loaders
        self.runner = runner
        self.progress = progress
        forget = forget_metric or getattr(module, "forget_metric", None) or LOSS
        retain = retain_metric or getattr(module, "retain_metric", None) or LOSS
        self.names: dict[Kind, list[str]] = {"forget": [forget], "retain": [retain] if isinstance(retain, str) else list(retain)}
        self.metrics: dict[str, Metric] = {}
        """Filled by the first measurement: only a step tells what it logs."""
        self.forward_samples = 0
        self.backward_samples = 0

    def gradient(self, kind: Kind, parameters: Mapping[str, Tensor]) -> Gradient:
        """Differentiate the mean loss over the `train` split of `kind`."""

        def loss_of(batch: Any, number: int) -> tuple[Tensor | None, int]:
            with self.runner.forward_context():
                loss = self._loss(kind, batch, number)
            if loss is not None and not loss.requires_grad:
                raise UnlearnError(f"{kind}: the loss of the step has no graph; return it without detach() or item()")
            return loss, batch_samples(batch)

        _same_draws()
        with torch.enable_grad(), read_logs(self.module):
            batches = self.progress(self._batches(kind, "train"), f"gradient, {kind}")
            gradient = mean_gradient(loss_of, batches, parameters, kind)
        self.forward_samples += gradient.samples
        self.backward_samples += gradient.samples
        return gradient

    def measure(self, kind: Kind, split: str) -> dict[str, float]:
        """Measure the metrics of `kind` on one split, each a mean over its samples.

        Raises:
            UnlearnError: if the split is empty or a named metric is never logged (the message lists what is).
        """
        names = self.names[kind]
        by_loss = names == [LOSS]
        if not by_loss and not _defines(self.module, "validation_step"):
            raise UnlearnError(
                f"{kind}_metric: {names} cannot be measured, {type(self.module).__name__} has no validation_step; define "
                f"one that logs it, or leave {kind}_metric out to use the loss"
            )
        samples = 0
        _same_draws()
        with torch.no_grad(), self.runner.validating(), read_logs(self.module) as reader:
            for number, batch in enumerate(self._batches(kind, split)):
                reader.samples = batch_samples(batch)
                samples += reader.samples
                with self.runner.forward_context():
                    if by_loss:
                        loss = self._loss(kind, batch, number)
                        reader.log(LOSS, loss if loss is not None else 0.0, batch_size=None if loss is not None else 0)
                    else:
                        call_step(self.module.validation_step, batch, number)
            found = reader.values()
            objects = dict(reader.objects)
        self.forward_samples += samples
        if samples == 0:
            raise UnlearnError(f"{kind}: the {split} set is empty; give at least one sample for it")
        missing = [name for name in names if name not in found]
        if missing:
            problem = (
                "the step returns no loss"
                if by_loss
                else (
                    f"validation_step itself logs no {missing}, only {sorted(found)} (what hooks log is not seen; a torchmetrics "
                    "object can be logged in the step)"
                )
            )
            raise UnlearnError(f"{kind}_metric: {problem}; name one that it logs")
        for name in names:
            self.metrics.setdefault(name, describe_metric(name, self.module, objects.get(name)))
        return {name: found[name] for name in names}

    def metrics_of(self, kind: Kind) -> dict[str, Metric]:
        """The metrics of one kind, by name; known after its first measurement."""
        return {name: self.metrics[name] for name in self.names[kind]}

    def _batches(self, kind: Kind, split: str) -> Iterator[Any]:
        return self.runner.batches(self.loaders[kind][split])

    def _loss(self, kind: Kind, batch: Any, number: int) -> Tensor | None:
        return loss_in(call_step(getattr(self.module, f"{kind}_step", None) or self.module.training_step, batch, number))


def _same_draws() -> None:
    """Every pass draws the same random numbers, so that two steps differ by the step and not by luck.

    The caller's random state is put back by `steps.untouched`.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


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

"""Relearning: how fast a module learns again what it has forgotten."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule
from torch.optim import Adam, Optimizer

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import call_step, joined, loss_in
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.log_capture import read_logs
from slug_lightning.objective.module_hooks import ModuleHooks
from slug_lightning.objective.objective import defines
from slug_lightning.utils.names import some_of
from slug_lightning.utils.random import seed_for_batch
from slug_lightning.utils.rows import take


@dataclass(frozen=True)
class Relearning:
    """Fine-tune a copy of a module on a few samples, and measure how much it knows after some numbers of steps.

    What a module never knew takes a while to learn. If what it has forgotten comes back sooner, it was hidden, not gone: run
    the same attack with samples of something that it never knew, and compare.

    For each learning rate, a copy of the module is trained by a new Adam on all weights, also those that are frozen. Each step
    sees the same samples, joined with one batch of the retain set where that is given, as a contrastive loss needs. The loss is
    that of the module's `retain_step`, or of `training_step` where it has none. The copy is in evaluation mode throughout and
    belongs to no Trainer.

    Args:
        steps: after how many steps to measure, ascending; 0 measures the module as it is.
        learning_rates: of Adam.
        samples: how many to train on, the first ones that are given.
        seed: of what the steps draw at random.

    Raises:
        UnlearnError: if an argument makes no sense.

    Example:
        >>> from slug_lightning import UnlearnModule
        >>> torch.nn.init.zeros_((net := torch.nn.Linear(2, 2, bias=False)).weight)
        Parameter containing:
        tensor([[0., 0.],
                [0., 0.]], requires_grad=True)
        >>> def loss(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> def right(model, batch):
        ...     return (model(batch[0]).argmax(1) == batch[1]).float()
        >>> batches = [(torch.ones(4, 2), torch.ones(4, dtype=torch.long))]
        >>> attack = Relearning(steps=(0, 1), learning_rates=(0.01,), samples=4)
        >>> attack(UnlearnModule(net, loss, right), batches, batches, metric="score")
        [{'learning_rate': 0.01, 'steps': 0, 'score': 0.0}, {'learning_rate': 0.01, 'steps': 1, 'score': 1.0}]
    """

    steps: tuple[int, ...] = (1, 2, 4, 8)
    learning_rates: tuple[float, ...] = (1e-4, 3e-5)
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 0 or any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise UnlearnError(f"steps must be ascending and >= 0, got {self.steps}")
        if not self.learning_rates or any(rate <= 0 for rate in self.learning_rates):
            raise UnlearnError(f"learning_rates must be > 0, got {self.learning_rates}")
        if self.samples < 1:
            raise UnlearnError(f"samples must be >= 1, got {self.samples}")

    def __call__(
        self,
        module: LightningModule,
        taught: Iterable[Any],
        asked: Iterable[Any],
        *,
        metric: str,
        retain: Optional[Iterable[Any]] = None,
    ) -> list[dict[str, float]]:
        """Attack a module, which stays as it is, bit for bit, as do the random states.

        Args:
            module: it must be possible to copy it, and its weights must have at least 32 bits.
            taught: batches, of which the first `samples` samples are trained on.
            asked: batches to measure on, passed over for each number of steps: a list or a loader.
            metric: name of what `validation_step` logs.
            retain: batches that are mixed in, one a step; from the start again when they end.

        Returns:
            A row for each learning rate and number of steps: "learning_rate", "steps", and the metric under its name.

        Raises:
            UnlearnError: if there are too few samples, they cannot be joined, or the metric is never logged.
        """
        _refuse_unusable(module, metric)
        with preserve_state(module), torch.inference_mode(False), torch.enable_grad():
            seed_for_batch(self.seed)
            lessons = self._lessons(ModuleHooks(module), taught, retain)
            return [row for rate in self.learning_rates for row in self._attack(module, rate, lessons, asked, metric)]

    def _lessons(self, hooks: ModuleHooks, taught: Iterable[Any], retain: Optional[Iterable[Any]]) -> list[Any]:
        """Return the batch of each step."""
        parts: list[Any] = []
        found = 0
        for batch in taught:
            size = hooks.samples(batch)
            more = min(size, self.samples - found)
            parts.append(take(batch, range(more), size))
            found += more
            if found == self.samples:
                break
        if found < self.samples:
            raise UnlearnError(f"taught: {self.samples} samples are needed, got {found}; give more, or ask for fewer samples")
        if retain is None:
            return [joined(parts)] * self.steps[-1]
        kept = list(islice(retain, self.steps[-1]))
        if not kept and self.steps[-1]:
            raise UnlearnError("retain: the set is empty; give at least one batch, or leave it out")
        return [joined([*parts, batch]) for batch in islice(cycle(kept), self.steps[-1])]

    def _attack(
        self, module: LightningModule, rate: float, lessons: Sequence[Any], asked: Iterable[Any], metric: str
    ) -> list[dict[str, float]]:
        """Return the rows of one learning rate."""
        student = _trainable_copy(module)
        optimizer = Adam(student.parameters(), lr=rate)
        rows, done = [], 0
        for steps in self.steps:
            for number in range(done, steps):
                seed_for_batch(self.seed + number)
                _learn(student, optimizer, lessons[number], number)
            done = steps
            seed_for_batch(self.seed)
            rows.append({"learning_rate": rate, "steps": steps, metric: _measured(student, asked, metric)})
        return rows


def _refuse_unusable(module: LightningModule, metric: str) -> None:
    """Refuse what the attack cannot train or measure."""
    name = type(module).__name__
    if not module.automatic_optimization and not ModuleHooks(module).retain_step:
        raise UnlearnError(f"{name}: its training_step optimizes manually; define a retain_step that returns the loss")
    if not defines(module, "validation_step"):
        raise UnlearnError(f"metric: {metric!r} cannot be measured, {name} has no validation_step; define one that logs it")
    coarse = [key for key, p in module.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    if coarse:
        raise UnlearnError(f"{name}: {some_of(coarse)}: 16 bits round small steps away; attack module.float()")


def _trainable_copy(module: LightningModule) -> LightningModule:
    """Return a copy, without gradients, all of whose weights can be trained."""
    try:
        student = copy.deepcopy(module)
    except (TypeError, RuntimeError) as error:
        raise UnlearnError(
            f"{type(module).__name__}: cannot be copied ({error}); keep open files and the like out of it"
        ) from error
    for parameter in student.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return student


def _learn(student: LightningModule, optimizer: Optimizer, batch: Any, number: int) -> None:
    """Take one step."""
    with read_logs(student):
        step = ModuleHooks(student).retain_step or student.training_step
        loss = loss_in(call_step(step, _transferred(student, batch), number))
    if loss is None:
        raise UnlearnError(f"taught: the step of {type(student).__name__} returns no loss for these samples")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _measured(student: LightningModule, asked: Iterable[Any], metric: str) -> float:
    """Return the mean of a metric over all samples."""
    with torch.no_grad(), read_logs(student) as reader:
        for number, batch in enumerate(asked):
            reader.number, reader.samples = number, ModuleHooks(student).samples(batch)
            seed_for_batch(number)
            call_step(student.validation_step, _transferred(student, batch), number)
        found = reader.values()
    if not reader.logged():
        raise UnlearnError("asked: nothing is logged for it; give batches that can be passed over again, as a list or a loader")
    if metric not in found:
        raise UnlearnError(f"metric: validation_step logs no {metric!r}, only {sorted(found)}; name one that it logs")
    return found[metric]


def _transferred(student: LightningModule, batch: Any) -> Any:
    """Return a batch on the module's device, by its own hooks."""
    return student._apply_batch_transfer_handler(student._on_before_batch_transfer(batch))

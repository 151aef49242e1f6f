"""Add the gradient of one batch to the sum of all, under any precision and strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.dtensor import local

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""What Lightning calls the dimensions of a device mesh: along the first the data are sharded, along the other the tensors."""
SMALLEST_SCALE = 2.0**-14
"""A gradient that still overflows below it is not finite at any scale."""
LossOf = Callable[[], tuple[Tensor | None, int]]


class Watch(Protocol):
    """Sees each batch's backward pass; `slug_lightning.objective.curvature.Curvature` is one."""

    def clear(self) -> None:
        """Before a backward pass, which may be one that is run again."""

    def gradient(self, name: str, gradient: Tensor) -> None:
        """Take a parameter's gradient of this batch, of the scaled loss."""

    def fold(self, weight: float, samples: int) -> None:
        """After a backward pass that counts: `weight` times its gradients are those of each sample's own loss."""


class Backward:
    """The backward pass of a batch, as precision and strategy require it.

    Args:
        processes: the ranks that share the batches.
        scaler: of 16-bit precision: losses are multiplied by its scale, which is halved until nothing overflows.
        averages: over how many ranks the strategy itself averages what it has sharded; 1 if it does not.
    """

    def __init__(self, processes: Processes | None = None, scaler: GradScaler | None = None, averages: int = 1) -> None:
        self.processes = processes or Processes()
        self.scaler = scaler
        self.averages = averages

    def is_averaged(self, parameter: Tensor) -> bool:
        """Whether the strategy has reduced a parameter's gradient over the ranks when it arrives."""
        if self.averages == 1 or not isinstance(parameter, DTensor):
            return False
        names = parameter.device_mesh.mesh_dim_names
        return names is None or bool(set(names) - {TENSOR})  # else it is split for tensor parallelism alone

    def differentiate(self, run: LossOf, taker: Taker, name: str, is_real: bool = True) -> tuple[float, int]:
        """Run a batch forward and backward, and again while its gradient overflows; `name` is for messages.

        Returns:
            The loss and the weight of the batch; weight 0 if it has no loss.
        """
        while True:
            loss, samples = run()
            if loss is None:
                if self.processes.in_step:
                    raise UnlearnError(f"{name}: the step returns no loss, but a sharded model must run every batch")
                return 0.0, 0
            value = loss.item()
            problem = f"{name}: the loss is {value}; look at its data or use precision=32"
            problem = problem if is_real and not math.isfinite(value) else ""
            weight = most = samples * is_real
            if self.averages > 1:
                # What the strategy averages cannot be weighted afterwards, as it mixes batches of different sizes. Most often
                # they are equal, and the factor is 1.
                weights, problems = zip(*self.processes.all_gather_object("samples of a batch", (weight, problem)), strict=True)
                most, problem = max(weights), max(problems)
            if problem:
                raise UnlearnError(problem)
            if self.averages > 1:
                loss = loss * (weight / most)
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            taker.start(most / scale, hold=self.scaler is not None, samples=weight)
            scaled.backward()  # whatever else requires no gradient; `inputs=` would rule out reentrant checkpoints
            if self.scaler is None or not self._overflows(taker):
                taker.finish()
                return value, weight
            del loss, scaled  # and the graph, before the same batch makes another
            if scale < SMALLEST_SCALE:
                raise UnlearnError(f"{name}: the gradient is not finite in 16 bits, whatever the scale; use bf16-mixed or 32")
            self.scaler.update(scale / 2)

    def _overflows(self, taker: Taker) -> bool:
        bad = not taker.is_finite()
        # Parts of one gradient lie on several ranks: all of them run the batch again, or none.
        return any(self.processes.all_gather_object("overflow", bad)) if self.processes.in_step else bad


class Taker:
    """Takes each parameter's gradient as soon as a backward pass has it, and frees it once it is added to the sum.

    Inside, `.grad` is empty; afterwards it is as it was.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor], backward: Backward, watch: Watch | None = None
    ) -> None:
        self.parameters = parameters
        self.sums = sums
        self.watch = watch
        # An average is a sum already divided; what is not averaged is the batch's own.
        self.factors = {key: backward.averages if backward.is_averaged(p) else 1 for key, p in parameters.items()}
        self.weight = 0.0
        self.samples = 0
        self.held: dict[str, Tensor] | None = None

    def start(self, weight: float, hold: bool, samples: int) -> None:
        """Before a backward pass: set the weight of its gradients, whether they wait for `finish`, and its real samples."""
        self.weight, self.samples = weight, samples
        if self.watch is not None:
            self.watch.clear()
        self.held = {} if hold else None

    def is_finite(self) -> bool:
        """Whether all gradients that wait are finite."""
        assert self.held is not None
        flags = [torch.isfinite(gradient).all() for gradient in self.held.values()]
        return not flags or bool(torch.stack(flags).all())

    def finish(self) -> None:
        """Add the gradients that wait."""
        for key, gradient in (self.held or {}).items():
            self._add(key, gradient)
        self.held = None
        if self.watch is not None:
            self.watch.fold(self.weight, self.samples)

    def _add(self, key: str, gradient: Tensor) -> None:
        self.sums[key].add_(gradient.to(self.sums[key].dtype), alpha=self.weight * self.factors[key])

    def _take(self, key: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        parameter.grad = None
        if self.watch is not None:
            self.watch.gradient(key, gradient)
        if self.held is not None:
            self.held[key] = gradient
        elif self.weight:
            self._add(key, gradient)

    def __enter__(self) -> Taker:
        self.before = {key: parameter.grad for key, parameter in self.parameters.items()}
        self.hooks = []
        for key, parameter in self.parameters.items():
            parameter.grad = None
            self.hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._take, key)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for key, parameter in self.parameters.items():
            parameter.grad = self.before[key]

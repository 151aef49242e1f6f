"""From batches to one gradient a tensor: fp32, each sample weighing the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.processes import Processes
from slug_lightning.sharded import local
from slug_lightning.turns import Turn

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""What Lightning calls the dimensions of a device mesh: along the first the data are shared, along the other the tensors."""
SMALLEST_SCALE = 2.0**-14
"""A gradient that still overflows below it is not finite at any scale."""
LossOf = Callable[[], tuple[Tensor | None, int]]


class Gradient(NamedTuple):
    """The gradient of a mean loss.

    Attributes:
        tensors: gradient by parameter name, fp32, each of its parameter's shape (of a sharded one, of this process's part).
        loss: the mean loss over all samples.
        samples: how many samples there were.
    """

    tensors: dict[str, Tensor]
    loss: float
    samples: int


class NoLossError(UnlearnError):
    """There is nothing to differentiate, in any of the processes."""


class Backward:
    """How the gradient of one batch comes to the sum of all: what the precision and the strategy ask for.

    Args:
        processes: that share the batches.
        scaler: of 16-bit precision: losses are multiplied by its scale, which is halved until nothing overflows.
        averages: over how many processes the strategy itself averages what it has sharded; 1 if it does not.
    """

    def __init__(self, processes: Processes | None = None, scaler: GradScaler | None = None, averages: int = 1) -> None:
        self.processes = processes or Processes()
        self.scaler = scaler
        self.averages = averages

    def is_averaged(self, parameter: Tensor) -> bool:
        """Whether the strategy has summed a parameter's gradient over the processes when it arrives."""
        if self.averages == 1 or not isinstance(parameter, DTensor):
            return False
        names = parameter.device_mesh.mesh_dim_names
        return names is None or bool(set(names) - {TENSOR})  # else it is split for tensor parallelism alone

    def differentiate(self, run: LossOf, taker: _Taker, name: str, counts: bool = True) -> tuple[float, int]:
        """Run a batch forward and backward, and again while its gradient overflows.

        Args:
            run: gives loss and number of samples.
            taker: gets the gradients.
            name: "forget" or "retain" and which batch, for messages.
            counts: whether the batch counts, or only keeps the others company.

        Returns:
            The loss and the weight of the batch; weight 0 if it has no loss.
        """
        while True:
            loss, samples = run()
            if loss is None:
                if self.processes.in_step:
                    raise UnlearnError(f"{name}: the step gives no loss, but a sharded model must run every batch")
                return 0.0, 0
            value = loss.item()
            problem = f"{name}: the loss is {value}; look at its data or use precision=32"
            problem = problem if counts and not math.isfinite(value) else ""
            weight = most = samples * counts
            if self.averages > 1:
                # What the strategy averages cannot be weighted afterwards, as it mixes batches of different sizes. Most often
                # they are equal, and the factor is 1.
                weights, problems = zip(*self.processes.exchange("samples of a batch", (weight, problem)), strict=True)
                most, problem = max(weights), max(problems)
            if problem:
                raise UnlearnError(problem)
            if self.averages > 1:
                loss = loss * (weight / most)
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            taker.start(most / scale, hold=self.scaler is not None)
            scaled.backward()  # whatever else requires no gradient; `inputs=` would rule out reentrant checkpoints
            if self.scaler is None or not self._overflows(taker):
                taker.finish()
                return value, weight
            del loss, scaled  # and the graph, before the same batch makes another
            if scale < SMALLEST_SCALE:
                raise UnlearnError(f"{name}: the gradient is not finite in 16 bits, whatever the scale; use bf16-mixed or 32")
            self.scaler.update(scale / 2)

    def _overflows(self, taker: _Taker) -> bool:
        bad = not taker.is_finite()
        # Parts of one gradient lie in several processes: all of them run the batch again, or none.
        return any(self.processes.exchange("overflow", bad)) if self.processes.in_step else bad


def mean_gradient(
    loss_of: Callable[[Any, int], tuple[Tensor | None, int]],
    turns: Iterable[Turn],
    parameters: Mapping[str, Tensor],
    name: str = "forget",
    backward: Backward | None = None,
) -> Gradient:
    r"""Differentiate the mean loss over all samples: `sum(n_b * grad_b) / sum(n_b)` over the batches b.

    Weighting by samples gives the same gradient however the samples are batched and whoever runs the batches (for a
    loss that is a mean over samples). Every process sums up its own batches; the sums are added up once, in one piece.
    Besides the result, one tensor's gradient of one batch is alive at a time (of 16-bit precision, those of one batch);
    their `.grad` is as it was afterwards. Nothing else should require a gradient: it would get one.

    Args:
        loss_of: takes a batch and its number, gives its mean loss (a scalar with a graph, or None to leave the batch
            out) and its number of samples.
        turns: the batches of this process, read once.
        parameters: what to differentiate, leaves that require it, by name.
        name: "forget" or "retain", for messages.
        backward: what precision and strategy ask for.

    Returns:
        The gradient, method.md's `g_f` or `g_r` (SLUG, arXiv 2407.11867).

    Raises:
        UnlearnError: if there is no batch, no batch has a loss, or a loss or gradient is not finite.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> turns = [Turn(0, torch.tensor([[1.0, 0.0]])), Turn(1, torch.tensor([[0.0, 1.0], [0.0, 3.0]]))]
        >>> mean_gradient(lambda x, i: ((x @ w).mean(), len(x)), turns, {"w": w}).tensors["w"]
        tensor([0.3333, 1.3333])
    """
    backward = backward or Backward()
    for key, p in parameters.items():
        if p._post_accumulate_grad_hooks:
            raise UnlearnError(f"{name}: {key} has a hook that acts on every gradient (a fused optimizer?); remove it first")
    sums, to_add_up = _zeros(parameters, backward)
    total, samples, seen = 0.0, 0, 0
    with _Taker(parameters, sums, backward) as taker:
        for number, batch, counts in turns:
            seen += 1
            run = partial(loss_of, batch, number)
            loss, weight = backward.differentiate(run, taker, f"{name}, batch {number}", counts)
            total += loss * weight
            samples += weight
    found = backward.processes.exchange(f"gradient of {name}", (total, samples, seen), each_share=True)
    total, samples, seen = (sum(column) for column in zip(*found, strict=True))
    if samples == 0:
        problem = "the step returns no loss for any batch" if seen else "the set is empty"
        raise NoLossError(f"{name}: {problem}; nothing can be differentiated")
    backward.processes.add_up(to_add_up)
    bad = [key for key, gradient_sum in sums.items() if not torch.isfinite(gradient_sum.div_(samples)).all()]
    for key in itertools.chain(*backward.processes.exchange(f"gradient of {name}, finite", bad)):
        raise UnlearnError(f"{name}: the gradient of {key} holds NaN or inf; leave it out by layers=… or use precision=32")
    return Gradient(sums, total / samples, samples)


def _zeros(parameters: Mapping[str, Tensor], backward: Backward) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A sum for every parameter, at least fp32, and the few buffers that hold those which the processes must add up."""
    kinds: dict[tuple[torch.dtype, torch.device, bool], list[str]] = {}
    for key, p in parameters.items():
        kinds.setdefault((torch.promote_types(p.dtype, torch.float32), p.device, backward.is_averaged(p)), []).append(key)
    sums: dict[str, Tensor] = {}
    to_add_up = []
    for (dtype, device, averaged), keys in kinds.items():
        shapes = [local(parameters[key]).shape for key in keys]
        buffer = torch.zeros(sum(shape.numel() for shape in shapes), dtype=dtype, device=device)
        parts = buffer.split([shape.numel() for shape in shapes])
        sums |= {key: part.view(shape) for key, part, shape in zip(keys, parts, shapes, strict=True)}
        to_add_up += [] if averaged else [buffer]
    return {key: sums[key] for key in parameters}, to_add_up


class _Taker:
    """Takes each parameter's gradient as soon as a backward pass has it, and lets it go once it is added to the sum.

    Inside, `.grad` is empty; afterwards it is as it was.
    """

    def __init__(self, parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor], backward: Backward) -> None:
        self.parameters = parameters
        self.sums = sums
        # An average is a sum already divided; what is not averaged is the batch's own.
        self.factors = {key: backward.averages if backward.is_averaged(p) else 1 for key, p in parameters.items()}
        self.weight = 0.0
        self.held: dict[str, Tensor] | None = None

    def start(self, weight: float, hold: bool) -> None:
        """Before a backward pass: the weight of its gradients, and whether they wait for `finish`."""
        self.weight = weight
        self.held = {} if hold else None

    def is_finite(self) -> bool:
        """Whether all gradients that wait are."""
        assert self.held is not None
        flags = [torch.isfinite(gradient).all() for gradient in self.held.values()]
        return not flags or bool(torch.stack(flags).all())

    def finish(self) -> None:
        """Add what waits."""
        for key, gradient in (self.held or {}).items():
            self._add(key, gradient)
        self.held = None

    def _add(self, key: str, gradient: Tensor) -> None:
        self.sums[key].add_(gradient.to(self.sums[key].dtype), alpha=self.weight * self.factors[key])

    def _take(self, key: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        parameter.grad = None
        if self.held is not None:
            self.held[key] = gradient
        elif self.weight:
            self._add(key, gradient)

    def __enter__(self) -> _Taker:
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

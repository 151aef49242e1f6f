"""From batches to one gradient a tensor: fp32, each sample weighing the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slug_lightning.distributed.backward import Backward, Taker
from slug_lightning.distributed.batch_sharding import IndexedBatch
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.curvature import Curvature
from slug_lightning.tensors.dtensor import local


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


def mean_gradient(
    loss_of: Callable[[Any, int], tuple[Tensor | None, int]],
    turns: Iterable[IndexedBatch],
    parameters: Mapping[str, Tensor],
    name: str = "forget",
    backward: Backward | None = None,
    watch: Curvature | None = None,
) -> Gradient:
    r"""Differentiate the mean loss over all samples: `sum(n_b * grad_b) / sum(n_b)` over the batches b.

    Weighting by samples gives the same gradient however the samples are batched and whoever runs the batches (for a
    loss that is a mean over samples). Every process sums up its own batches; the sums are added up once, in one piece.
    Besides the result, one tensor's gradient of one batch is alive at a time (of 16-bit precision, those of one batch);
    their `.grad` is as it was afterwards. Nothing else should require a gradient: it would get one.

    Args:
        loss_of: takes a batch and its number, gives its mean loss (None to leave it out) and its number of samples.
        turns: the batches of this process, read once.
        parameters: what to differentiate, leaves that require it, by name.
        name: "forget" or "retain", for messages.
        backward: what precision and strategy ask for.
        watch: collects statistics in the same pass; it is finished afterwards.

    Returns:
        The gradient, g_f or g_r (SLUG, arXiv 2407.11867).

    Raises:
        UnlearnError: if there is no batch, no batch has a loss, or a loss or gradient is not finite.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> turns = [IndexedBatch(0, torch.tensor([[1.0, 0.0]])), IndexedBatch(1, torch.tensor([[0.0, 1.0], [0.0, 3.0]]))]
        >>> mean_gradient(lambda x, i: ((x @ w).mean(), len(x)), turns, {"w": w}).tensors["w"]
        tensor([0.3333, 1.3333])
    """
    backward = backward or Backward()
    for key, p in parameters.items():
        if p._post_accumulate_grad_hooks:
            raise UnlearnError(f"{name}: {key} has a hook that acts on every gradient (a fused optimizer?); remove it first")
    sums, to_add_up = _zeros(parameters, backward)
    total, samples, seen = 0.0, 0, 0
    with Taker(parameters, sums, backward, watch) as taker, watch.watching() if watch else nullcontext():
        for number, batch, counts in turns:
            seen += 1
            run = partial(loss_of, batch, number)
            loss, weight = backward.differentiate(run, taker, f"{name}, batch {number}", counts)
            total += loss * weight
            samples += weight
    found = backward.processes.all_gather_object(f"gradient of {name}", (total, samples, seen), each_data_rank=True)
    total, samples, seen = (sum(column) for column in zip(*found, strict=True))
    if samples == 0:
        problem = "the step returns no loss for any batch" if seen else "the set is empty"
        raise NoLossError(f"{name}: {problem}; nothing can be differentiated")
    backward.processes.all_reduce_sum(to_add_up)
    if watch is not None:
        watch.finish()
    bad = [key for key, gradient_sum in sums.items() if not torch.isfinite(gradient_sum.div_(samples)).all()]
    for key in itertools.chain(*backward.processes.all_gather_object(f"gradient of {name}, finite", bad)):
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

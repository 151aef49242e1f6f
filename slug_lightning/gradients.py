"""From batches to one gradient a tensor: fp32, each sample weighing the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError


class Gradient(NamedTuple):
    """The gradient of a mean loss.

    Attributes:
        tensors: gradient by parameter name, fp32, each of its parameter's shape.
        loss: the mean loss over all samples.
        samples: how many samples there were.
    """

    tensors: dict[str, Tensor]
    loss: float
    samples: int


def mean_gradient(
    loss_of: Callable[[Any, int], tuple[Tensor | None, int]],
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    name: str = "forget",
) -> Gradient:
    r"""Differentiate the mean loss over all samples: `sum(n_b * grad_b) / sum(n_b)` over the batches b.

    Weighting by samples gives the same gradient however the samples are batched (for a loss that is a mean over
    samples). Besides the result, one tensor's gradient of one batch is alive at a time; their `.grad` is as it was
    afterwards. Nothing else should require a gradient: it would get one.

    Args:
        loss_of: takes a batch and its number, gives its mean loss (a scalar with a graph, or None to leave the batch
            out) and its number of samples.
        batches: the data, read once.
        parameters: what to differentiate, leaves that require it, by name.
        name: "forget" or "retain", for messages.

    Returns:
        The gradient, method.md's `g_f` or `g_r` (SLUG, arXiv 2407.11867).

    Raises:
        UnlearnError: if there is no batch, no batch has a loss, or a loss or gradient is not finite.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])]
        >>> mean_gradient(lambda x, i: ((x @ w).mean(), len(x)), batches, {"w": w}).tensors["w"]
        tensor([0.3333, 1.3333])
    """
    for key, p in parameters.items():
        if p._post_accumulate_grad_hooks:
            raise UnlearnError(f"{name}: {key} has a hook that acts on every gradient (a fused optimizer?); remove it first")
    sums = {key: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for key, p in parameters.items()}
    total, samples, seen = 0.0, 0, 0
    weight = [0]
    with _taken(parameters, lambda key, gradient: sums[key].add_(gradient.to(sums[key].dtype), alpha=weight[0])):
        for number, batch in enumerate(batches):
            seen += 1
            loss, weight[0] = loss_of(batch, number)
            if loss is None:
                continue
            if not torch.isfinite(loss):
                raise UnlearnError(f"{name}: the loss of batch {number} is {loss.item()}; look at its data or use precision=32")
            loss.backward()  # whatever else requires no gradient; `inputs=` would rule out reentrant checkpoints
            total += loss.item() * weight[0]
            samples += weight[0]
            del loss  # and the graph, before the next batch makes another
    if samples == 0:
        problem = "the step returns no loss for any batch" if seen else "the set is empty"
        raise UnlearnError(f"{name}: {problem}; nothing can be differentiated")
    for key, gradient_sum in sums.items():
        gradient_sum.div_(samples)
        if not torch.isfinite(gradient_sum).all():
            raise UnlearnError(f"{name}: the gradient of {key} holds NaN or inf; leave it out by layers=… or use precision=32")
    return Gradient(sums, total / samples, samples)


@contextmanager
def _taken(parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Inside, `take` gets each parameter's gradient as soon as a backward pass has it, and it is let go at once."""

    def hook_for(key: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            take(key, parameter.grad)
            parameter.grad = None

        return hook

    before = {key: parameter.grad for key, parameter in parameters.items()}
    hooks = []
    try:
        for key, parameter in parameters.items():
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(hook_for(key)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for key, parameter in parameters.items():
            parameter.grad = before[key]

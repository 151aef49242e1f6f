"""The arguments and the loss of a step; the number of samples in a batch, and one batch made of several."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def loss_in(output: Any) -> Tensor | None:
    """Find the loss in what a step returns: a scalar, a dict with "loss", or None to leave the batch out."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnlearnError(
            "training_step must return a scalar loss, a dict with 'loss' or None, "
            f"not {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}; or define forget_step and retain_step"
        )
    return loss.squeeze()


def call_step(step: Callable[..., Any], batch: Any, number: int) -> Any:
    """Call a step with as many arguments as it takes: `batch`, then `batch_idx`, then `dataloader_idx`."""
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return step(batch, number)
    return step(*(batch, number, 0)[: sum(kind in POSITIONAL for kind in kinds)])


def batch_samples(batch: Any) -> int:
    """Count the samples of a batch: the first dimension of the first tensor in its containers; 1 if that is a scalar.

    Texts are not counted, as a sample may have several.
    """
    first = next(_tensors_in(batch), None)
    if first is None:
        raise UnlearnError(
            f"a batch ({type(batch).__name__}) holds no tensor, so that its samples cannot be counted; let the loader add one "
            "of shape [B, ...], such as labels or indices"
        )
    return len(first) if first.ndim else 1


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_in(value)
    elif is_dataclass(content) and not isinstance(content, type):
        for field in fields(content):
            yield from _tensors_in(getattr(content, field.name))
    elif isinstance(content, Iterable) and not isinstance(content, (str, bytes, np.ndarray)):
        for value in content:
            yield from _tensors_in(value)


def joined(batches: Sequence[Any]) -> Any:
    """Make one batch of several, which must be built alike: tensors `[B, …]` and lists of `B` values, in dicts, lists and tuples.

    Example:
        >>> joined([(torch.tensor([1, 2]), ["a", "b"]), (torch.tensor([3]), ["c"])])
        (tensor([1, 2, 3]), ['a', 'b', 'c'])
    """
    first = batches[0]
    if all(isinstance(batch, Tensor) for batch in batches):
        return _concatenated(batches)
    if all(isinstance(batch, Mapping) and batch.keys() == first.keys() for batch in batches):
        made: Any = copy.copy(first)
        for key in first:
            made[key] = joined([batch[key] for batch in batches])
        return made
    if isinstance(first, (list, tuple)) and all(type(batch) is type(first) for batch in batches):
        if all(isinstance(value, (str, bytes, int, float)) for batch in batches for value in batch):
            return _concatenated(batches)
        if all(len(batch) == len(first) for batch in batches):
            parts = [joined(several) for several in zip(*batches, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    kinds = ", ".join(dict.fromkeys(type(batch).__name__ for batch in batches))
    raise UnlearnError(f"batches of {kinds} cannot be joined; {_REMEDY}")


_REMEDY = "let the loader give tensors [B, ...] and lists of B values, of equal shape in every batch but for B"


def _concatenated(leaves: Sequence[Any]) -> Any:
    """One tensor, or one list, of several."""
    if not isinstance(leaves[0], Tensor):
        return type(leaves[0])(value for leaf in leaves for value in leaf)
    try:
        return torch.cat(list(leaves))
    except RuntimeError as error:
        shapes = " and ".join(dict.fromkeys(str(list(leaf.shape)) for leaf in leaves))
        raise UnlearnError(f"batches with tensors {shapes} cannot be joined; {_REMEDY}") from error

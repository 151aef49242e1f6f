"""The arguments and the loss of a step; the number of samples in a batch, and one batch made of several."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import some_of

REMEDY = "define a method batch_size(batch) of the module, whose argument is called batch, that returns their number"
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
    """Count the samples of a batch: the first dimension of the tensors in its containers; 1 if there are only scalars.

    A list of so many values is a column as well, whatever its tensors' shapes. Texts are not counted, as a sample may have
    several.

    Raises:
        UnlearnError: if there is no tensor, or if the first dimensions disagree, as where pictures have many boxes.

    Example:
        >>> batch_samples({"label": torch.tensor([1, 2]), "boxes": [torch.zeros(3, 4), torch.zeros(7, 4)]})
        2
    """
    counts = list(_counts_in(batch))
    every = list(dict.fromkeys(count for count, _ in counts))
    fitting = [one for one in every if all(count == one or one in lengths for count, lengths in counts)]
    kind = type(batch).__name__
    if len(fitting) == 1:
        return fitting[0]
    if every:
        raise UnlearnError(
            f"the first dimensions of the tensors in a batch ({kind}) disagree, {some_of(map(str, sorted(every)))}, so that its "
            f"samples cannot be counted; {REMEDY}"
        )
    try:
        return extract_batch_size(batch)
    except MisconfigurationException as error:
        raise UnlearnError(
            f"a batch ({kind}) holds no tensor, so that its samples cannot be counted; let the loader add one of shape [B, ...], "
            f"such as labels or indices, or {REMEDY}"
        ) from error


def _counts_in(content: Any, lengths: tuple[int, ...] = (), is_whole: bool = True) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield how many samples each part of a batch speaks of, with the lengths of the lists that it is in; a scalar of none."""
    if isinstance(content, Tensor):
        if content.ndim:
            yield len(content), lengths
    elif (values := _values_of(content)) is not None:
        if isinstance(content, (list, tuple)) and values:
            if all(map(_is_sample, values)):
                yield len(values), lengths
                lengths += (len(values),)
            elif not is_whole and len({isinstance(one, Tensor) for one in values}) == 1:  # the batch itself is a list of columns
                lengths += (len(values),)
        for value in values:
            yield from _counts_in(value, lengths, is_whole=False)


def _values_of(content: Any) -> list[Any] | None:
    """List what a container of Lightning's kinds holds; None for anything else."""
    if isinstance(content, (str, bytes, np.ndarray, Tensor)):
        return None
    if isinstance(content, Mapping):
        return list(content.values())
    if is_dataclass(content) and not isinstance(content, type):
        return [getattr(content, field.name) for field in fields(content)]
    return list(content) if isinstance(content, Iterable) else None


def _is_sample(content: Any) -> bool:
    """Whether a container is one sample of a list that was not collated: next to a tensor it has a number, which is no column."""
    values = _values_of(content) or []
    has_number = any(isinstance(one, (int, float, np.generic)) or (isinstance(one, Tensor) and one.ndim == 0) for one in values)
    return has_number and any(isinstance(one, Tensor) for one in values)


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
    raise UnlearnError(f"batches of {kinds} cannot be joined; {_JOINABLE}")


_JOINABLE = "let the loader give tensors [B, ...] and lists of B values, of equal shape in every batch but for B"


def _concatenated(leaves: Sequence[Any]) -> Any:
    """One tensor, or one list, of several."""
    if not isinstance(leaves[0], Tensor):
        return type(leaves[0])(value for leaf in leaves for value in leaf)
    try:
        return torch.cat(list(leaves))
    except RuntimeError as error:
        shapes = " and ".join(dict.fromkeys(str(list(leaf.shape)) for leaf in leaves))
        raise UnlearnError(f"batches with tensors {shapes} cannot be joined; {_JOINABLE}") from error

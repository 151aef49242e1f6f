"""The memory of tensors: which storages one has, which ones an operation writes to, how often it was written to."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that a tensor consists of: itself, or what a subclass as DTensor wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            yield from plain_tensors(inner) if isinstance(inner, Tensor) else ()  # a mesh of devices is none
    else:
        yield tensor


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of a tensor; none of one that has no plain memory."""
    for part in plain_tensors(tensor):
        try:
            yield part.untyped_storage()
        except (NotImplementedError, RuntimeError):
            continue


def written_tensors(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to, by its schema.

    The kernels of batch normalization in training mode also write the running statistics, which their schema conceals.
    """
    for number, name, always in _outputs(func):
        value = args[number] if number < len(args) else kwargs.get(name)
        if always or _trains(func, args, kwargs):
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


@functools.cache
def _outputs(func: Any) -> list[tuple[int, str, bool]]:
    """Position and name of each argument that is written to, and whether in evaluation mode, too."""
    schema = getattr(func, "_schema", None)  # an operator of higher order has none
    found = []
    for number, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append((number, argument.name, True))
        elif argument.name in ("running_mean", "running_var"):
            found.append((number, argument.name, False))
    return found


def _trains(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    for number, argument in enumerate(func._schema.arguments):
        if argument.name in ("training", "train", "use_input_stats"):
            return bool(args[number] if number < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; a tensor made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version

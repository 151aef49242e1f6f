"""Digests of batches: compare two of them without keeping either."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from slug_lightning.tensors.bits import digest_of

UNCHANGEABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class CannotDigest(RuntimeError):
    """Raised where a batch holds an object of a type that cannot be looked into."""


def _checksum(tensor: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    content = content.clone() if content.data_ptr() % 8 else content  # as only aligned bytes make words
    words = content.view(torch.int64) if content.numel() % 8 == 0 else content.to(torch.int64)
    # A factor for every position, by a mixing function (SplitMix64's constants): 64-bit arithmetic wraps around.
    factors = torch.arange(1, len(words) + 1, device=words.device) * -7046029254386353131
    factors = (factors ^ (factors >> 30)) * -4658895280553007687
    factors = (factors ^ (factors >> 27)) * -7723592293110705685
    return tensor.shape, tensor.dtype, int((words * (factors ^ (factors >> 31))).sum())


def _refuse(leaf: Any) -> Any:
    raise CannotDigest(f"a batch holds a {type(leaf).__name__}, so that it cannot be compared")


def fingerprint(
    batch: Any, of_tensor: Callable[[Tensor], Any] = _checksum, of_other: Callable[[Any], Any] = _refuse
) -> list[Any]:
    """Describe a batch: two batches hold the same if their descriptions are equal.

    Args:
        batch: any tree of containers.
        of_tensor: describes a tensor; by default by shape, dtype and a sum that depends on every byte and its position.
        of_other: describes a leaf of a type that cannot be looked into; by default it raises `CannotDigest`.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return of_tensor(leaf)
        if isinstance(leaf, UNCHANGEABLE):
            return leaf
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
            return of_tensor(torch.tensor(leaf))
        if isinstance(leaf, Mapping):  # of a type that pytree does not know
            return fingerprint(dict(leaf), of_tensor, of_other)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            content = {field.name: getattr(leaf, field.name) for field in fields(leaf)}  # with slots they are not in vars()
            return fingerprint(content | getattr(leaf, "__dict__", {}), of_tensor, of_other)
        return of_other(leaf)

    leaves, structure = tree_flatten(batch)
    return [structure, *map(of_leaf, leaves)]


def digest(content: Any, of_other: Callable[[Any], Any] = _refuse) -> str:
    """SHA-256 over everything in a tree of containers, bit for bit and with its names, whatever the device."""
    described = fingerprint(content, lambda tensor: digest_of({"": tensor}, ""), of_other)
    return hashlib.sha256(repr(described).encode()).hexdigest()

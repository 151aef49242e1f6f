"""Whether two batches hold the same, told without keeping one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from slug_lightning.tensors.bits import digest_of

UNCHANGEABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class CannotDigest(RuntimeError):
    """A batch holds something of a kind that nobody here can look into."""


def _checksum(tensor: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    content = content.clone() if content.data_ptr() % 8 else content  # as only aligned bytes make words
    words = content.view(torch.int64) if content.numel() % 8 == 0 else content.to(torch.int64)
    # A factor for every place, by a mixing function (SplitMix64's constants): 64-bit arithmetic wraps around.
    factors = torch.arange(1, len(words) + 1, device=words.device) * -7046029254386353131
    factors = (factors ^ (factors >> 30)) * -4658895280553007687
    factors = (factors ^ (factors >> 27)) * -7723592293110705685
    return tensor.shape, tensor.dtype, int((words * (factors ^ (factors >> 31))).sum())


def _refuse(leaf: Any) -> Any:
    raise CannotDigest(f"a batch holds a {type(leaf).__name__}, so that two of them cannot be compared")


def fingerprint(
    batch: Any, of_tensor: Callable[[Tensor], Any] = _checksum, of_other: Callable[[Any], Any] = _refuse
) -> list[Any]:
    """Tells whether two batches hold the same: how they are put together, and every leaf.

    Args:
        batch: any tree of containers.
        of_tensor: what tells a tensor; by default its kind and a sum that knows every byte's place.
        of_other: what tells a leaf of a kind that nobody here can look into; by default none is taken.

    Raises:
        CannotDigest: if there is such a leaf.
    """
    leaves, structure = tree_flatten(batch)
    found: list[Any] = [structure]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(of_tensor(leaf))
        elif isinstance(leaf, UNCHANGEABLE):
            found.append(leaf)
        elif isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
            found.append(of_tensor(torch.tensor(leaf)))
        elif isinstance(leaf, Mapping):  # one that the tree of containers does not know
            found.append(fingerprint(dict(leaf), of_tensor, of_other))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.append(fingerprint(dict(vars(leaf)), of_tensor, of_other))
        else:
            found.append(of_other(leaf))
    return found


def digest(content: Any, of_other: Callable[[Any], Any] = _refuse) -> str:
    """SHA-256 over everything in a tree of containers, bit for bit and with its names; of tensors wherever they are.

    Args:
        content: a batch, or any other tree.
        of_other: as in `fingerprint`.

    Raises:
        CannotDigest: if something in it is of a kind that nobody here can look into.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)}) != digest({"x": torch.tensor([0.0, -0.0])})
        True
    """
    told = fingerprint(content, lambda tensor: digest_of({"": tensor}, ""), of_other)
    return hashlib.sha256(repr(told).encode()).hexdigest()

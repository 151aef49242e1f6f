"""Whether two batches hold the same, told without keeping one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slug_lightning.trace import UNCHANGEABLE, CannotTrace


def fingerprint(batch: Any) -> list[Any]:
    """Tells whether two batches hold the same: every leaf, of a tensor its kind and a sum that knows every byte's place.

    Raises:
        CannotTrace: if something in it is of a kind that nobody here can look into.
    """
    found: list[Any] = []
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.append(_checksum(leaf))
        elif isinstance(leaf, UNCHANGEABLE):
            found.append(leaf)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            found.append(_checksum(torch.tensor(leaf)))
        elif isinstance(leaf, Mapping):  # one that the tree of containers does not know
            found.append([*leaf.keys(), *fingerprint(list(leaf.values()))])
        elif is_dataclass(leaf):
            found.append(fingerprint(dict(vars(leaf))))
        else:
            raise CannotTrace(f"a batch holds a {type(leaf).__name__}, so that two of them cannot be compared")
    return found


def _checksum(tensor: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    content = content.clone() if content.data_ptr() % 8 else content  # as only aligned bytes make words
    words = content.view(torch.int64) if content.numel() % 8 == 0 else content.to(torch.int64)
    # A factor for every place, by a mixing function (SplitMix64's constants): 64-bit arithmetic wraps around.
    factors = torch.arange(1, len(words) + 1, device=words.device) * -7046029254386353131
    factors = (factors ^ (factors >> 30)) * -4658895280553007687
    factors = (factors ^ (factors >> 27)) * -7723592293110705685
    return tensor.shape, tensor.dtype, int((words * (factors ^ (factors >> 31))).sum())

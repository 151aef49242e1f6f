"""Digests and equality of tensors, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from slug_lightning.tensors.dtensor import whole


def digest_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and a text; collective where one is sharded."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit, also NaNs and signed zeros, whatever the device; collective where one is sharded."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's content as bytes, `[n]`, on the CPU."""
    return whole(tensor).cpu().contiguous().flatten().view(torch.uint8)

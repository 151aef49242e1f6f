"""Norms and inner products of a layer's tensors, whole or spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.dtensor import copies
from slug_lightning.tensors.layers import Layer

CHUNK = 2**20


def norm(layer: Layer, tensors: Mapping[str, Tensor], processes: Processes) -> float:
    """Compute the norm of a layer's weights, gradient or change, as one long vector; collective."""
    return math.sqrt(product(layer, tensors, tensors, processes))


def product(layer: Layer, one: Mapping[str, Tensor], other: Mapping[str, Tensor], processes: Processes) -> float:
    """Compute the inner product of two of a layer's weights, gradient or change; collective."""
    return math.fsum(processes.all_gather_object("a product", product_share(layer, one, other, processes.world_size)))


def direction_norm(
    layer: Layer, direction: Mapping[str, Tensor], processes: Processes, error: type[Exception] = UnlearnError
) -> float:
    """Compute the norm of a direction, and raise an error if it leads nowhere; collective."""
    length = norm(layer, direction, processes)
    if not 0 < length < math.inf:
        raise error(f"direction: that of {layer.name} has norm {length}; it must be finite and not zero")
    return length


def product_share(layer: Layer, one: Mapping[str, Tensor], other: Mapping[str, Tensor], world_size: int) -> float:
    """Compute this process's share of an inner product; what several processes hold is divided among them."""
    parts = [1 / copies(p, world_size) * _dot(one[name], other[name]) for name, p in layer.parameters.items()]
    return sum(parts, 0.0)


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in fp64, a million elements at a time: the wider copies stay small."""
    parts = zip(a.flatten().split(CHUNK), b.to(a.device).flatten().split(CHUNK), strict=True)
    return sum((x.double() * y.double()).sum().item() for x, y in parts)

"""Tensors of which every process holds a part (DTensor), beside those that every process holds whole."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    with torch.no_grad():  # else it would be a node of a graph
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def write_local(tensor: Tensor, values: Tensor) -> None:
    """Write the part of a tensor that this process holds, in place."""
    if isinstance(tensor, DTensor):
        local(tensor).copy_(values)
    else:
        tensor.copy_(values)  # not by `.data`: whoever watches the version must notice


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded; then every process must call this."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of which `part` is what this process holds, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return part
    parts = DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )
    return whole(parts)


def placed(values: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded as `like` is; without communication."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def copies(tensor: Tensor, processes: int) -> int:
    """How many of the processes hold each element.

    Example:
        >>> copies(torch.ones(2), processes=3)
        3
    """
    if not isinstance(tensor, DTensor):
        return processes
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return processes // math.prod(size for placement, size in sizes if not isinstance(placement, Replicate))


def shard(model: nn.Module, mesh: DeviceMesh, methods: Iterable[str] = ()) -> None:
    """Shard a model by FSDP2, block by block, unless it is sharded already.

    Args:
        model: its blocks are what its `nn.ModuleList`s hold.
        mesh: over which the data are shared.
        methods: by which it is called, besides `forward`.
    """
    if isinstance(model, FSDPModule):
        return
    scalars = {p for p in model.parameters() if p.ndim == 0}  # cannot be sharded
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh, ignored_params=scalars)
    for method in methods:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)

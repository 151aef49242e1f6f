"""Tensors of which every rank holds a part (DTensor), and those that every rank holds whole, by the same functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, detached, sharing its memory."""
    with torch.no_grad():  # else it would be a node of a graph
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def write_local(tensor: Tensor, values: Tensor) -> None:
    """Write the part of a tensor that this rank holds, in place."""
    # Not by `.data`: whoever watches the version must notice.
    (local(tensor) if isinstance(tensor, DTensor) else tensor).copy_(values)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached; collective where it is sharded."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """Return all of a tensor that is sharded as `like` is, of which this rank holds `part`; collective."""
    if not isinstance(like, DTensor):
        return part
    stride = torch.empty(like.shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return whole(DTensor.from_local(part.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=stride))


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank has whole as `like` is sharded, without communication."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Free the gathered tensors that a sharded model still holds after a pass: an edit of a shard must be seen."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def copies(tensor: Tensor, world_size: int) -> int:
    """Count the ranks that hold each element."""
    if not isinstance(tensor, DTensor):
        return world_size
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return world_size // math.prod(size for placement, size in sizes if not isinstance(placement, Replicate))


def shard(model: nn.Module, mesh: DeviceMesh, methods: Iterable[str] = ()) -> None:
    """Shard a model by FSDP2 unless it is sharded already, each block (what its `nn.ModuleList`s hold) by itself.

    `methods` are those by which it is called, besides `forward`.
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

"""Tensors of which every process holds a part are read, written, scored and edited as if they were whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _processes import Ended, in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from slug_lightning.distributed.processes import Processes
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.patches.edit import Edit, PatchError
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.tensors.bits import bitwise_equal, digest_of
from slug_lightning.tensors.dtensor import copies, local, shard, shard_like, whole, whole_like, write_local
from slug_lightning.tensors.layers import Layer

LINE = {"rows": [Shard(0)], "columns": [Shard(1)], "everywhere": [Replicate()]}
SQUARE = {
    "rows, everywhere": [Shard(0), Replicate()],
    "everywhere, columns": [Replicate(), Shard(1)],
    "rows, columns": [Shard(0), Shard(1)],
    "rows twice": [Shard(0), Shard(0)],
    "everywhere": [Replicate(), Replicate()],
}
SHAPES = [(5, 3), (1, 4), (6, 2)]
"""Of 5 rows, two processes hold 3 and 2; of 1, one holds none."""


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everywhere(function: Any, count: int, *args: Any) -> list[Any]:
    """The results of all processes, or the first one's failure."""
    found = in_processes(count, function, *args)
    for ended in found:
        if isinstance(ended, Ended):
            raise ended
    return found


def meshes(count: int) -> tuple[DeviceMesh, dict[str, Any]]:
    dist.init_process_group("gloo")
    if count < 4:
        return init_device_mesh("cpu", (count,)), LINE
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel")), SQUARE


# ---- tensors


def test_whole_tensors_are_themselves():
    w = nn.Parameter(values((2, 3)))
    assert local(w).data_ptr() == whole(w).data_ptr() == w.data_ptr()
    assert not local(w).requires_grad and not whole(w).requires_grad
    new = torch.ones(2, 3)
    assert shard_like(new, w) is new and whole_like(new, w) is new
    assert [copies(w, count) for count in (1, 2, 5)] == [1, 2, 5]
    version = w._version
    with torch.no_grad():
        write_local(w, new)
    assert torch.equal(w, new) and w._version > version


def moved_about(count: int) -> list[str]:
    mesh, ways = meshes(count)
    problems = []
    for shape in SHAPES:
        for name, placements in ways.items():
            full, other = values(shape), values(shape, seed=1)
            sharded = nn.Parameter(distribute_tensor(full, mesh, placements))
            part = local(sharded)
            found = {
                "local shares memory": part.data_ptr() == sharded.detach().to_local().data_ptr(),
                "local is no graph's": not part.requires_grad and not isinstance(part, DTensor),
                "whole": torch.equal(whole(sharded), full) and not isinstance(whole(sharded), DTensor),
                "whole of a part": torch.equal(whole_like(part.double(), sharded), full.double()),
                "sharded": torch.equal(
                    shard_like(other, sharded).to_local(), distribute_tensor(other, mesh, placements).to_local()
                ),
                "sharded as": shard_like(other, sharded).placements == sharded.placements,
                "sharded keeps its dtype": shard_like(other.double(), sharded).dtype == torch.float64,
                "sharded values stay": torch.equal(other, values(shape, seed=1)),
            }
            found["copies"] = _summed(part.numel()) == copies(sharded, count) * full.numel()
            with torch.no_grad():
                write_local(sharded, local(shard_like(other, sharded)) * 2)
            found["write"] = torch.equal(whole(sharded), other * 2)
            found["same memory"] = local(sharded).data_ptr() == part.data_ptr()
            problems += [f"{shape}, {name}: {what}" for what, well in found.items() if not well]
    return problems


@pytest.mark.parametrize("count", [2, 3, 4])
def test_parts_make_the_whole_and_the_whole_makes_the_parts(count):
    assert everywhere(moved_about, count, count) == [[]] * count


def without_communication() -> Any:
    """Only one process shards a tensor: it must not wait for the other."""
    mesh, _ = meshes(2)
    like = distribute_tensor(values((5, 3)), mesh, [Shard(0)])
    found = shard_like(values((5, 3)), like).to_local().shape if dist.get_rank() == 0 else None
    dist.barrier()
    return found


def test_a_whole_tensor_is_sharded_without_communication():
    assert everywhere(without_communication, 2) == [(3, 3), None]


# ---- tensor parallelism under FSDP2


class Wide(nn.Module):
    """Linear layers as a transformer's feed-forward part has them; 6 features over 2 × 2 processes are uneven."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def in_two_dimensions() -> tuple[nn.Module, DeviceMesh]:
    mesh, _ = meshes(4)
    model = Wide()
    parallelize_module(model, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data_parallel"])
    return model, mesh


def over_tensor_parallelism() -> list[str]:
    model, _ = in_two_dimensions()
    problems = []
    for name, full in Wide().state_dict().items():
        parameter = dict(model.named_parameters())[name]
        part = local(parameter).clone()
        new = full + 1
        found = {
            "whole": lambda p=parameter, f=full: torch.equal(whole(p), f),
            "whole of a part": lambda p=parameter, f=full, part=part: torch.equal(whole_like(part, p), f),
            "sharded": lambda p=parameter, f=full, part=part: torch.equal(local(shard_like(f, p)), part),
            "sharded as": lambda p=parameter, f=full: shard_like(f, p).placements == p.placements,
            "copies": lambda p=parameter, f=full, part=part: _summed(part.numel()) == copies(p, 4) * f.numel(),
            "written": lambda p=parameter, new=new: _written(p, new),
        }
        for what, question in found.items():
            try:
                problems += [] if question() else [f"{name} {parameter.placements}: {what}"]
            except Exception as error:
                problems.append(f"{name} {parameter.placements}: {what}: {error!r}")
    return problems


def _summed(number: int) -> float:
    total = torch.tensor(float(number))
    dist.all_reduce(total)
    return total.item()


def _written(parameter: Tensor, new: Tensor) -> bool:
    with torch.no_grad():
        parameter.copy_(shard_like(new, parameter))
    return torch.equal(whole(parameter), new)


def test_it_is_all_the_same_over_tensor_parallelism():
    assert everywhere(over_tensor_parallelism, 4) == [[]] * 4


# ---- shard


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)])
        self.head = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x) * self.scale

    def encode(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def sharded_blocks() -> Any:
    mesh, _ = meshes(2)
    model, plain = Blocks(), Blocks()
    shard(model, mesh, methods=["encode", "not there"])
    kinds = [type(part).__name__ for part in (model, *model.blocks, model.head)]
    before = {name: id(p) for name, p in model.named_parameters()}
    shard(model, mesh)  # again
    once = {name: id(p) for name, p in model.named_parameters()} == before
    sharded = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    x = values((4, 3))
    same = torch.equal(model(x), plain(x)) and torch.equal(model.encode(x), plain.encode(x))
    return kinds, once, same, sharded, isinstance(model, FSDPModule)


def test_a_model_is_sharded_once_block_by_block_and_called_by_its_methods():
    names = set(Blocks().state_dict()) - {"scale"}
    kinds = ["FSDPBlocks", "FSDPLinear", "FSDPLinear", "Linear"]
    assert everywhere(sharded_blocks, 2) == [(kinds, True, True, names, True)] * 2


# ---- scores


def layers_of(parameters: dict[str, Tensor]) -> list[Layer]:
    """One for each tensor, and one group of all."""
    return [*(Layer(name, {name: p}, "tower") for name, p in parameters.items()), Layer("all", parameters, "tower")]


def gradients_of(parameters: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: values(tuple(p.shape), seed + place) for place, (name, p) in enumerate(parameters.items())}


def plain_parameters() -> dict[str, Tensor]:
    return {f"{rows} rows": nn.Parameter(values((rows, 3), rows)) for rows in (1, 4, 5, 7)} | {
        "a number": nn.Parameter(values(()))
    }


def scored(count: int) -> Any:
    mesh, ways = meshes(count)
    plain = plain_parameters()
    forget, retain = gradients_of(plain, 10), gradients_of(plain, 20)
    found = {}
    for name, placements in ways.items():
        spread = {n: nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) if p.ndim else p for n, p in plain.items()}
        parts = [{n: local(shard_like(g, spread[n])) if g.ndim else g for n, g in whole.items()} for whole in (forget, retain)]
        found[name] = layer_statistics(layers_of(spread), *parts, Processes(dist.get_rank(), count))
    return found


def rows_of(scores: dict[str, list[LayerStatistics]]) -> dict[str, list[dict[str, Any]]]:
    return {way: [score.row(True) for score in found] for way, found in scores.items()}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_layers_spread_over_processes_have_the_scores_of_whole_ones(count):
    plain = plain_parameters()
    expected = layer_statistics(layers_of(plain), gradients_of(plain, 10), gradients_of(plain, 20))
    assert len(expected) == 6
    found = everywhere(scored, count, count)
    assert all(rows_of(scores) == rows_of(found[0]) for scores in found), "the processes would choose differently"
    for way, scores in found[0].items():
        for score, wanted in zip(scores, expected, strict=True):
            for name in ("importance", "alignment", "forget_norm", "weight_norm", "retain_norm"):
                value = pytest.approx(getattr(wanted, name), rel=1e-12, abs=1e-14)
                assert getattr(score, name) == value, (way, score.name, name)
            assert (score.name, score.layer.tower) == (wanted.name, wanted.layer.tower)


def a_part_is_zero() -> Any:
    """All that is not zero lies in the second process."""
    mesh, _ = meshes(2)
    weight = distribute_tensor(torch.tensor([[0.0], [0.0], [2.0]]), mesh, [Shard(0)])
    forget = [torch.zeros(2, 1), torch.tensor([[3.0]])][dist.get_rank()]
    (score,) = layer_statistics([Layer("w", {"w": weight}, "t")], {"w": forget}, {"w": -forget}, Processes(dist.get_rank(), 2))
    return score.importance, score.alignment


def test_a_layer_is_left_out_only_if_it_is_zero_everywhere():
    assert everywhere(a_part_is_zero, 2) == [(1.5, 1.0)] * 2


# ---- patches


def patch_of(dtype: torch.dtype) -> UnlearnPatch:
    base = {name: tensor.to(dtype) for name, tensor in Blocks().state_dict().items() if name in ("blocks.0.weight", "head.bias")}
    edits = [Edit(c, step, gradients_of(base, seed)) for c, step, seed in (("cats", 0.37, 30), ("dogs", -1.3, 40))]
    return UnlearnPatch(base, edits)


def patched(count: int, dtype: torch.dtype) -> Any:
    mesh, _ = meshes(count)
    model, patch = Blocks().to(dtype), patch_of(dtype)
    shard(model, mesh)
    states = []
    for strength in (1.0, 0.5):
        patch.apply(model, strength)
        states.append({name: whole(p).clone() for name, p in model.named_parameters()})
        try:
            patch.apply(model, strength)
        except PatchError as error:
            states.append(str(error))
        patch.revert(model, strength)
        states.append({name: whole(p).clone() for name, p in model.named_parameters()})
    patch.apply(model)
    digest = digest_of(dict(model.named_parameters()), "")
    own = {name: tensor.clone() for name, tensor in patch.base.items()}
    patch.revert(model)
    return states, digest, all(bitwise_equal(own[name], dict(model.named_parameters())[name]) for name in own)


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.float32), (3, torch.float32), (3, torch.bfloat16)])
def test_a_patch_does_to_a_sharded_model_what_it_does_to_a_plain_one_bit_for_bit(count, dtype):
    model, patch = Blocks().to(dtype), patch_of(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = []
    for strength in (1.0, 0.5):
        patch.apply(model, strength)
        expected += [{name: p.detach().clone() for name, p in model.named_parameters()}, "already", before]
        patch.revert(model, strength)
    patch.apply(model)
    digest = digest_of(dict(model.named_parameters()), "")
    for states, found_digest, restored in everywhere(patched, count, count, dtype):
        assert found_digest == digest and restored
        for state, wanted in zip(states, expected, strict=True):
            if isinstance(wanted, str):
                assert wanted in state
            else:
                assert all(bitwise_equal(state[name], tensor) for name, tensor in wanted.items())


def patched_in_two_dimensions() -> Any:
    model, _ = in_two_dimensions()
    base = Wide().state_dict()
    patch = UnlearnPatch(base, [Edit("cats", 0.5, gradients_of(base, 50))])
    patch.apply(model)
    edited = {name: whole(p) for name, p in model.named_parameters()}
    patch.revert(model)
    return edited, {name: whole(p) for name, p in model.named_parameters()}


@functools.cache
def wide_edited() -> dict[str, Tensor]:
    model = Wide()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    UnlearnPatch(base, [Edit("cats", 0.5, gradients_of(base, 50))]).apply(model)
    return model.state_dict()


def test_a_patch_is_applied_over_tensor_parallelism():
    for edited, reverted in everywhere(patched_in_two_dimensions, 4):
        assert all(bitwise_equal(edited[name], tensor) for name, tensor in wide_edited().items())
        assert all(bitwise_equal(reverted[name], tensor) for name, tensor in Wide().state_dict().items())

"""Which layers are worth searching, known by a model's structure before any gradient."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from slug_lightning.tensors.layers import Layer, plain_name

QUARTER = 4
"""Of a tower without blocks, one layer in this many stands for the first block, and as many for the last."""


def short_list(layers: Sequence[Layer], module: nn.Module) -> list[str]:
    """Name the layers of each tower's first and last block, and its projections and heads.

    Along covariance directions and paths the least harmful layer was nearly always one of these, while importance and
    alignment said little about the harm.

    A block is a member of the longest `nn.ModuleList`, or `nn.Sequential` of children of one class, among those in which at
    least two members hold layers of the tower; of equals it is the first. Lists of the same class of block whose names
    differ only in numbers (`layer1` to `layer4` of a ResNet) are stages, and are read as one list. Where a tower holds only
    part of a list, only its own members count. Projections and heads are the matrices outside the blocks. Of a tower without
    blocks, a quarter of the layers at either end, at least one, is taken and nothing else.

    Args:
        layers: as `slug_lightning.tensors.layers.find_layers` gives them; a group counts by its first tensor.
        module: whose parameters they are; it may be compiled, or carry adapters.

    Returns:
        Names, in the order of `layers`.

    Example:
        >>> from slug_lightning.tensors.layers import find_layers
        >>> net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        >>> short_list(find_layers(net), net)
        ['0.0.weight', '2.0.weight']
    """
    lists = dict(_lists(module))
    chosen: set[str] = set()
    for tower in dict.fromkeys(layer.tower for layer in layers):
        chosen |= _of_tower([layer for layer in layers if layer.tower == tower], lists)
    return [layer.name for layer in layers if layer.name in chosen]


def _of_tower(layers: Sequence[Layer], lists: Mapping[str, dict[str, type]]) -> set[str]:
    """The names of one tower's layers that are chosen."""
    tensors = {layer.name: next(iter(layer.parameters)) for layer in layers}
    blocks = _blocks(list(tensors.values()), lists)
    if not blocks:
        end = max(len(layers) // QUARTER, 1)
        return {layer.name for layer in (*layers[:end], *layers[-end:])}
    ends, inside = (blocks[0], blocks[-1]), tuple(blocks)
    matrices = {layer.name for layer in layers if next(iter(layer.parameters.values())).ndim == 2}
    return {
        name
        for name, tensor in tensors.items()
        if tensor.startswith(ends) or (name in matrices and not tensor.startswith(inside))
    }


def _blocks(tensors: Sequence[str], lists: Mapping[str, dict[str, type]]) -> list[str]:
    """Prefixes of the blocks that hold these tensors, in order; none where no list has two of them."""
    held = {name: own for name, members in lists.items() if (own := _holding(name, members, tensors))}
    longest = max(held, key=lambda name: len(held[name]), default=None)
    if longest is None or len(held[longest]) < 2:
        return []
    kinds = set(lists[longest].values())
    stages = [name for name in held if _numberless(name) == _numberless(longest) and set(lists[name].values()) <= kinds]
    return [prefix for name in stages for prefix in held[name]]


def _holding(name: str, members: Iterable[str], tensors: Sequence[str]) -> list[str]:
    """Prefixes of those members of a list that hold any of the tensors, in order."""
    holding = {tensor[len(name) :].split(".")[0] for tensor in tensors if tensor.startswith(name)}
    return [f"{name}{member}." for member in members if member in holding]


def _lists(module: nn.Module) -> Iterator[tuple[str, dict[str, type]]]:
    """Lists that may hold blocks, by the prefix of their members' names, outer ones first: the members' classes by name.

    A sequence of one class may have a single member, as it can be a stage of a longer list.
    """
    for name, found in module.named_modules():
        # What a member computes counts, not that it is compiled.
        members = {key: type(getattr(member, "_orig_mod", member)) for key, member in found.named_children()}
        if isinstance(found, nn.ModuleList) or (isinstance(found, nn.Sequential) and len(set(members.values())) == 1):
            yield plain_name(f"{name}.") if name else "", members


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)

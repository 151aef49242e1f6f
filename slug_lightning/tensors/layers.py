"""Which tensors may be edited, and which of them are edited together."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NoReturn

import torch
from torch import nn

from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.dtensor import local, write_local
from slug_lightning.utils.names import some_of

Granularity = Literal["tensor", "module", "siblings"]

NOT_A_LAYER = re.compile(r"(^|[._])(logit_scale|logit_bias|class_emb|cls_token|pos_emb|position|token_emb|relative_pos)")
"""Names of tensors that hold positions or scales and nothing about a concept (SLUG, arXiv 2407.11867)."""


@dataclass(frozen=True)
class Layer:
    """Parameters that are scored and edited together, competing on the front of their tower.

    The name of a group is what the names of its tensors have in common. `prefix` is what these have in front of the names in
    patches, which are the wrapped model's own.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    tower: str = "model"
    prefix: str = ""


def plain_name(name: str) -> str:
    """Return a tensor's name without what `torch.compile` inserts, which wraps a module in one of its own."""
    return name.replace("_orig_mod.", "")


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters by the names that layers and patches use."""
    return {plain_name(name): p for name, p in module.named_parameters()}


def find_layers(
    module: nn.Module,
    layers: str | Sequence[str] = "*",
    granularity: Granularity = "tensor",
    towers: Mapping[str, str | Sequence[str]] | None = None,
) -> list[Layer]:
    """List the layers of `module` that may be edited.

    Vectors (biases, norms), embeddings and logit scales are left out unless `layers` names one exactly, without a wildcard;
    so are integers, as in quantised weights, and frozen tensors: of a model with adapters these are the layers.
    A pattern other than "*" that matches only frozen tensors selects them: the base below the adapters. A tensor with
    several names (tied weights) counts once, under the first.

    Args:
        module: any model.
        layers: shell-style patterns of tensor names; a tensor counts if any of them matches.
        granularity: "tensor", each by itself; "module", the tensors of one submodule together; "siblings", the
            tensors of the submodules that share a parent (q, k and v; fc1 and fc2).
        towers: name of a tower -> pattern of its tensors, or several; the rest is a tower of its own, called "model".
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    editable = _editable(module, patterns)
    selected = {name for pattern in patterns for name in _selected(pattern, editable)}
    if not selected:
        raise UnlearnError(
            f"layers: all {len(editable)} candidates are frozen; set requires_grad=True on those that may be edited, or name "
            f"them by a pattern: {some_of(editable)}"
        )
    groups: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
    for name, parameter in editable.items():
        if name in selected:
            groups.setdefault((_group(name, granularity), _tower(name, towers or {})), {})[name] = parameter
    times = Counter(group for group, _ in groups)
    return [
        Layer(group if times[group] == 1 else f"{group} ({tower})", members, tower) for (group, tower), members in groups.items()
    ]


def _editable(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Find the tensors that match a pattern and are not left out for what they are, frozen ones included."""
    named = plain_parameters(module)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            near = difflib.get_close_matches(pattern.replace("*", ""), named, n=5, cutoff=0.3) or named
            raise UnlearnError(f"layers: {pattern!r} matches no parameter; near misses: {some_of(list(near)[:5])}")
    embeddings = {
        id(p) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters(recurse=False)
    }
    if not patterns:
        raise UnlearnError("layers: give at least one pattern")
    matched = {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    editable = {
        name: p
        for name, p in matched.items()
        if p.is_floating_point()
        and (name in patterns or (p.ndim >= 2 and id(p) not in embeddings and not NOT_A_LAYER.search(name)))
    }
    if not editable:
        raise UnlearnError(
            f"layers: {patterns} matches only vectors, embeddings, scales or integers, which are left out; "
            f"name one exactly to edit it anyway: {some_of(matched)}"
        )
    return editable


def _selected(pattern: str, editable: Mapping[str, nn.Parameter]) -> list[str]:
    """Select what is trainable among the matches; if nothing is, and the pattern is not "*", what is frozen."""
    matched = [name for name in editable if fnmatchcase(name, pattern)]
    return [name for name in matched if editable[name].requires_grad] or (matched if pattern != "*" else [])


def _group(name: str, granularity: Granularity) -> str:
    if granularity == "tensor":
        return name
    return ".".join(name.split(".")[: -1 if granularity == "module" else -2]) or "(root)"


def _tower(name: str, towers: Mapping[str, str | Sequence[str]]) -> str:
    for tower, patterns in towers.items():
        if any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)):
            return tower
    return "model"


TOGETHER = " + "
"""Joins the names of layers that one edit changes."""


def edited_layers(name: str | None) -> list[str]:
    """Return the layers that an edit's name stands for: several where one was not enough, none for None.

    Example:
        >>> edited_layers("encoder.0.weight + head.weight"), edited_layers(None)
        (['encoder.0.weight', 'head.weight'], [])
    """
    return name.split(TOGETHER) if name else []


def parameters_of(layers: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """Return the tensors of layers by name."""
    return {name: p for layer in layers for name, p in layer.parameters.items()}


def count_as_written(layers: Sequence[Layer]) -> None:
    """Let the layers' tensors count as changed, though they hold the same values.

    A module may remember what it computed of weights that have not changed since, by their version (`ClipModule` does so
    with class prompts). What an edit of these layers will make it compute again must be computed while recording, too.
    """
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters.values():
                write_local(parameter, local(parameter).clone())


def refuse_unmovable(layers: Sequence[Layer]) -> NoReturn:
    """Raise an UnlearnError that says why no step along the forget gradient can change any of these layers."""
    zero = [layer.name for layer in layers if not any(p.any() for p in layer.parameters.values())]
    if zero:
        raise UnlearnError(
            f"layers: {some_of(zero)} {'hold' if len(zero) > 1 else 'holds'} only zeros, as an adapter does before it is "
            "trained, so that a step relative to the norm is zero; train it first, or name other layers"
        )
    raise UnlearnError("forget: the loss has no gradient in any candidate layer; check layers=… and the loss")

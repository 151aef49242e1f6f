"""Statistics as named tensors and plain data, for a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from slug_lightning.objective.curvature import PARTS, Curvature, Statistics
from slug_lightning.objective.factors import Dense, Diagonal, Factor, Form, Identity, LowRank, Tied

KINDS: dict[str, type[Factor]] = {kind.__name__: kind for kind in (Dense, Diagonal, Identity, LowRank, Tied)}
PREFIX = "statistics/"
"""Of the tensors' names; no parameter's name has a slash."""


def pack(statistics: Statistics) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return plain data and tensors, from which `unpack` makes the same."""
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for part, by_name in statistics.factors.items():
        for name, factor in by_name.items():
            form = {"transposed": factor.form.transposed, "groups": factor.form.groups}
            rows.append({"part": part, "name": name, "kind": type(factor).__name__, "side": factor.side, **form})
            tensors |= {f"{PREFIX}{len(rows) - 1}/{key}": getattr(factor, key) for key in _tensors_of(type(factor))}
    return {"factors": rows, "fallbacks": dict(statistics.fallbacks)}, tensors


def unpack(data: Mapping[str, Any], tensors: Mapping[str, Tensor], watch: Curvature, copy: bool = False) -> Statistics:
    """Return what `pack` was given, on the devices of the tensors that `watch` is for.

    Raises:
        ValueError: if it isn't what `watch` would collect.
    """
    factors: dict[str, dict[str, Factor]] = {part: {} for part in sorted(watch.needs)}
    for number, row in enumerate(data["factors"]):
        kind, of = KINDS[row["kind"]], watch.tensors[row["name"]]
        form = Form(of.shape, bool(row["transposed"]), int(row["groups"]))
        found = {key: tensors[f"{PREFIX}{number}/{key}"] for key in _tensors_of(kind)}
        _check(kind, form, row, found)
        moved = {key: tensor.to(of.device, copy=copy) for key, tensor in found.items()}
        factors[row["part"]][row["name"]] = kind(form, row["side"], **moved)
    if any(set(by_name) != set(watch.tensors) for by_name in factors.values()):
        raise ValueError("it holds statistics of other tensors")
    return Statistics(factors, {str(name): str(reason) for name, reason in data["fallbacks"].items()})


def _tensors_of(kind: type[Factor]) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in ("form", "side")]


def _check(kind: type[Factor], form: Form, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    side = row["side"]
    if side != PARTS[row["part"]]:
        raise ValueError("it holds a factor of the other side")
    groups, size = form.groups, form.size(side)
    wanted: dict[type[Factor], dict[str, tuple[int, ...]]] = {
        Dense: {"matrices": (groups, size, size)},
        Diagonal: {"values": (groups, size)},
        Identity: {},
        LowRank: {"trace": (groups,)},
        Tied: {"matrix": (size, size), "counts": form.shape[:1]},
    }
    if kind is LowRank:
        rank = tensors["values"].shape[-1]
        wanted[kind] |= {"values": (groups, rank), "vectors": (groups, size, rank)}
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != wanted[kind]:
        raise ValueError("it holds factors of another shape")
    if not all(tensor.is_floating_point() and torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds factors that are not finite")

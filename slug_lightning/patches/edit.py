"""One concept's edit, and how edits change a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import digest_of


class PatchError(UnlearnError):
    """Raised where a patch is damaged or does not fit the model; the model is left as it was."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One concept's edit: a step along the forget gradient of some tensors.

    Attributes:
        concept: what is forgotten, in words.
        step: λ, the factor of the directions.
        directions: the forget gradient by tensor name, fp32.
        details: facts for whoever reads the patch later: layer, relative step, metrics before and after.
        strength: factor of the step, multiplied by the strength at which the patch is applied.
        parents: the edits that were active on the model when this one was made: concept, digest and strength of each.
        origin: the digest of the edit that this one was derived from by renaming or leaving out tensors; "" if it is as made.
    """

    concept: str
    step: float
    directions: dict[str, Tensor]
    details: dict[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    parents: list[dict[str, Any]] = field(default_factory=list)
    origin: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over directions and step as they were made; does not depend on the concept's name or the strength."""
        return self.origin or digest_of(self.directions, json.dumps(float(self.step)))


@dataclass(frozen=True, eq=False)
class PatchContent:
    """What a patch holds: every edited tensor as it was before, by name, and the edits."""

    base: dict[str, Tensor]
    edits: Sequence[Edit]


P = TypeVar("P", bound=PatchContent)


def edited(base: Tensor, steps: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Add scaled directions to a tensor, in the order given; gives a new tensor of `base`'s shape, dtype and device.

    Computed in fp32 (fp64 for fp64 tensors) by one product and one sum per direction, each rounded once, so that the
    result has the same bits on every device. A factor of 0 leaves every bit as it is, also of a negative zero.
    """
    steps = [(direction, factor) for direction, factor in steps if factor]
    if not steps:
        return base.clone()  # not through fp32, which does not keep the bits of NaNs
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    for direction, factor in steps:
        wide = wide + direction.to(wide) * factor
    return wide.to(base.dtype)

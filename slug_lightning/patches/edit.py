"""One concept's edit, and what edits make of a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import digest_of


class PatchError(UnlearnError):
    """A patch that is damaged, or does not belong to this model; the model is as it was."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One concept's edit: a step along the forget gradient of some tensors.

    Attributes:
        concept: what is forgotten, in words.
        step: λ, the factor of the directions.
        directions: the forget gradient by tensor name, fp32.
        details: facts for whoever reads the patch later: layer, relative step, metrics before and after.
        strength: how strongly the edit acts where its patch is applied at strength 1: a further factor of the step.
        parents: the edits that were active on the model when this one was made, as plain data: concept, digest, strength.
        origin: the digest of the edit that this one is, where it names its tensors otherwise than it was made with, or
            covers only some of them; "" where it is as it was made.
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
        """SHA-256 over the directions and the step as it was made: what it does, whatever it is called and how strongly."""
        return self.origin or digest_of(self.directions, json.dumps(float(self.step)))


class HoldsEdits(Protocol):
    """A dataclass of tensors as they were before, and edits of them, as `UnlearnPatch` is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def base(self) -> dict[str, Tensor]:
        """Every edited tensor as it was before, by name."""

    @property
    def edits(self) -> Sequence[Edit]:
        """Of these tensors."""


P = TypeVar("P", bound=HoldsEdits)


def edited(base: Tensor, steps: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Add scaled directions to a tensor, in the order given.

    Computed in fp32 (fp64 for fp64 tensors) by one product and one sum a direction, each rounded once, so that the
    result has the same bits on every device. A factor of 0 leaves every bit as it is, also of a negative zero.

    Args:
        base: the tensor before.
        steps: directions and their factors.

    Returns:
        A new tensor of `base`'s shape, dtype and device.

    Example:
        >>> edited(torch.ones(2), [(torch.tensor([1.0, -1.0]), 0.5)])
        tensor([1.5000, 0.5000])
    """
    steps = [(direction, factor) for direction, factor in steps if factor]
    if not steps:
        return base.clone()  # not by way of fp32, which keeps no NaN's bits
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    for direction, factor in steps:
        wide = wide + direction.to(wide) * factor
    return wide.to(base.dtype)

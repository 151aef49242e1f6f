"""Edits put into a model for a while: always rebuilt from the base, so that several add up in one way only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slug_lightning.patches.edit import Edit, edited
from slug_lightning.tensors.dtensor import local, whole_like, write_local
from slug_lightning.tensors.layers import TOGETHER, Layer


@dataclass(frozen=True, eq=False)
class EditStep:
    """A step along a direction of one layer: W + step · direction for each of its tensors.

    Attributes:
        layer: whose tensors are edited.
        direction: by tensor name; of a sharded tensor this process's part.
        step: λ; 1 where the direction is the whole change.
    """

    layer: Layer
    direction: Mapping[str, Tensor]
    step: float

    @cached_property
    def for_patch(self) -> dict[str, Tensor]:
        """The direction as a patch carries it: whole, on the CPU; of a sharded one, every process must ask for it."""
        return {
            name.removeprefix(self.layer.prefix): whole_like(self.direction[name], parameter).cpu()
            for name, parameter in self.layer.parameters.items()
        }

    @cached_property
    def digest(self) -> str:
        """That of the edit in the patch, by which edits of one tensor are ordered."""
        return Edit("", self.step, self.for_patch).digest


def merged(edits: Sequence[EditStep]) -> EditStep:
    """Make one edit of several, with all their tensors and a step of 1; where they edit the same tensor, they add up."""
    parameters = {name: p for edit in edits for name, p in edit.layer.parameters.items()}
    direction: dict[str, Tensor] = {}
    for edit in edits:
        for name, tensor in edit.direction.items():
            change = edit.step * tensor
            direction[name] = direction[name] + change if name in direction else change
    name = TOGETHER.join(edit.layer.name for edit in edits)
    return EditStep(Layer(name, parameters, edits[0].layer.tower, edits[0].layer.prefix), direction, 1.0)


class TemporaryEdits:
    """Puts edits into a model and takes them out again, in nested contexts.

    Inside several contexts the edits of all are there, each tensor computed from its base as a patch of all of them
    would (`slug_lightning.patches.edit.edited`), so that what is measured here is what a patch makes, bit for bit.

    `θ + λ·g_f`: ascent, though the paper prints a minus (its released programs disagree with each other).
    """

    def __init__(self) -> None:
        self._active: list[EditStep] = []
        self._base: dict[int, Tensor] = {}

    @contextmanager
    def applied(self, *edits: EditStep) -> Iterator[None]:
        """Inside, these edits are there as well as those of the contexts around; tensors of other layers are not written."""
        # By identity: two requests may have a layer of the same name from two lists.
        parameters = {id(p): (name, p) for edit in edits for name, p in edit.layer.parameters.items()}
        before = {key: local(p).clone() for key, (_, p) in parameters.items()}
        first = [key for key in parameters if key not in self._base]
        self._base |= {key: before[key] for key in first}
        self._active += edits
        with torch.no_grad():
            try:
                for key, (name, parameter) in parameters.items():
                    write_local(parameter, edited(self._base[key], self._steps(name)))
                yield
            finally:
                for key, (_, parameter) in parameters.items():
                    write_local(parameter, before[key])
                for key in first:
                    del self._base[key]
                del self._active[len(self._active) - len(edits) :]

    @property
    def active(self) -> list[EditStep]:
        """The edits that are in the model now."""
        return list(self._active)

    def _steps(self, name: str) -> list[tuple[Tensor, float]]:
        edits = [edit for edit in self._active if name in edit.layer.parameters]
        if len(edits) > 1:
            edits.sort(key=lambda edit: edit.digest)
        return [(edit.direction[name], edit.step) for edit in edits]

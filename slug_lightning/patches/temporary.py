"""Edits put into a model for a while: always rebuilt from the base, so that several add up in one way only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slug_lightning.patches.edit import edited
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.dtensor import local, whole_like, write_local
from slug_lightning.tensors.layers import Layer


@dataclass(frozen=True, eq=False)
class EditStep:
    """A step along the forget gradient of one layer.

    Attributes:
        layer: whose tensors are edited.
        gradient: g_f by tensor name; of a sharded tensor this process's part.
        step: λ.
        prefix: of the names that a patch leaves out, as it carries those of the wrapped model.
    """

    layer: Layer
    gradient: Mapping[str, Tensor]
    step: float
    prefix: str = ""

    @cached_property
    def directions(self) -> dict[str, Tensor]:
        """The gradient as a patch carries it: whole, on the CPU; of a sharded one, every process must ask for it."""
        parameters = self.layer.parameters
        return {
            name.removeprefix(self.prefix): whole_like(self.gradient[name], parameter).cpu()
            for name, parameter in parameters.items()
        }

    @cached_property
    def digest(self) -> str:
        """That of the edit in the patch, by which edits of one tensor are ordered."""
        return digest_of(self.directions, json.dumps(float(self.step)))


class TemporaryEdits:
    """Puts edits into a model and takes them out again, in nested contexts.

    Inside several contexts the edits of all are there, each tensor computed from its base as a patch of all of them
    would (`slug_lightning.patches.edit.edited`), so that what is measured here is what a patch makes, bit for bit.

    `θ + λ·g_f`: ascent, though the paper prints a minus (method.md: the released programs disagree with each other).

    Example:
        >>> layer = Layer("w", {"w": torch.nn.Parameter(torch.ones(2))})
        >>> bench = TemporaryEdits()
        >>> with bench.step(EditStep(layer, {"w": torch.ones(2)}, 0.5)):
        ...     with bench.step(EditStep(layer, {"w": torch.ones(2)}, 1.0)):
        ...         print(layer.parameters["w"].data)
        tensor([2.5000, 2.5000])
        >>> layer.parameters["w"].data
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        self._moves: list[EditStep] = []
        self._base: dict[int, Tensor] = {}

    @contextmanager
    def step(self, *moves: EditStep) -> Iterator[None]:
        """Inside, these edits are there as well as those of the contexts around; tensors of other layers are not written."""
        # By identity: two requests may have a layer of the same name from two lists.
        parameters = {id(p): (name, p) for move in moves for name, p in move.layer.parameters.items()}
        before = {key: local(p).clone() for key, (_, p) in parameters.items()}
        first = [key for key in parameters if key not in self._base]
        self._base |= {key: before[key] for key in first}
        self._moves += moves
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
                del self._moves[len(self._moves) - len(moves) :]

    def _steps(self, name: str) -> list[tuple[Tensor, float]]:
        moves = [move for move in self._moves if name in move.layer.parameters]
        if len(moves) > 1:
            moves.sort(key=lambda move: move.digest)
        return [(move.gradient[name], move.step) for move in moves]

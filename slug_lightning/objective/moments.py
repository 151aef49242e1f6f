"""Sums of second moments, batch by batch, from which the factors of a tensor are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from slug_lightning.objective.factors import Dense, Diagonal, Factor, Form, LowRank, Side, nystrom

WIDEST = 8192
"""A wider side gets a sketch in place of a whole matrix."""
RANK = 512
BLOCK = 512
"""Width of the blocks of a dense matrix."""


class Moment(ABC):
    """Σ rowsᵀ rows over all that is added, of one side of a tensor.

    Attributes:
        buffers: what the processes must add up, and nothing else.
    """

    def __init__(self, form: Form, side: Side, *shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.form = form
        self.side = side
        self.buffers = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    @abstractmethod
    def add(self, rows: Tensor, groups: Sequence[int]) -> None:
        """Add the rows `[groups, positions, dim]` of some groups, of the buffers' dtype; of `[1, …]` the same to each."""

    def _sum(self, groups: Sequence[int], blocks: Tensor, number: int = 0, *where: slice) -> None:
        """Add blocks to a part of a buffer."""
        is_run = len(groups) == groups[-1] + 1 - groups[0]
        index = slice(groups[0], groups[-1] + 1) if is_run else list(groups), *where
        self.buffers[number][index] += blocks

    @abstractmethod
    def factor(self, samples: int) -> Factor:
        """Return the mean over samples."""


class DenseMoment(Moment):
    """The whole matrix; until it is asked for, of a wide one only the blocks on and above the diagonal."""

    def add(self, rows: Tensor, groups: Sequence[int]) -> None:
        """Add rowsᵀ rows."""
        for start in range(0, rows.shape[-1], BLOCK):
            block, rest = slice(start, start + BLOCK), slice(start, None)
            self._sum(groups, rows[..., block].mT @ rows[..., rest], 0, block, rest)

    def whole(self, samples: int) -> Tensor:
        """Return the mean over samples, `[groups, dim, dim]`."""
        upper = self.buffers[0].triu() / samples
        return upper + upper.triu(1).mT

    def factor(self, samples: int) -> Dense:
        """Return the mean over samples."""
        return Dense(self.form, self.side, self.whole(samples))


class DiagonalMoment(Moment):
    """Its diagonal."""

    def add(self, rows: Tensor, groups: Sequence[int]) -> None:
        """Add the sums of squares."""
        self._sum(groups, rows.square().sum(1))

    def count(self, ids: Tensor, weights: Tensor) -> None:
        """Add one-hot rows: the number of each id, of those with weight 1."""
        self.buffers[0][0].index_add_(0, ids, weights.to(self.buffers[0].dtype))

    def factor(self, samples: int) -> Diagonal:
        """Return the mean over samples."""
        return Diagonal(self.form, self.side, self.buffers[0] / samples)


class SketchedMoment(Moment):
    """M Ω for a fixed Ω with orthonormal columns, and the exact trace."""

    def __init__(self, form: Form, side: Side, *shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(form, side, *shapes, dtype=dtype, device=device)
        # Drawn on the CPU, so that it is the same in every process.
        drawn = torch.randn(shapes[0][1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.omega = torch.linalg.qr(drawn)[0].to(device, dtype)

    def add(self, rows: Tensor, groups: Sequence[int]) -> None:
        """Add rowsᵀ (rows Ω)."""
        self._sum(groups, rows.mT @ (rows @ self.omega))
        self._sum(groups, rows.square().sum((1, 2)), 1)

    def factor(self, samples: int) -> LowRank:
        """Return the mean over samples."""
        sketch, trace = (buffer / samples for buffer in self.buffers)
        return nystrom(self.form, self.side, sketch, self.omega, trace)


def moment(form: Form, side: Side, diagonal: bool, dtype: torch.dtype, device: torch.device) -> Moment:
    """Return an empty sum, of the kind that fits the width of this side."""
    groups, size = form.matrix[0], form.size(side)
    if diagonal:
        return DiagonalMoment(form, side, (groups, size), dtype=dtype, device=device)
    if size > WIDEST:
        return SketchedMoment(form, side, (groups, size, min(RANK, size)), (groups,), dtype=dtype, device=device)
    return DenseMoment(form, side, (groups, size, size), dtype=dtype, device=device)

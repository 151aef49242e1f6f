"""Second moments of what a weight sees on either side, as linear maps that act on a tensor of the weight's shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError

Side = Literal["input", "output"]
DAMPING = 0.1


@dataclass(frozen=True)
class Form:
    """How a tensor acts as y = W x: as one matrix or as a block for each group.

    Attributes:
        shape: of the tensor. A convolution's kernel counts as `[out, in / groups * positions]`, a vector as one row.
        transposed: whether the tensor holds Wᵀ, as in `x @ P`, in the Conv1D of transformers, or as an embedding.
        groups: how many blocks of rows have inputs of their own: groups of a convolution, or slices of a packed weight.

    Example:
        >>> form = Form((3, 4), transposed=True, groups=2)
        >>> form.blocks(torch.ones(3, 4)).shape
        torch.Size([2, 2, 3])
    """

    shape: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Sizes of the blocks: groups, outputs and inputs of each."""
        if len(self.shape) < 2:
            return 1, 1, torch.Size(self.shape).numel()
        rows, columns = self.shape[0], torch.Size(self.shape[1:]).numel()
        out, size = (columns, rows) if self.transposed else (rows, columns)
        return self.groups, out // self.groups, size

    def size(self, side: Side) -> int:
        """Dimension of one side of a block."""
        return self.matrix[2 if side == "input" else 1]

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return the tensor as `[groups, out / groups, in]`."""
        return (tensor.flatten(1).T if self.transposed else tensor).reshape(self.matrix)

    def tensor(self, blocks: Tensor) -> Tensor:
        """Return blocks in the tensor's own shape."""
        groups, out, size = self.matrix
        return (blocks.reshape(groups * out, size).T if self.transposed else blocks).reshape(self.shape).contiguous()


@dataclass(frozen=True, eq=False)
class Factor(ABC):
    """A positive semidefinite matrix M for each group, acting on one side of a tensor: from the right on the input side.

    Everything is computed in fp64 (on the CPU where the device has none); results have the tensor's dtype and device.

    Attributes:
        form: of the tensors that it acts on.
        side: "input" or "output".
    """

    form: Form
    side: Side

    def solve(self, tensor: Tensor, damping: float = DAMPING) -> Tensor:
        """Multiply by M_ε⁻¹ = (M + ε tr(M)/dim I)⁻¹; where M is zero, leave as it is."""
        return self._act(tensor, lambda blocks: self._solve(blocks, damping))

    def times(self, tensor: Tensor) -> Tensor:
        """Multiply by M."""
        return self._act(tensor, self._times)

    def project_out(self, tensor: Tensor, share: float = 0.95) -> Tensor:
        """Multiply by I − U Uᵀ, U being the leading eigenvectors that together have `share` of the trace."""
        return self._act(tensor, lambda blocks: self._project_out(blocks, share))

    def _act(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = self.form.blocks(_double(tensor.detach()))
        result = function(blocks.mT).mT if self.side == "output" else function(blocks)
        return self.form.tensor(result).to(tensor.device, tensor.dtype)

    @abstractmethod
    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        """Act on `[groups, rows, dim]` from the right."""

    @abstractmethod
    def _times(self, blocks: Tensor) -> Tensor:
        """Act on `[groups, rows, dim]` from the right."""

    @abstractmethod
    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        """Act on `[groups, rows, dim]` from the right."""


@dataclass(frozen=True, eq=False)
class Identity(Factor):
    """Nothing is known of this side, or the other side's factor says it all."""

    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        return blocks

    def _times(self, blocks: Tensor) -> Tensor:
        return blocks

    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        return blocks


@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """Whole matrices.

    Attributes:
        matrices: `[groups, dim, dim]`.

    Example:
        >>> a = Dense(Form((1, 2)), "input", torch.diag(torch.tensor([3.0, 1.0]))[None])
        >>> a.solve(torch.tensor([[4.0, 2.0]]), damping=0.5)
        tensor([[1., 1.]])
    """

    matrices: Tensor

    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        m = _double(self.matrices).to(blocks.device)
        mean = m.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        identity = torch.eye(m.shape[-1]).to(m)
        lower, failed = torch.linalg.cholesky_ex(torch.where(mean > 0, m + damping * mean * identity, identity))
        if failed.any():
            raise UnlearnError(f"damping must be > 0 for a covariance that is singular, got {damping}")
        return torch.cholesky_solve(blocks.mT, lower).mT

    def _times(self, blocks: Tensor) -> Tensor:
        return blocks @ _double(self.matrices).to(blocks.device)

    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        values, vectors = torch.linalg.eigh(_double(self.matrices).to(blocks.device))
        values = values.flip(-1).clamp(min=0)
        leading = vectors.flip(-1) * _leading(values, values.sum(-1), share)[:, None]
        return blocks - (blocks @ leading) @ leading.mT


@dataclass(frozen=True, eq=False)
class Diagonal(Factor):
    """Diagonal matrices: how often each token occurs, or the second moments of a vector's gradients.

    Attributes:
        values: `[groups, dim]`.
    """

    values: Tensor

    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        values = _double(self.values).to(blocks.device)
        mean = values.mean(-1, keepdim=True)
        damped = torch.where(mean > 0, values + damping * mean, torch.ones_like(values))
        if (damped == 0).any():
            raise UnlearnError(f"damping must be > 0 for a covariance that is singular, got {damping}")
        return blocks / damped[:, None]

    def _times(self, blocks: Tensor) -> Tensor:
        return blocks * _double(self.values).to(blocks.device)[:, None]

    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        values, order = _double(self.values).to(blocks.device).sort(-1, descending=True)
        leading = torch.zeros_like(values).scatter(-1, order, _leading(values, values.sum(-1), share))
        return blocks * (1 - leading)[:, None]


@dataclass(frozen=True, eq=False)
class Tied(Factor):
    """Both sides of a tensor that is an embedding and a head: the map ΔW → ΔW A + C ΔW, C = diag(counts).

    Attributes:
        matrix: A, `[in, in]`, second moment of the head's inputs.
        counts: `[out]`, how often each row is looked up.
    """

    matrix: Tensor
    counts: Tensor

    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        # Row i is g_i (A_ε + (c_i + ε mean(c)) I)⁻¹: all rows share A's eigenvectors.
        values, vectors = torch.linalg.eigh(_double(self.matrix).to(blocks.device))
        counts = _double(self.counts).to(blocks.device)
        damped = values.clamp(min=0) + damping * values.mean() + (counts + damping * counts.mean())[:, None]
        if not damped.any():
            return blocks
        if (damped <= 0).any():
            raise UnlearnError(f"damping must be > 0 for a covariance that is singular, got {damping}")
        return (blocks @ vectors / damped) @ vectors.T

    def _times(self, blocks: Tensor) -> Tensor:
        counts = _double(self.counts).to(blocks.device)
        return blocks @ _double(self.matrix).to(blocks.device) + counts[:, None] * blocks

    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        # The head's inputs alone: rows are not a subspace that an edit could keep to.
        return Dense(self.form, "input", self.matrix[None])._project_out(blocks, share)


@dataclass(frozen=True, eq=False)
class LowRank(Factor):
    """M ≈ V diag(values) Vᵀ with orthonormal V, by Nyström's method, for a side too wide for a whole matrix.

    The damping uses the exact trace. What lies outside V is treated as zero before damping.

    Attributes:
        vectors: V, `[groups, dim, rank]`.
        values: `[groups, rank]`, descending.
        trace: `[groups]`, of M itself.
    """

    vectors: Tensor
    values: Tensor
    trace: Tensor

    def _solve(self, blocks: Tensor, damping: float) -> Tensor:
        v, values, trace = (_double(t).to(blocks.device) for t in (self.vectors, self.values, self.trace))
        if damping <= 0:
            raise UnlearnError(f"damping must be > 0 for a covariance of low rank, got {damping}")
        delta = torch.where(trace > 0, damping * trace / v.shape[1], torch.ones_like(trace))[:, None, None]
        # Woodbury: (V S Vᵀ + δI)⁻¹ = (I − V S/(S + δ) Vᵀ)/δ
        shrunk = values[:, None] / (values[:, None] + delta)
        return (blocks - (blocks @ v * shrunk) @ v.mT) / delta

    def _times(self, blocks: Tensor) -> Tensor:
        v = _double(self.vectors).to(blocks.device)
        return (blocks @ v * _double(self.values).to(blocks.device)[:, None]) @ v.mT

    def _project_out(self, blocks: Tensor, share: float) -> Tensor:
        values, trace = _double(self.values).to(blocks.device), _double(self.trace).to(blocks.device)
        leading = _double(self.vectors).to(blocks.device) * _leading(values, trace, share)[:, None]
        return blocks - (blocks @ leading) @ leading.mT


def nystrom(form: Form, side: Side, sketch: Tensor, omega: Tensor, trace: Tensor) -> LowRank:
    """Approximate M by its sketch Y = M Ω, as M ≈ Y (ΩᵀY)⁻¹ Yᵀ (Tropp et al., arXiv 1706.05736).

    Args:
        form: of the tensor.
        side: of the tensor that M acts on.
        sketch: Y, `[groups, dim, rank]`.
        omega: Ω, `[dim, rank]`, with orthonormal columns.
        trace: `[groups]`, of M.
    """
    y, omega = _double(sketch), _double(omega).to(_double(sketch).device)
    # A shift, taken off again below, keeps the small matrix positive definite in spite of rounding.
    resolution = torch.finfo(sketch.dtype).eps
    shift = resolution * torch.linalg.matrix_norm(y)[:, None, None] + torch.finfo(y.dtype).tiny
    y = y + shift * omega
    small = omega.T @ y
    values, q = torch.linalg.eigh((small + small.mT) / 2)
    root = (y @ q) / values.clamp(min=shift[..., 0])[:, None].sqrt()
    v, s, _ = torch.linalg.svd(root, full_matrices=False)
    found = (s.square() - shift[..., 0]).clamp(min=0)
    return LowRank(form, side, v.to(sketch), found.to(sketch), trace)


def _leading(values: Tensor, trace: Tensor, share: float) -> Tensor:
    """1 for the fewest of the descending values that have this share of the trace, 0 for the others and for zeros."""
    before = values.cumsum(-1) - values
    return ((before < share * trace[:, None]) & (values > 0)).to(values.dtype)


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()

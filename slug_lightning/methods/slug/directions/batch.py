"""The forget gradient through the second moments of per-batch retain gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


@dataclass(frozen=True)
class BatchCurvature:
    """Spare the retain loss, judged by gradients of its batches: D = B_ε⁻¹ g A_ε⁻¹.

    With G_b the retain gradient of a batch of n_b out of N samples, A = Σ n_b/N G_bᵀ G_b and B = Σ n_b/N G_b G_bᵀ, the
    statistics of Shampoo (arXiv 1802.09568). They are to be had for every tensor, whatever uses it.

    Args:
        damping: ε, relative to the mean eigenvalue; larger than elsewhere, as few batches leave most of A and B empty.
    """

    damping: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"retain:batch_input", "retain:batch_output"})

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return B_ε⁻¹ g A_ε⁻¹ for each tensor."""
        a, b = layer.factors["retain:batch_input"], layer.factors["retain:batch_output"]
        return {name: b[name].solve(a[name].solve(g, self.damping), self.damping) for name, g in forget_gradient.items()}

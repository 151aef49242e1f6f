"""The forget gradient through the inverse K-FAC curvature of the retain loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


@dataclass(frozen=True)
class KFAC:
    """Spare the retain loss: D = B_ε⁻¹ g A_ε⁻¹.

    A and B are the second moments of the layer's inputs and of the retain loss's gradients with respect to its outputs; their
    Kronecker product approximates the Fisher information of the retain loss (K-FAC, arXiv 1503.05671).

    Args:
        damping: ε, relative to the mean eigenvalue.
    """

    damping: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"retain:input_covariance", "retain:output_covariance"})

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return B_ε⁻¹ g A_ε⁻¹ for each tensor."""
        a, b = layer.factors["retain:input_covariance"], layer.factors["retain:output_covariance"]
        return {name: b[name].solve(a[name].solve(g, self.damping), self.damping) for name, g in forget_gradient.items()}

"""The forget gradient through the inverse covariance of the retain set's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


@dataclass(frozen=True)
class Covariance:
    """Spare the layer's outputs on the retain set: D = g A_ε⁻¹.

    A is the second moment of the layer's inputs x on the retain set. Of all edits ΔW with the same first-order effect ⟨ΔW, g⟩,
    D changes the outputs there least, argmin Σ E‖ΔW x‖² with damping: the inverse covariance of ROME and MEMIT
    (arXiv 2202.05262, 2210.07229).

    Args:
        damping: ε, relative to the mean eigenvalue.

    Example:
        >>> Covariance(damping=0.01).needs
        frozenset({'retain:input_covariance'})
    """

    damping: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"retain:input_covariance"})

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return g A_ε⁻¹ for each tensor."""
        a = layer.factors["retain:input_covariance"]
        return {name: a[name].solve(g, self.damping) for name, g in forget_gradient.items()}

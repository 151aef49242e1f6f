"""The part of a weight that answers to the forget set's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.tensors.dtensor import whole


@dataclass(frozen=True)
class Engram:
    """Take away what the weight does on the forget set's inputs: D = −W Σ_f A_ε⁻¹.

    Σ_f and A are the second moments of the layer's inputs on the forget and the retain set (AI Engram, arXiv 2606.14997, which
    divides by that of all data). It uses no gradient, and its sign is meant, so that it is never flipped.

    Args:
        damping: ε, relative to the mean eigenvalue.
    """

    damping: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"forget:input_covariance", "retain:input_covariance"})
    is_fixed: ClassVar[bool] = True

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return −W Σ_f A_ε⁻¹ for each tensor."""
        of_forget, a = layer.factors["forget:input_covariance"], layer.factors["retain:input_covariance"]
        weights = {name: whole(layer.layer.parameters[name]).to(g) for name, g in forget_gradient.items()}
        return {name: -a[name].solve(of_forget[name].times(w), self.damping) for name, w in weights.items()}

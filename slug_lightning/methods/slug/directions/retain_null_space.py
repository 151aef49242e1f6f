"""The forget gradient where the retain set's inputs have little to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


@dataclass(frozen=True)
class RetainNullSpace:
    """Leave the leading inputs of the retain set alone: D = g (I − U Uᵀ).

    U are the leading eigenvectors of A, the second moment of the layer's inputs on the retain set, that together have `share` of
    its trace: the hard version of `Covariance` (gradient projection, arXiv 2103.09762).

    Args:
        share: of the trace, between 0 and 1.
    """

    share: float = 0.95
    needs: ClassVar[frozenset[str]] = frozenset({"retain:input_covariance"})

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return g (I − U Uᵀ) for each tensor."""
        a = layer.factors["retain:input_covariance"]
        return {name: a[name].project_out(g, self.share) for name, g in forget_gradient.items()}

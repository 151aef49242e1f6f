"""The forget gradient itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


class ForgetGradient:
    """The forget gradient itself: steepest in weights (SLUG, arXiv 2407.11867)."""

    needs: frozenset[str] = frozenset()

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gradient as it is."""
        return forget_gradient

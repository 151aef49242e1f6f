"""The seam: what a direction gets and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics


class Direction(Protocol):
    """A rule that turns the forget gradient of one layer into the direction to go.

    It is reversed where it leads downhill on the forget loss; unless it has an attribute `is_fixed = True`, which says that
    its sign is meant, and that it is the same wherever the layer stands.

    Attributes:
        needs: which of `slug_lightning.objective.curvature.NEEDS` are to be collected for each candidate layer, and are then
            in `layer.factors`.

    Example:
        >>> class SignOfGradient:
        ...     needs = frozenset()
        ...     def __call__(self, layer, forget_gradient):
        ...         return {name: g.sign() for name, g in forget_gradient.items()}
    """

    @property
    def needs(self) -> frozenset[str]:
        """What must be collected."""

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the direction by tensor name, of any length; it is followed uphill on the forget loss."""

"""Where to go along one layer, from where it stands; a file each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.objective.curvature import input_covariance

FACTORS = {
    "forget:input_covariance": partial(input_covariance, kind="forget"),
    "retain:input_covariance": partial(input_covariance, kind="retain"),
}
"""What a direction may need to know of a layer."""


class Direction(Protocol):
    """A rule that turns the forget gradient of one layer into the direction to go.

    Attributes:
        needs: names of the `FACTORS` that are to be computed for each candidate layer, and are then in `layer.factors`.

    Example:
        >>> class SignOfGradient:
        ...     needs = frozenset()
        ...     def __call__(self, layer, forget_gradient):
        ...         return {name: g.sign() for name, g in forget_gradient.items()}
    """

    needs: frozenset[str]

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the direction by tensor name, of any length; it is followed uphill on the forget loss."""


class ForgetGradient:
    """The forget gradient itself: steepest in weights (SLUG, arXiv 2407.11867)."""

    needs: frozenset[str] = frozenset()

    def __call__(self, layer: LayerStatistics, forget_gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gradient as it is."""
        return forget_gradient

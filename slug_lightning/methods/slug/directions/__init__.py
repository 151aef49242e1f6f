"""Where to go along one layer, from where it stands; a file each."""

from __future__ import annotations

from slug_lightning.methods.slug.directions.base import Direction
from slug_lightning.methods.slug.directions.batch import BatchCurvature
from slug_lightning.methods.slug.directions.covariance import Covariance
from slug_lightning.methods.slug.directions.engram import Engram
from slug_lightning.methods.slug.directions.gradient import ForgetGradient
from slug_lightning.methods.slug.directions.kfac import KFAC
from slug_lightning.methods.slug.directions.retain_null_space import RetainNullSpace

DIRECTIONS: dict[str, Direction] = {
    "gradient": ForgetGradient(),
    "covariance": Covariance(),
    "kfac": KFAC(),
    "batch": BatchCurvature(),
    "engram": Engram(),
    "retain_null_space": RetainNullSpace(),
}
"""The built-in directions, by the names that options use."""

__all__ = [
    "DIRECTIONS",
    "KFAC",
    "BatchCurvature",
    "Covariance",
    "Direction",
    "Engram",
    "ForgetGradient",
    "RetainNullSpace",
]

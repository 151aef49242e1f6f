"""A trained model forgets what it is asked to, by an edit of one layer, inside its owner's own Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slug_lightning.errors import UnlearnError
    from slug_lightning.modules.base import UnlearnModule
    from slug_lightning.patch import PatchError, UnlearnPatch
    from slug_lightning.report import UnlearnReport
    from slug_lightning.retained import RetainCache

__all__ = ["PatchError", "RetainCache", "UnlearnError", "UnlearnModule", "UnlearnPatch", "UnlearnReport"]

HOMES = {
    "PatchError": "patch",
    "RetainCache": "retained",
    "UnlearnError": "errors",
    "UnlearnModule": "modules.base",
    "UnlearnPatch": "patch",
    "UnlearnReport": "report",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers `--help` without waiting for torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)

"""A trained model forgets what it is asked to, by an edit of one layer, inside its owner's own Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slug_lightning.errors import UnlearnError
    from slug_lightning.modules.base import UnlearnModule
    from slug_lightning.objective.retain_cache import RetainCache
    from slug_lightning.patches.edit import PatchError
    from slug_lightning.patches.patch import UnlearnPatch
    from slug_lightning.reports.single import UnlearnReport

__all__ = ["PatchError", "RetainCache", "UnlearnError", "UnlearnModule", "UnlearnPatch", "UnlearnReport"]

HOMES = {
    "PatchError": "patches.edit",
    "RetainCache": "objective.retain_cache",
    "UnlearnError": "errors",
    "UnlearnModule": "modules.base",
    "UnlearnPatch": "patches.patch",
    "UnlearnReport": "reports.single",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers `--help` without waiting for torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)

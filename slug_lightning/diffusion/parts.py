"""The models in a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn


def parts_of(pipeline: Any) -> nn.ModuleDict:
    """The models of a pipeline, by their names in it."""
    return nn.ModuleDict({name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)})

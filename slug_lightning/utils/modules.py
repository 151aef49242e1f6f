"""Which model the tensor names in patches and plain weights belong to."""

from __future__ import annotations

from torch import nn


class WrapsModel:
    """Mark a module whose `model` gives the names of tensors in patches and plain weights, instead of the module itself."""

    model: nn.Module


def unwrap_model(module: nn.Module) -> nn.Module:
    """Return the model whose tensor names patches and plain weights carry: what an `UnlearnModule` wraps, else the module."""
    return module.model if isinstance(module, WrapsModel) else module


def patch_prefix(module: nn.Module) -> str:
    """Return what a module's tensor names have in front of those that patches and plain weights carry."""
    return "" if unwrap_model(module) is module else "model."

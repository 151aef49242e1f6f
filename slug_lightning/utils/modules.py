"""Which model the tensor names in patches and plain weights belong to; which classes are Lightning's own."""

from __future__ import annotations

from typing import Any

from torch import nn

LIGHTNING = ("lightning.", "pytorch_lightning.")
"""Lightning is installed under two names, whose classes are not each other's."""


class WrapsModel:
    """Mark a module whose `model` gives the names of tensors in patches and plain weights, instead of the module itself."""

    model: nn.Module


def unwrap_model(module: nn.Module) -> nn.Module:
    """Return the model whose tensor names patches and plain weights carry: what an `UnlearnModule` wraps, else the module."""
    return module.model if isinstance(module, WrapsModel) else module


def lightning_base(thing: Any, name: str) -> type | None:
    """Return Lightning's class of this name that an object is an instance of, from whichever of its packages; None without.

    Example:
        >>> import lightning.pytorch as pl
        >>> lightning_base(pl.LightningDataModule(), "LightningDataModule") is pl.LightningDataModule
        True
        >>> lightning_base(5, "LightningDataModule")
    """
    of_name = (kind for kind in type(thing).__mro__ if kind.__name__ == name and kind.__module__.startswith(LIGHTNING))
    return next(of_name, None)


def patch_prefix(module: nn.Module) -> str:
    """Return what a module's tensor names have in front of those that patches and plain weights carry."""
    return "" if unwrap_model(module) is module else "model."

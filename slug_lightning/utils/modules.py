"""Which model the names in patches and plain weights speak of."""

from __future__ import annotations

from torch import nn


class WrapsModel:
    """Mark a module whose `model` gives the names of tensors in patches and plain weights, instead of the module itself."""

    model: nn.Module


def unwrap_model(module: nn.Module) -> nn.Module:
    """The model whose tensor names patches and plain weights carry: what an `UnlearnModule` wraps, else the module.

    Example:
        >>> class Wrapper(nn.Module, WrapsModel):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        >>> net = nn.Linear(2, 1)
        >>> unwrap_model(Wrapper(net)) is net, unwrap_model(net) is net
        (True, True)
    """
    return module.model if isinstance(module, WrapsModel) else module


def patch_prefix(module: nn.Module) -> str:
    """What the names of a module's tensors have in front of those that patches and plain weights carry."""
    return "" if unwrap_model(module) is module else "model."

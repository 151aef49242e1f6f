"""A pipeline of several models as one module, and what of it are adapters. Nothing here needs diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from slug_lightning.errors import UnlearnError


class Pipeline(Protocol):
    """What has models among its components, as a `diffusers.DiffusionPipeline`."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Models, tokenizers, schedulers and whatever else it is made of, by name."""


def parts_of(pipeline: Pipeline) -> nn.ModuleDict:
    """The models of a pipeline, themselves and no copies, by their names there: so tensors are called `unet.conv_in.weight`.

    Args:
        pipeline: that of diffusers, or anything else with a dict `components`.

    Raises:
        UnlearnError: if it is none, or holds no model.

    Example:
        >>> from types import SimpleNamespace
        >>> parts = parts_of(SimpleNamespace(components={"unet": nn.Linear(1, 1), "scheduler": None}))
        >>> [name for name, _ in parts.named_parameters()]
        ['unet.weight', 'unet.bias']
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise UnlearnError(f"model: {type(pipeline).__name__} is no module, no state dict, and no pipeline with components")
    parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    if not parts:
        raise UnlearnError(f"model: {type(pipeline).__name__} has no module among its components: {', '.join(components)}")
    return nn.ModuleDict(parts)


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The modules that PEFT has wrapped with adapters: what holds each, under which name, and itself.

    Its `base_layer` is the one that was there before.
    """
    for holder in model.modules():
        for name, module in holder.named_children():
            # By what they have: whoever has loaded no adapters need not have PEFT.
            if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
                yield holder, name, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters without those of adapters, by name: what an edit of the base may touch.

    Example:
        >>> list(base_parameters(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    adapters = {
        id(p) for _, _, module in adapted(model) for name, p in module.named_parameters() if not name.startswith("base_layer.")
    }
    return {name: p for name, p in model.named_parameters() if id(p) not in adapters}

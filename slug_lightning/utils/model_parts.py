"""Pipelines of several models, and adapters. Needs neither diffusers nor PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from slug_lightning.errors import UnlearnError


class Pipeline(Protocol):
    """Whatever has models among its components, as a `diffusers.DiffusionPipeline`."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Models, tokenizers, schedulers and others, by name."""


def parts_of(pipeline: Pipeline) -> nn.ModuleDict:
    """Return the models of a pipeline, not copied, by their names there: so tensors are called `unet.conv_in.weight`."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise UnlearnError(f"model: must be a module, a state dict or a pipeline with components, got {type(pipeline).__name__}")
    parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    if not parts:
        raise UnlearnError(f"model: {type(pipeline).__name__} has no module among its components: {', '.join(components)}")
    return nn.ModuleDict(parts)


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Find the modules that PEFT has wrapped with adapters: the parent, the name there, and the wrapper.

    The wrapper's `base_layer` is the module that was there before.
    """
    for holder in model.modules():
        for name, module in holder.named_children():
            # By their attributes, as PEFT need not be installed.
            if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
                yield holder, name, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name without those of adapters: what an edit of the base may touch."""
    adapters = {
        id(p) for _, _, module in adapted(model) for name, p in module.named_parameters() if not name.startswith("base_layer.")
    }
    return {name: p for name, p in model.named_parameters() if id(p) not in adapters}

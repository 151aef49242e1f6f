"""The cache of keys and values by whichever name transformers has for it: `past_key_values`, and from 5.24 on `cache`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside what PEFT or `torch.compile` has wrapped around it: wrappers do not name their arguments."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def cache_argument(model: nn.Module) -> str:
    """Name of the argument by which the model's forward takes the cache."""
    return "cache" if "cache" in inspect.signature(unwrapped(model).forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None if it holds no keys, as that of a state-space model."""
    # The old name of a new output warns.
    cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
    # Caches of hybrid models keep a list of keys instead of layers in some releases.
    holds_keys = hasattr(cache, "key_cache") or any(hasattr(layer, "keys") for layer in getattr(cache, "layers", ()))
    return cache if holds_keys else None

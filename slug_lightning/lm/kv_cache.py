"""The cache of keys and values by whichever name transformers has for it: `past_key_values`, and from 5.24 on `cache`."""

from __future__ import annotations

import inspect
from typing import Any

NAMES = ("cache", "past_key_values")
"""The new spelling first: where it exists, the old one warns."""


def cache_argument(model: Any) -> str:
    """Name of the argument by which the model's forward takes the cache.

    Args:
        model: of transformers, itself and not what is wrapped around it, as wrappers do not name their arguments.

    Example:
        >>> class Net:
        ...     def forward(self, input_ids, past_key_values=None): ...
        >>> cache_argument(Net())
        'past_key_values'
    """
    takes = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in takes), NAMES[-1])


def cache_of(output: Any) -> Any:
    """Cache in a model's output, or None if it holds no keys, as that of a state-space model.

    Example:
        >>> from types import SimpleNamespace
        >>> cache_of(SimpleNamespace(past_key_values="keys and values"))
        'keys and values'
    """
    # What stands behind a missing "cache" is asked for only then: the old name of a new output warns.
    cache = next((found for name in NAMES if (found := getattr(output, name, None)) is not None), None)
    layers = getattr(cache, "layers", None)
    return None if layers and not any(hasattr(layer, "keys") for layer in layers) else cache

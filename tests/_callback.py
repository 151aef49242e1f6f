"""Callbacks with the options of method and runtime given flat, as most tests are about one option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.methods import SLUG, Runtime

RULES = {"direction": "gradient", "curve": "line", "score": "pareto", "choice": "least_usage"}
"""Those of the published procedure, which are the simplest; margin and near data then go by the direction."""


def unlearn_callback(*data: Any, **options: Any) -> UnlearnCallback:
    """An UnlearnCallback of these rules, unless `method` is given; what SLUG or Runtime takes goes there."""
    for name, kind, rules in (("method", SLUG, RULES), ("runtime", Runtime, {})):
        if name not in options:
            own = {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}
            options[name] = kind(**{**rules, **own})
    return UnlearnCallback(*data, **options)

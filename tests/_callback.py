"""Callbacks with the options of method and runtime given flat, as most tests are about one option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.methods import SLUG, Runtime


def unlearn_callback(*data: Any, **options: Any) -> UnlearnCallback:
    """An UnlearnCallback; what SLUG or Runtime takes goes there."""
    parts = {
        name: kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
        for name, kind in (("method", SLUG), ("runtime", Runtime))
        if any(f.name in options for f in fields(kind))
    }
    return UnlearnCallback(*data, **parts, **options)

"""Callbacks with the options of method and runtime given flat, as most tests are about one option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.methods import SLUG, Runtime


def unlearn_callback(*data: Any, **options: Any) -> UnlearnCallback:
    """An UnlearnCallback of the published procedure, unless `method` is given; what SLUG or Runtime takes goes there."""
    parts = {
        name: made(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
        for name, kind, made in (("method", SLUG, SLUG.paper), ("runtime", Runtime, Runtime))
        if name not in options
    }
    return UnlearnCallback(*data, **parts, **options)

"""Import what the package's extras install."""

from __future__ import annotations

import importlib
from typing import Any

from slug_lightning.errors import UnlearnError


def import_optional(name: str, extra: str) -> Any:
    """Import a module that one of the package's extras installs; the UnlearnError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnlearnError(f'{name} cannot be imported ({error}); pip install "slug-lightning[{extra}]"') from error

"""The one exception for what a user can mend, and the import of what they may have to install."""

import importlib
from typing import Any


class UnlearnError(ValueError):
    """Input that cannot lead to a result; the message names the argument and the remedy. The model is as it was.

    Example:
        >>> raise UnlearnError("forget: the set is empty; give at least three samples")
        Traceback (most recent call last):
        ...
        slug_lightning.errors.UnlearnError: forget: the set is empty; give at least three samples
    """


def needed(name: str, extra: str) -> Any:
    """Import a module of one of the package's extras, or say how to install it.

    Raises:
        UnlearnError: if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnlearnError(f'{name} cannot be imported ({error}); pip install "slug-lightning[{extra}]"') from error

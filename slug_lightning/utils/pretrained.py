"""Load what `save_pretrained` wrote, by folder or name, with errors that say what to do."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

from packaging.version import Version

from slug_lightning.errors import UnlearnError

WITH_ADAPTERS = "_hf_peft_config_loaded"
"""Set by transformers and diffusers on a model with adapters; transformers then saves only these."""


def load_pretrained(argument: str, kind: Any, name: Union[str, Path], **options: Any) -> Any:
    """Call `kind.from_pretrained(name, **options)`, with errors that name `argument`."""
    try:
        loaded = kind.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        raise UnlearnError(
            f"{argument}: {str(name)!r} cannot be loaded ({error}); give its folder, or its name on the hub"
        ) from error
    refuse_adapters(argument, loaded)
    return loaded


def refuse_adapters(argument: str, model: Any) -> None:
    """Refuse a model with adapters if transformers refuses the installed PEFT: it could be edited, but not saved."""
    if getattr(model, WITH_ADAPTERS, False) and (refusal := peft_refusal()):
        raise UnlearnError(f"{argument}: {type(model).__name__} has adapters, but {refusal}")


def peft_refusal() -> str:
    """Say why the installed transformers refuses the installed PEFT, and what to install; "" if it does not, or without PEFT.

    Each release of transformers names the lowest PEFT that it works with; 5.24 named one that was not out yet.
    """
    try:
        installed = version("peft")
    except PackageNotFoundError:
        return ""
    from transformers.integrations import peft as integration

    lowest = getattr(integration, "MIN_PEFT_VERSION", "0")
    if Version(installed) >= Version(lowest):
        return ""
    transformers = Version(version("transformers"))
    older = f"transformers<{transformers.major}.{transformers.minor}"
    return (
        f"transformers {transformers} refuses the installed PEFT {installed} (it needs {lowest} or later); "
        f'pip install "peft>={lowest}", or where there is none yet, pip install --upgrade peft "{older}"'
    )

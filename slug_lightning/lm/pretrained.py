"""Models and tokenizers of transformers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

from torch import nn

from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained


def load_causal_lm(name: Union[str, Path]) -> nn.Module:
    """Load a causal language model in fp32, so that small steps of the optimizer are not rounded away.

    Args:
        name: its folder, or its name on the hub.

    Raises:
        UnlearnError: if transformers is missing, or has nothing of that name.
    """
    return _load("model", "AutoModelForCausalLM", name).float()


def load_tokenizer(name: Union[str, Path]) -> Any:
    """Load a tokenizer.

    Args:
        name: its folder, or its name on the hub.

    Raises:
        UnlearnError: if transformers is missing, or has nothing of that name.
    """
    return _load("tokenizer", "AutoTokenizer", name)


def _load(argument: str, kind: str, name: Union[str, Path]) -> Any:
    return load_pretrained(argument, getattr(import_optional("transformers", "lm"), kind), name)

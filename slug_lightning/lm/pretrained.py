"""Models and tokenizers of transformers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

from torch import nn

from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained


def load_causal_lm(name: Union[str, Path]) -> nn.Module:
    """Load a causal language model, by folder or hub name, in fp32, so that small optimizer steps are not rounded away."""
    return load_pretrained("model", import_optional("transformers", "lm").AutoModelForCausalLM, name).float()


def load_tokenizer(name: Union[str, Path]) -> Any:
    """Load a tokenizer, by folder or hub name."""
    return load_pretrained("tokenizer", import_optional("transformers", "lm").AutoTokenizer, name)

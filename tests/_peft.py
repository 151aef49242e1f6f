"""Adapters on models of transformers and diffusers, where these take the installed PEFT."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from slug_lightning.utils.pretrained import peft_refusal


def add_adapter(model: Any, config: Any, name: str) -> None:
    """Add an adapter by the model's own method, as `load_lora_weights` does; skip the test where transformers refuses PEFT."""
    if isinstance(model, PreTrainedModel) and (reason := peft_refusal()):
        pytest.skip(reason)
    model.add_adapter(config, name)

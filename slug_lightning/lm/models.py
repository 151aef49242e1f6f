"""Load causal language models of transformers, run them, and identify them by their weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Sequences
from slug_lightning.tensors.bits import digest_of
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained


def load_causal_lm(name: Union[str, Path]) -> nn.Module:
    """Load a causal language model, by folder or hub name, in fp32, so that small optimizer steps are not rounded away."""
    return load_pretrained("model", import_optional("transformers", "lm").AutoModelForCausalLM, name).float()


def load_tokenizer(name: Union[str, Path]) -> Any:
    """Load a tokenizer, by folder or hub name."""
    return load_pretrained("tokenizer", import_optional("transformers", "lm").AutoTokenizer, name)


def logits_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """Compute a transformers causal language model's logits, `[B, T, V]`, without a cache.

    Sequences longer than the model's context are refused: models with learned positions fail there with an index error, those
    with rotary positions go on silently.
    """
    length = sequences["input_ids"].shape[1]
    config: Any = getattr(model, "config", None)
    # Of a multimodal model, the text part of its config; without a limit there is no such entry.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise UnlearnError(
            f"sequences: {length} tokens exceed the model's context of {most} (max_position_embeddings of its config); "
            "give shorter texts, or for passages a shorter prefix or suffix"
        )
    return model(input_ids=sequences["input_ids"], attention_mask=sequences["attention_mask"], use_cache=False).logits


# ---- the cache of keys and values, which transformers calls `past_key_values`, and from 5.24 on `cache`


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside what PEFT or `torch.compile` has wrapped around it: wrappers do not name their arguments."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def cache_argument(model: nn.Module) -> str:
    """Name of the argument by which the model's forward takes the cache."""
    return "cache" if "cache" in inspect.signature(unwrapped(model).forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None if it holds no keys, as that of a state-space model."""
    # The old name of a new output warns.
    cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
    # Caches of hybrid models keep a list of keys instead of layers in some releases.
    holds_keys = hasattr(cache, "key_cache") or any(hasattr(layer, "keys") for layer in getattr(cache, "layers", ()))
    return cache if holds_keys else None


# ---- the model while it is the original


def weights_digest(model: nn.Module, leave_out: Iterable[str] = ()) -> str:
    """SHA-256 of all parameters and buffers but some; with PEFT adapters, by the names that they had without.

    The dtype matters, the device does not.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = {name: tensor.detach() for name, tensor in tensors.items() if name not in set(leave_out)}
    return digest_of({name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in kept.items()}, "")


def refuse_absent(model: nn.Module) -> None:
    """Refuse weights that this process does not hold: on the meta device, or sharded."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnlearnError(f"reference: {name} is on the meta device and has no values yet; load the weights first")
        if isinstance(tensor, DTensor):
            raise UnlearnError(
                f"reference: {name} is sharded; make the reference in setup(), before the strategy shards the model"
            )

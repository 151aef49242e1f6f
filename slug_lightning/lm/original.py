"""What the references do with the model while it is the original: run it, and identify it by its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Sequences
from slug_lightning.tensors.bits import digest_of


def logits_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """Compute a transformers causal language model's logits, `[B, T, V]`, without a cache.

    Raises:
        UnlearnError: if the sequences are longer than the model's context. Models with learned positions fail there with an
            index error; those with rotary positions go on silently.
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

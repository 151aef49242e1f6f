"""What the references do with the model while it is the original: ask it, tell it from others, leave it as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Sequences
from slug_lightning.tensors.bits import digest_of


def logits_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """What a transformers causal language model predicts at each position, `[B, T, V]`, without a cache.

    Raises:
        UnlearnError: if the sequences are longer than the model's context. Models of learned positions have none there, and
            fail with an index; those of rotary positions go on silently.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.zeros(1, 8, dtype=torch.long)
        >>> logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape
        torch.Size([1, 8, 9])
    """
    _refuse_longer(model, sequences["input_ids"].shape[1])
    return model(input_ids=sequences["input_ids"], attention_mask=sequences["attention_mask"], use_cache=False).logits


def _refuse_longer(model: nn.Module, length: int) -> None:
    config: Any = getattr(model, "config", None)
    # Of a model that also sees, the part of its config that is on text; without a limit there is no such entry.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise UnlearnError(
            f"sequences: {length} tokens are more than the model's context holds, {most} (max_position_embeddings of its "
            "config); give shorter texts, or of passages a shorter prefix or suffix"
        )


def weights_digest(model: nn.Module, leave_out: Iterable[str] = ()) -> str:
    """SHA-256 of all parameters and buffers; of a model with adapters, by the names that they had without.

    Args:
        model: any; its dtype matters, its device does not.
        leave_out: names that do not count.

    Example:
        >>> net, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = other.load_state_dict(net.state_dict())
        >>> weights_digest(net) == weights_digest(other) != weights_digest(net, ["bias"])
        True
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = {name: tensor.detach() for name, tensor in tensors.items() if name not in set(leave_out)}
    return digest_of({name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in kept.items()}, "")


def refuse_absent(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnlearnError(f"reference: {name} is on the meta device and has no values yet; load the weights first")
        if isinstance(tensor, DTensor):
            raise UnlearnError(
                f"reference: {name} is parted among processes; make the reference in setup(), before the strategy shards it"
            )

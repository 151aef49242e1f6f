"""What the references do with the model while it is the original: ask it, tell it from others, leave it as it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Sequences
from slug_lightning.patch import digest_of


def logits_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """What a transformers causal language model predicts at each position, `[B, T, V]`, without a cache."""
    return model(input_ids=sequences["input_ids"], attention_mask=sequences["attention_mask"], use_cache=False).logits


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

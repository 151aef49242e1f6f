"""Vision-language models as transformers loads them: which of them can forget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError

FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PACKED = {torch.uint8, torch.int8, torch.int32}
"""What quantised weights are kept in where they are buffers; counters and positions are 64 bits wide."""


def refuse_unfit(model: nn.Module, tower: nn.Module, differentiates: bool = True) -> None:
    """Refuse a model that was loaded in a way in which its vision tower cannot be edited, with the reason.

    A quantised language model before a tower that is not (bitsandbytes in 8 or 4 bits, for example) is fine, and so is a
    `device_map` that puts everything on one device.

    Args:
        model: the whole model.
        tower: its vision tower, a part of it.
        differentiates: whether the loss is the model's own, so that gradients must pass through its language model.

    Raises:
        UnlearnError: if the weights are spread over devices, offloaded or not loaded, the tower is quantised, or gradients do
            not pass through the quantised rest.

    Example:
        >>> model = nn.ModuleDict({"tower": nn.Linear(2, 2), "language_model": nn.Linear(2, 2)})
        >>> refuse_unfit(model, model["tower"])
        >>> refuse_unfit(model, model["tower"].to(torch.float8_e4m3fn))
        Traceback (most recent call last):
        ...
        slug_lightning.errors.UnlearnError: model: its vision tower is quantised (weight is a Parameter of torch.float8_e4m3fn)...
    """
    _refuse_scattered(model)
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        if _is_quantised(tensor):
            place = next(name for name, module in model.named_modules() if module is tower)
            raise UnlearnError(
                f"model: its vision tower is quantised ({name} is a {type(tensor).__name__} of {tensor.dtype}), and has no "
                "weights to which a step could be added; leave it out: modules_to_not_convert=…, or for bitsandbytes "
                f"llm_int8_skip_modules=[{place!r}, 'lm_head']"
            )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if differentiates and quantizer is not None and not quantizer.is_trainable:
        raise UnlearnError(
            f"model: no gradient passes through weights that {type(quantizer).__name__} quantised; load them in 16 bits or by "
            "bitsandbytes, or take the gradient of the matching CLIP"
        )


def _refuse_scattered(model: nn.Module) -> None:
    """Refuse weights that are not all on one device."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise UnlearnError(
            f"model: its device_map spreads it over {', '.join(sorted(places))}, and the Trainer would put all of it on its own "
            "device, where accelerate's hooks still move tensors away; leave device_map out, or name one device, and quantise "
            "the language model if it is too large"
        )
    # Offloaded by other means, or a skeleton.
    absent = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if absent is not None:
        raise UnlearnError(f"model: {absent} has no values (it is on the meta device); load the weights, and do not offload them")


def _is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is no plain one of floating-point numbers; packed ones may say that they are."""
    if isinstance(tensor, nn.Parameter):
        return type(tensor) not in (nn.Parameter, DTensor) or tensor.dtype not in FLOATING
    return tensor.dtype in PACKED

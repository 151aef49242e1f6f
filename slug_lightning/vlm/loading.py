"""Load vision-language models, and refuse those that cannot be edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained, refuse_adapters

PACKED = {torch.uint8, torch.int8, torch.int32}
"""Types of quantised weights that are stored as buffers; counters and positions are 64 bits wide."""


def load_vlm(model: Union[str, Path, nn.Module], processor: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor by name or folder; objects are used as they are.

    Without a processor, the one stored with the model is loaded.
    """
    transformers = import_optional("transformers", "hf")
    if processor is None:
        if isinstance(model, nn.Module):
            raise UnlearnError("processor: a model object needs its processor; give its name, or the object")
        processor = load_pretrained("model", transformers.AutoProcessor, model)
    elif isinstance(processor, (str, Path)):
        processor = load_pretrained("processor", transformers.AutoProcessor, processor)
    if isinstance(model, nn.Module):
        refuse_adapters("model", model)
    else:
        # In training mode, as Lightning expects; we set evaluation mode ourselves.
        model = load_pretrained("model", transformers.AutoModelForImageTextToText, model, dtype=dtype).train()
    if getattr(processor, "image_processor", None) is None:
        raise UnlearnError(f"processor: {type(processor).__name__} reads no pictures; give the model's own AutoProcessor")
    return model, processor


def refuse_unfit(model: nn.Module, tower: nn.Module, differentiates: bool = True) -> None:
    """Refuse a model whose vision tower cannot be edited because of how the model was loaded.

    A quantised language model behind a tower that is not (bitsandbytes in 8 or 4 bits, for example) is fine, and so is a
    `device_map` that puts everything on one device. `differentiates` says whether the loss is the model's own, so that
    gradients must pass through its language model.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise UnlearnError(
            f"model: its device_map spreads it over {', '.join(sorted(places))}; the Trainer would move all of it to one device, "
            "against accelerate's hooks. Leave device_map out, or name one device, and quantise the language model if it is "
            "too large"
        )
    # Offloaded in another way, or not yet materialised.
    if absent := [name for name, p in model.named_parameters() if p.is_meta]:
        raise UnlearnError(f"model: {absent[0]} has no values (it is on the meta device); load the weights without offloading")
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        if _is_quantised(tensor):
            place = next(name for name, module in model.named_modules() if module is tower)
            raise UnlearnError(
                f"model: its vision tower is quantised ({name} is a {type(tensor).__name__} of {tensor.dtype}) and cannot be "
                "edited; exclude it by modules_to_not_convert=…, or for bitsandbytes by "
                f"llm_int8_skip_modules=[{place!r}, 'lm_head']"
            )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if differentiates and quantizer is not None and not quantizer.is_trainable:
        raise UnlearnError(
            f"model: no gradient passes through weights that {type(quantizer).__name__} quantised; load them in 16 bits or by "
            'bitsandbytes, or use objective="clip"'
        )


def _is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is not a plain one of floating-point numbers; a packed one may report a floating dtype."""
    if isinstance(tensor, nn.Parameter):
        return type(tensor) not in (nn.Parameter, DTensor) or not tensor.is_floating_point() or tensor.itemsize < 2
    return tensor.dtype in PACKED

"""Vision-language models and their processors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from slug_lightning.errors import UnlearnError, needed


def load_vlm(model: Union[str, Path, nn.Module], processor: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor, or take what is given.

    Args:
        model: name or folder, or the model, which is used as it is.
        processor: name, folder or object; None for the one that belongs to `model` by its name.
        dtype: of the weights of a model that is loaded.

    Raises:
        UnlearnError: if transformers is missing or has nothing of that name, or if a model comes without a processor.
    """
    transformers = needed("transformers", "hf")
    if processor is None:
        if isinstance(model, nn.Module):
            raise UnlearnError(
                "processor: the model is given as an object, which brings no processor; give its name or the object"
            )
        processor = model
    try:
        if isinstance(processor, (str, Path)):
            processor = transformers.AutoProcessor.from_pretrained(str(processor))
        if not isinstance(model, nn.Module):
            kept = {"dtype" if _knows_dtype(transformers) else "torch_dtype": dtype}
            # In training mode, as Lightning expects; we set evaluation mode ourselves.
            model = transformers.AutoModelForImageTextToText.from_pretrained(str(model), **kept).train()
    except (OSError, ValueError) as error:
        raise UnlearnError(
            f"model: nothing is found as {str(model)!r} ({error}); give its folder, or its name on the hub"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise UnlearnError(f"processor: {type(processor).__name__} reads no pictures; give the model's own AutoProcessor")
    return model, processor


def _knows_dtype(transformers: Any) -> bool:
    """Whether `torch_dtype` is called `dtype` already."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 56)

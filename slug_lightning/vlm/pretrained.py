"""Vision-language models and their processors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained, refuse_adapters


def load_vlm(model: Union[str, Path, nn.Module], processor: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor, or take what is given.

    Args:
        model: name or folder, or the model, which is used as it is.
        processor: name, folder or object; None for the one that belongs to `model` by its name.
        dtype: of the weights of a model that is loaded.

    Raises:
        UnlearnError: if transformers is missing or has nothing of that name, or if a model comes without a processor.
    """
    transformers = import_optional("transformers", "hf")
    whose = "model" if processor is None else "processor"
    if int(transformers.__version__.split(".")[0]) < 5:
        # PaliGemma of version 4 reads an answer's later tokens before the earlier ones, and LLaVA-NeXT's pictures are uneven.
        raise UnlearnError(
            f"transformers: {transformers.__version__} is too old for vision-language models; install 5.0 or later"
        )
    if processor is None:
        if isinstance(model, nn.Module):
            raise UnlearnError(
                "processor: the model is given as an object, which brings no processor; give its name or the object"
            )
        processor = model
    if isinstance(processor, (str, Path)):
        processor = load_pretrained(whose, transformers.AutoProcessor, processor)
    if not isinstance(model, nn.Module):
        # In training mode, as Lightning expects; we set evaluation mode ourselves.
        model = load_pretrained("model", transformers.AutoModelForImageTextToText, model, dtype=dtype).train()
    refuse_adapters("model", model)
    if getattr(processor, "image_processor", None) is None:
        raise UnlearnError(f"processor: {type(processor).__name__} reads no pictures; give the model's own AutoProcessor")
    return model, processor

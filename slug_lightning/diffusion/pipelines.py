"""Stable Diffusion pipelines of diffusers: which ones can forget, how they read a prompt, and how they draw it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def load_pipeline(pipeline: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Take a pipeline, or load it by name.

    Args:
        pipeline: name or folder of a Stable Diffusion pipeline (1.x, 2.x or XL), or the pipeline itself, which is used as it is.
        dtype: of the weights of one that is loaded.

    Raises:
        UnlearnError: if diffusers is missing, or the pipeline cannot be loaded or has no UNet that reads CLIP text encoders.
    """
    if isinstance(pipeline, (str, Path)):
        diffusers = import_optional("diffusers", "diffusion")
        with warnings.catch_warnings():
            # It is to be called dtype; versions that do not know that name yet would ignore it.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = load_pretrained("pipeline", diffusers.DiffusionPipeline, pipeline, torch_dtype=dtype)
    refuse_other_pipelines(pipeline)
    return pipeline


def refuse_other_pipelines(pipeline: Any) -> None:
    """Refuse what is no Stable Diffusion pipeline, with the reason.

    Raises:
        UnlearnError: as `load_pipeline`.
    """
    kind = type(pipeline).__name__
    needed_parts = ("text_encoder", "tokenizer", "vae", "unet", "scheduler")
    missing = [name for name in needed_parts if getattr(pipeline, name, None) is None]
    if missing:
        raise UnlearnError(
            f"pipeline: {kind} has no {', '.join(missing)}; supported are Stable Diffusion 1.x, 2.x and XL, whose UNet reads "
            "CLIP text encoders (SD 3 and FLUX have a transformer instead)"
        )
    for name in TEXT_ENCODERS:
        encoder: Any = getattr(pipeline, name, None)
        if hasattr(encoder, "get_base_model"):  # of PEFT
            encoder = encoder.get_base_model()
        if encoder is not None and not type(encoder).__name__.startswith("CLIPText"):
            raise UnlearnError(
                f"pipeline: its {name} is a {type(encoder).__name__}, not a CLIP text encoder; how {kind} reads it is not known "
                "here. For such a model write forget_step and retain_step, with its own denoising loss, in a LightningModule"
            )


def text_encoders(pipeline: Any) -> dict[str, tuple[nn.Module, Any]]:
    """The text encoders of a pipeline by their names in it, each with its tokenizer."""
    return {
        name: (encoder, getattr(pipeline, name.replace("text_encoder", "tokenizer")))
        for name in TEXT_ENCODERS
        if (encoder := getattr(pipeline, name, None)) is not None
    }


def native_size(pipeline: Any) -> int:
    """Height and width, in pixels, that the pipeline draws by default."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures `[B, 3, H, W]` at `[B, 3, size, size]`: pixels averaged where they become fewer, interpolated where more.

    Example:
        >>> resized(torch.arange(4.0).view(1, 1, 2, 2), 1)
        tensor([[[[1.5000]]]])
    """
    if pictures.shape[-2:] == (size, size):
        return pictures
    if min(pictures.shape[-2:]) >= size:
        return interpolate(pictures, size=(size, size), mode="area")
    return interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)


def read_prompts(pipeline: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the text encoders make of prompts, with its graph, by the pipeline's own `encode_prompt`.

    Returns:
        `encoder_hidden_states`, `[B, T, D]`, and of SDXL `text_embeds`, `[B, P]`.
    """
    found = pipeline.encode_prompt(
        list(texts), device=pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    read = {"encoder_hidden_states": found[0]}
    return read | {"text_embeds": found[2]} if len(found) == 4 else read


@contextmanager
def _drawing(pipeline: Any) -> Iterator[None]:
    """Without the safety checker, which would show black pictures to the judges, and without a bar of its own."""
    checker, bar = getattr(pipeline, "safety_checker", None), getattr(pipeline, "_progress_bar_config", {})
    try:
        if checker is not None:  # past the pipeline's own setter, which would note that it has none, and never save it again
            vars(pipeline)["safety_checker"] = None
        pipeline.set_progress_bar_config(disable=True)
        yield
    finally:
        if checker is not None:
            vars(pipeline)["safety_checker"] = checker
        pipeline._progress_bar_config = bar


def draw(pipeline: Any, texts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, size: int) -> Tensor:
    """Draw prompts, each from the noise of its own seed, whatever stands beside it in a batch and wherever it is computed.

    Args:
        pipeline: as `load_pipeline` gives.
        texts: prompts.
        seeds: one for each.
        steps: of the pipeline's own scheduler.
        guidance: scale of classifier-free guidance; 1 is without.
        size: height and width in pixels.

    Returns:
        Pictures, float32, `[B, 3, size, size]`, in [-1, 1].
    """
    noises = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    with _drawing(pipeline):
        drawn = pipeline(
            list(texts),
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noises,
            output_type="pt",
        ).images
    return drawn.float() * 2 - 1

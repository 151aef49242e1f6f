"""Stable Diffusion pipelines of diffusers: load one, encode its prompts, draw, and save it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.model_parts import adapted, parts_of
from slug_lightning.utils.names import file_name
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import WITH_ADAPTERS, load_pretrained

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ADAPTERS = "adapters"


def load_pipeline(pipeline: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Load a Stable Diffusion pipeline (1.x, 2.x or XL) by name or folder, or check one that is given; refuse all others."""
    if isinstance(pipeline, (str, Path)):
        diffusers = import_optional("diffusers", "diffusion")
        with warnings.catch_warnings():
            # Its new name is dtype, which versions before would ignore.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = load_pretrained("pipeline", diffusers.DiffusionPipeline, pipeline, torch_dtype=dtype)
    kind = type(pipeline).__name__
    needed_parts = ("text_encoder", "tokenizer", "vae", "unet", "scheduler")
    if missing := [name for name in needed_parts if getattr(pipeline, name, None) is None]:
        raise UnlearnError(
            f"pipeline: {kind} has no {', '.join(missing)}; supported are Stable Diffusion 1.x, 2.x and XL, whose UNet reads "
            "CLIP text encoders (SD 3 and FLUX have a transformer instead)"
        )
    for name in TEXT_ENCODERS:
        encoder: Any = getattr(pipeline, name, None)
        if hasattr(encoder, "get_base_model"):  # a PeftModel
            encoder = encoder.get_base_model()
        if encoder is not None and not type(encoder).__name__.startswith("CLIPText"):
            raise UnlearnError(
                f"pipeline: its {name} is a {type(encoder).__name__}, not a CLIP text encoder, and {kind} is not supported. "
                "For such a model write forget_step and retain_step, with its own denoising loss, in a LightningModule"
            )
    return pipeline


def text_encoders(pipeline: Any) -> dict[str, tuple[nn.Module, Any]]:
    """List the text encoders of a pipeline by name, each with its tokenizer."""
    return {
        name: (encoder, getattr(pipeline, name.replace("text_encoder", "tokenizer")))
        for name in TEXT_ENCODERS
        if (encoder := getattr(pipeline, name, None)) is not None
    }


def resized(pictures: Tensor, size: int) -> Tensor:
    """Resize pictures `[B, 3, H, W]` to `[B, 3, size, size]`: averaged to fewer pixels, interpolated to more."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    if min(pictures.shape[-2:]) >= size:
        return interpolate(pictures, size=(size, size), mode="area")
    return interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)


def read_prompts(pipeline: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Encode prompts, with their graph: `encoder_hidden_states`, `[B, T, D]`, and for SDXL `text_embeds`, `[B, P]`."""
    found = pipeline.encode_prompt(
        list(texts), device=pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    read = {"encoder_hidden_states": found[0]}
    return read | {"text_embeds": found[2]} if len(found) == 4 else read


def pooled_text(pipeline: Any, texts: Sequence[str]) -> Tensor:
    """Encode whole texts: the pooled output of each text encoder, at unit length and one behind the other, `[B, D]`."""
    found = []
    encoder: Any
    for encoder, tokenizer in text_encoders(pipeline).values():
        read = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt", verbose=False)
        out = encoder(read.input_ids.to(encoder.device))
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output  # of SDXL's second encoder
        found.append(normalize(pooled.float(), dim=-1))
    return torch.cat(found, dim=-1)


def draw(pipeline: Any, texts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, size: int) -> Tensor:
    """Draw prompts, each from the noise of its own seed, so that neither batch nor device changes it.

    A guidance of 1 disables classifier-free guidance. The safety checker, which would show black pictures to the judges, and
    the pipeline's progress bar are switched off. Returns pictures in [-1, 1], float32, `[B, 3, size, size]`.
    """
    noises = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    checker, bar = getattr(pipeline, "safety_checker", None), getattr(pipeline, "_progress_bar_config", {})
    try:
        if checker is not None:  # not by the pipeline's setter, which would note its absence and never save it again
            vars(pipeline)["safety_checker"] = None
        pipeline.set_progress_bar_config(disable=True)
        given = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance}
        drawn = pipeline(list(texts), **given, generator=noises, output_type="pt").images
    finally:
        if checker is not None:
            vars(pipeline)["safety_checker"] = checker
        pipeline._progress_bar_config = bar
    return drawn.float() * 2 - 1


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Save a pipeline as plain diffusers loads it, with its weights below any adapters; the pipeline stays as it is.

    diffusers would save only the adapters of a text encoder with LoRA, and the UNet under names that no plain one has: both
    would load without the edit. Here each adapter that is not fused goes to `adapters/<adapter>/<component>/`, as
    `peft.PeftModel.from_pretrained` reads it.
    """
    written = _save_adapters(pipeline, Path(folder) / ADAPTERS)
    with _without_adapters(pipeline):
        pipeline.save_pretrained(folder)
    if written:
        rank_zero_info(
            f"The adapters {', '.join(written)} are not part of the saved weights; they are in {Path(folder) / ADAPTERS}. Load "
            "the pipeline, then the adapters"
        )


def _save_adapters(pipeline: Any, folder: Path) -> list[str]:
    """Save the adapters in PEFT's own layout, which keeps all of their settings, and return their names."""
    written: dict[str, None] = {}
    part: Any
    for component, part in parts_of(pipeline).items():
        wrapped = [module for _, _, module in adapted(part)]
        fused = {name for module in wrapped for name in getattr(module, "merged_adapters", [])}
        for name in [name for name in part.peft_config if name not in fused] if wrapped else []:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
            there = folder / file_name(name) / component
            part.peft_config[name].save_pretrained(there)
            prefix = "base_model.model."  # a PeftModel's keys have it already
            tensors = {prefix + key.removeprefix(prefix): tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            save_file(tensors, there / "adapter_model.safetensors", metadata={"format": "pt"})
            written[name] = None
    return list(written)


@contextmanager
def _without_adapters(pipeline: Any) -> Iterator[None]:
    """Put every module back in place of its adapter wrapper while the context lasts."""
    part: Any
    with ExitStack() as back:
        for component, part in parts_of(pipeline).items():
            for holder, name, module in list(adapted(part)):
                back.callback(setattr, holder, name, module)
                setattr(holder, name, module.base_layer)
            if vars(part).get(WITH_ADAPTERS):
                back.callback(setattr, part, WITH_ADAPTERS, vars(part)[WITH_ADAPTERS])
                setattr(part, WITH_ADAPTERS, False)
            if hasattr(part, "get_base_model"):  # a PeftModel
                back.callback(setattr, pipeline, component, part)
                setattr(pipeline, component, part.get_base_model())
        yield

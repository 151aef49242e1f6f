"""Pipelines of diffusers' own classes, of the shapes of Stable Diffusion 1, 2 and XL, small and with random weights."""

from __future__ import annotations

from typing import Any, Literal

import torch

from slug_lightning.embedded import CLIP

Shape = Literal["sd1", "sd2", "sdxl"]
SIZE = 16
"""Pixels of a picture's side; latents have half as many."""
TOKENS = 16
"""The length of the text encoder's context, with the tokens for start and end."""


def tiny_tokenizer() -> Any:
    """That of the embedded CLIP: one token a word, start and end as CLIP has them."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(CLIP), model_max_length=TOKENS)


def tiny_text_config(kind: Shape = "sd1", **options: Any) -> Any:
    """Of the first text encoder; SD 2 has one layer less than its CLIP, and the XL is read before the last."""
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16}
    act = "gelu" if kind == "sd2" else "quick_gelu"
    given = {**shape, **ends, "hidden_act": act, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    return CLIPTextConfig(**{**given, **options})


def _unet(kind: Shape, text_width: int, pooled_width: int) -> Any:
    from diffusers import UNet2DConditionModel

    own: dict[str, Any] = {"attention_head_dim": 4}
    if kind != "sd1":
        own = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    if kind == "sdxl":
        time = 8  # each of the six numbers for size and crop becomes as many sines; the pooled text comes behind
        own |= {"addition_embed_type": "text_time", "addition_time_embed_dim": time, "transformer_layers_per_block": (1, 2)}
        own |= {"projection_class_embeddings_input_dim": 6 * time + pooled_width}
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        **own,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=SIZE,
        force_upcast=False,
    )


def _scheduler(kind: Shape) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2" else "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _safety() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": SIZE, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    sides = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(**sides)}


def tiny_pipeline(
    kind: Shape = "sd1",
    seed: int = 0,
    *,
    text_encoder: Any = None,
    scheduler: Any = None,
    safety: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A pipeline that draws noise within a moment.

    Args:
        kind: whose shape.
        seed: of the weights; the caller's random numbers stay as they are.
        text_encoder: in place of the first one.
        scheduler: in place of DDIM.
        safety: whether a safety checker looks at what is drawn (SD 1 and 2).
        dtype: of all weights.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {"vae": _vae(), "tokenizer": tiny_tokenizer()}
        parts["text_encoder"] = text_encoder or CLIPTextModel(tiny_text_config(kind))
        parts["scheduler"] = scheduler or _scheduler(kind)
        width = parts["text_encoder"].config.hidden_size
        if kind == "sdxl":
            second = tiny_text_config(kind, hidden_size=24, hidden_act="gelu")
            parts |= {"text_encoder_2": CLIPTextModelWithProjection(second), "tokenizer_2": tiny_tokenizer()}
            parts["unet"] = _unet(kind, width + second.hidden_size, second.projection_dim)
            pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            parts["unet"] = _unet(kind, width, 0)
            parts |= _safety() if safety else {"safety_checker": None, "feature_extractor": None}
            pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=safety)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype)


def tiny_clips(pipeline: Any, seed: int = 5) -> list[Any]:
    """The `CLIPModel`s that a pipeline's text encoders come from; that of SD 2 has one layer more than its text encoder."""
    from transformers import CLIPConfig, CLIPModel

    more = int(pipeline.scheduler.config["prediction_type"] == "v_prediction")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clips = []
    for encoder in filter(None, (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))):
        text = {**encoder.config.to_dict(), "num_hidden_layers": encoder.config.num_hidden_layers + more}
        shape = {"vision_config": {**vision, "image_size": 24, "patch_size": 8}, "projection_dim": text["projection_dim"]}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clips.append(read_by(CLIPModel(CLIPConfig(text_config=text, **shape)).eval(), encoder))
    return clips


def read_by(clip: Any, encoder: Any) -> Any:
    """A `CLIPModel` that has been given the weights of a text encoder, and has kept whatever that has none for."""
    tower = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    projection = tower.pop("text_projection.weight", clip.text_projection.weight)
    assert not clip.text_model.load_state_dict(tower, strict=False).unexpected_keys
    clip.text_projection.load_state_dict({"weight": projection})
    return clip

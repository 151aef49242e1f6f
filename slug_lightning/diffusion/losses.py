"""The denoising loss of a text-to-image pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from slug_lightning.diffusion.pipelines import read_prompts, resized
from slug_lightning.errors import UnlearnError

OF_TRAINING = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"]
OF_TRAINING += ["prediction_type"]
"""The part of a scheduler's configuration that says how its model was trained; the rest is about sampling."""


class Denoising:
    """The loss that the pipeline was trained with: how well the UNet predicts the noise in pictures, given their captions.

    High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), equation 3; with v-prediction
    (arXiv 2202.00512, appendix D), the velocity instead of the noise. Timesteps and noise come from torch's global generator,
    so that a run is reproducible. Pictures are encoded at `size` × `size` pixels.
    """

    def __init__(self, pipeline: Any, size: int) -> None:
        from diffusers import DDPMScheduler

        self.pipeline = pipeline
        self.size = size
        config = pipeline.scheduler.config
        kind = config.get("prediction_type") if "beta_schedule" in config else "flow or noise of another kind"
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise UnlearnError(
                f"pipeline: its scheduler, {type(pipeline.scheduler).__name__}, predicts {kind}; the denoising loss supports "
                'epsilon, v_prediction and sample. Give the scheduler that the pipeline was trained with, or objective="clip"'
            )
        # Whatever scheduler samples, the noise in training depends on the betas alone.
        self.noise = DDPMScheduler.from_config({name: config[name] for name in OF_TRAINING if name in config})

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error over a batch `{"image": [B, 3, H, W] in [-1, 1], "text": B captions}`, a scalar."""
        unet: Any = self.pipeline.unet
        clean = latents_of(self.pipeline.vae, resized(batch["image"], self.size))
        times = torch.randint(self.noise.config["num_train_timesteps"], (len(clean),), device=clean.device)
        added = torch.randn(clean.shape, device=clean.device)  # in order, whatever the memory layout of the latents
        read = read_prompts(self.pipeline, batch["text"])
        more = {}
        if "text_embeds" in read:
            # SDXL also reads the picture's size, the corner of its crop, and the target size.
            sizes = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=clean.device)
            time_ids = sizes.repeat(len(clean), 1).to(read["text_embeds"].dtype)
            more["added_cond_kwargs"] = {"text_embeds": read["text_embeds"], "time_ids": time_ids}
        noisy = self.noise.add_noise(clean, added, times).to(unet.dtype)
        guess = unet(noisy, times, encoder_hidden_states=read["encoder_hidden_states"], **more).sample
        target = {"epsilon": added, "sample": clean}.get(self.noise.config["prediction_type"])
        return mse_loss(guess.float(), self.noise.get_velocity(clean, added, times) if target is None else target)


@torch.no_grad()
def latents_of(vae: Any, pictures: Tensor) -> Tensor:
    """Encode pictures in [-1, 1] into latents, scaled as the UNet reads them, in float32."""
    # The autoencoder of SDXL overflows in half precision, and its config says so.
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    latents = vae.encode(pictures.to(vae.dtype)).latent_dist.sample().float()
    if upcast:
        vae.to(dtype)
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

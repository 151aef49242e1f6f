"""Stable Diffusion pipelines that stop drawing what they are to forget, by an edit of a text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn

from slug_lightning.clip.models import contrastive_loss, matching_loss
from slug_lightning.diffusion.judges import Judge, make_judges
from slug_lightning.diffusion.losses import Denoising
from slug_lightning.diffusion.pipelines import draw, load_pipeline, native_size, text_encoders
from slug_lightning.diffusion.saving import save_pipeline
from slug_lightning.diffusion.towers import load_towers
from slug_lightning.embedded import CANVAS, CLIP
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.objective.samples import MOST
from slug_lightning.utils.model_parts import base_parameters, parts_of


class DiffusionModule(UnlearnModule):
    """A Stable Diffusion pipeline (1.x, 2.x, XL) that is to forget a style, a thing, or anything that captions can name.

    Candidates are the matrices of its text encoders, as in SLUG (arXiv 2407.11867, section 4.3); name others with `layers=`,
    such as "*unet*". For the gradient, a batch is `{"image": [B, 3, H, W], "text": B captions}`, pictures in [-1, 1]; where it
    also says in "concept" how each caption names what is to be forgotten, objective "clip" takes that in place of the caption,
    and with "denoising" a tokenizer that cuts it off is refused.

    In search and report a batch is prompts: `{"text": …, "seed": [B], "steps": [B], "<kind>": [B] …}`; each is drawn from its
    own seed, and `<kind>_accuracy` tells how often the judge of that kind sees the class that was asked for (-1: none was).
    So with UnlearnCanvas (arXiv 2402.11846) UA is 1 - `accuracy` on prompts of the forgotten concept; IRA and CRA are the
    accuracies of the concept's kind and of the other kind on the prompts that are kept. `accuracy` is of the samples whose
    asked classes are all seen.

    Args:
        pipeline: name or folder of a pipeline, or the pipeline. Its own modules are edited, so that it draws as it has
            forgotten.
        objective: "denoising": the loss the pipeline was trained with, through the UNet; it needs pictures and captions only.
            "clip": how well pictures fit their captions for the CLIP that the text encoder comes from; cheaper by far, as no
            UNet is run.
        clip: that CLIP, by name ("hf:openai/clip-vit-large-patch14", or as open_clip names a folder or a repository,
            "local-dir:…", "hf-hub:…") or as a model, which is then frozen and takes the pipeline's device and precision; for SDXL
            a list of two. The text encoder may have been edited since; then its own tensors count.
        judges: by kind of concept, such as "style": name or folder of a transformers image classifier, a module from pictures
            in [-1, 1] to logits, or class names, which `clip` then tells apart.
        guidance: scale of classifier-free guidance when drawing; 1 is without.
        size: height and width of pictures in pixels; default: what the pipeline was made for.
        dtype: of the weights, if the pipeline is loaded by name: "float32", "float16" or "bfloat16".
        gradient_checkpointing: whether the UNet, from now on, is run a second time in a backward pass instead of keeping all
            it computes.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Raises:
        UnlearnError: if the pipeline is of another kind, or has no image tower where one is needed.

    Example:
        >>> from slug_lightning.embedded import CANVAS, CLIP
        >>> module = DiffusionModule(CANVAS / "pipeline", objective="clip", clip=f"local-dir:{CLIP}")
        >>> batch = {"image": torch.zeros(2, 3, 64, 64), "text": ["cat in blob style", "dog"]}
        >>> module.forget_step(batch, 0).requires_grad
        True
    """

    forget_metric: Optional[str] = "accuracy"
    forget_target: Optional[float] = 0.1
    towers = {"text_encoder_2": "model.text_encoder_2.*", "text_encoder": "model.text_encoder.*", "unet": "model.unet.*"}

    def __init__(
        self,
        pipeline: Any,
        *,
        objective: Literal["denoising", "clip"] = "denoising",
        clip: Any = None,
        judges: Optional[dict[str, Judge]] = None,
        guidance: float = 7.5,
        size: Optional[int] = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        gradient_checkpointing: bool = True,
        learning_rate: float = 1e-5,
    ) -> None:
        if objective not in ("denoising", "clip"):
            raise UnlearnError(f"objective: {objective!r} is not known; give 'denoising' or 'clip'")
        if objective == "clip" and clip is None:
            raise UnlearnError(
                "clip: objective='clip' compares captions with pictures, and a pipeline has no image tower; give the CLIP that "
                'its text encoder comes from (Stable Diffusion 1: "hf:openai/clip-vit-large-patch14"), or objective="denoising"'
            )
        pipeline = load_pipeline(pipeline, getattr(torch, dtype))
        super().__init__(parts_of(pipeline), loss=_never, learning_rate=learning_rate)
        self.pipeline = pipeline
        self.strict_loading = False  # checkpoints hold what may be edited, and not the rest
        self.model.requires_grad_(False)
        for encoder, _ in text_encoders(self.pipeline).values():
            for parameter in base_parameters(encoder).values():
                parameter.requires_grad_(True)
        self.objective = objective
        self.guidance = guidance
        self.size = size or native_size(self.pipeline)
        if self.size % self.pipeline.vae_scale_factor:
            raise UnlearnError(
                f"size: {self.size} pixels; give a multiple of {self.pipeline.vae_scale_factor}, as latents are smaller"
            )
        clips = [] if clip is None else load_towers(clip, self.pipeline, judging_only=objective == "denoising")
        self.clips = nn.ModuleList(clips)
        self.judges = make_judges(judges or {}, clips)
        self.denoising = Denoising(self.pipeline, self.size) if objective == "denoising" else None
        if self.denoising and gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        self.retain_metric = [f"{kind}_accuracy" for kind in self.judges]  # type: ignore[assignment]
        if not self.judges:  # then the losses themselves are the metrics
            self.forget_metric = self.retain_metric = self.forget_target = None
            self.gallery_step = None  # type: ignore[assignment,method-assign]  # their batches are pairs, and no prompts to draw

    def configure_model(self) -> None:
        """Refuse to be sharded: a pipeline calls parts of its parts, which then would be found in shards."""
        if self.device_mesh is not None:
            raise UnlearnError("strategy: a pipeline cannot be sharded over devices; use ddp, or one device")

    def forget_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a forget batch, which the edit raises: `mean(1 - cos)` of the matching pairs, or that of denoising."""
        if self.denoising:
            self._refuse_cut(batch)
            return self.denoising(batch)
        # What else a caption says, such as the thing that is drawn in a style, is not to be forgotten.
        texts = [concept or text for concept, text in zip(batch.get("concept", batch["text"]), batch["text"], strict=True)]
        pairs = {"image": batch["image"], "text": texts}
        return torch.stack([matching_loss(clip, pairs) for clip in self.clips]).sum()

    def retain_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a retain batch, which the edit keeps low: the contrastive one of CLIP, or that of denoising."""
        if self.denoising:
            return self.denoising(batch)
        return torch.stack([contrastive_loss(clip, dict(batch)) for clip in self.clips]).sum()

    @torch.no_grad()
    def draw(self, batch: Mapping[str, Any]) -> Tensor:
        """Draw the prompts of an evaluation batch: `[B, 3, size, size]`, in [-1, 1]."""
        steps = batch["steps"].unique().tolist()
        if len(steps) != 1:
            raise UnlearnError(f"steps: a batch asks for {steps} sampling steps; give all of its prompts the same number")
        seeds = batch["seed"].tolist()
        return draw(self.pipeline, batch["text"], seeds, steps=steps[0], guidance=self.guidance, size=self.size)

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> dict[str, Tensor]:
        """The class that each judge sees in each picture, `[B]`, by kind."""
        return {kind: judge(pictures).argmax(1) for kind, judge in self.judges.items()}

    def scores(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Whether each picture shows what was asked for, `[B]`, by kind and of all kinds; NaN where nothing was asked."""
        if not self.judges:
            return {}
        asked = {kind: batch[kind] for kind in self.judges if kind in batch}
        if not asked:
            raise UnlearnError(
                f"judges: there are {list(self.judges)}, but the prompts have labels for none of them, only {list(batch)}"
            )
        pictures = self.draw(batch)
        whole = pictures.isfinite().flatten(1).all(1)  # of a picture without a single number a judge says its first class
        logits = {kind: self.judges[kind](pictures) for kind in asked}
        for kind, labels in asked.items():
            if labels.max() >= logits[kind].shape[1]:
                raise UnlearnError(
                    f"judges: {kind!r} tells {logits[kind].shape[1]} classes apart, and prompts ask for class {labels.max()}; "
                    "give the labels of the data in the order of the judge's classes"
                )
        seen = {kind: (logits[kind].argmax(1) == labels) & whole for kind, labels in asked.items()}
        right = {kind: seen[kind].float().masked_fill(labels < 0, torch.nan) for kind, labels in asked.items()}
        found = {f"{kind}_accuracy": values for kind, values in right.items()}
        every = torch.stack(list(found.values()))
        found["accuracy"] = every.nan_to_num(1.0).amin(0).masked_fill(every.isnan().all(0), torch.nan)
        return found

    def gallery_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[Tensor, list[str]]:
        """Draw a few prompts of an evaluation batch, evenly spaced: pictures `[n, 3, H, W]` in [0, 1], and the prompts."""
        count = len(batch["text"])
        rows = torch.linspace(0, count - 1, min(MOST, count)).long()
        texts = [batch["text"][int(row)] for row in rows]
        pictures = self.draw({"text": texts, "seed": batch["seed"][rows], "steps": batch["steps"][rows]})
        return (pictures + 1) / 2, texts

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write the pipeline as plain diffusers loads it."""
        save_pipeline(self.pipeline, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what no edit reaches: autoencoder, safety checker, image towers and judges."""
        kept = tuple(f"model.{name}." for name in (*text_encoders(self.pipeline), "unet"))
        checkpoint["state_dict"] = {name: p for name, p in checkpoint["state_dict"].items() if name.startswith(kept)}

    def _refuse_cut(self, batch: Mapping[str, Any]) -> None:
        """Refuse captions whose concept the text encoders never see."""
        for name, (_, tokenizer) in text_encoders(self.pipeline).items():
            for text, concept in zip(batch["text"], batch.get("concept", ()), strict=False):
                ids = [tokenizer(text, truncation=cut, verbose=False).input_ids for cut in (False, True)]
                whole, seen = (tokenizer.decode(some, skip_special_tokens=True) for some in ids)
                # A tokenizer that does not know the words at all names nothing either way; what then can be forgotten shows.
                if _names(whole, concept) and not _names(seen, concept):
                    raise UnlearnError(
                        f"forget: the tokenizer of {name} reads {tokenizer.model_max_length} tokens, and of the caption {text!r} "
                        f"only {seen!r}, which no longer names {concept!r}; shorten the captions, or name the concept early"
                    )


def _never(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("the steps of a DiffusionModule have losses of their own")


def _names(text: str, concept: str) -> bool:
    """Whether a text has the words of a concept side by side, whatever the case, spaces and signs, which tokenizers change."""
    words, own = (re.findall(r"\w+", given.lower()) for given in (text, concept))
    return any(words[i : i + len(own)] == own for i in range(len(words) + 1))


class EmbeddedCanvas(DiffusionModule):
    """The miniature UnlearnCanvas that ships with the package: draws 20 things in 5 styles at 32 × 32 pixels, and judges itself.

    Its text encoder is the text tower of the embedded CLIP, its judges are two classifiers that were trained apart from it.

    Args:
        objective: as in `DiffusionModule`.
        guidance: likewise.
        learning_rate: likewise.

    Example:
        >>> module = EmbeddedCanvas()
        >>> prompts = {"text": ["cat in blob style"], "seed": torch.tensor([0]), "steps": torch.tensor([2])}
        >>> module.draw(prompts).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self, objective: Literal["clip", "denoising"] = "clip", *, guidance: float = 1.0, learning_rate: float = 1e-5
    ) -> None:
        super().__init__(
            CANVAS / "pipeline",
            objective=objective,
            clip=f"local-dir:{CLIP}" if objective == "clip" else None,
            judges={kind: str(CANVAS / kind) for kind in ("style", "thing")},
            guidance=guidance,
            gradient_checkpointing=False,
            learning_rate=learning_rate,
        )

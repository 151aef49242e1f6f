"""Stable Diffusion pipelines, edited in a text encoder."""

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
from slug_lightning.diffusion.pipelines import draw, load_pipeline, pooled_text, save_pipeline, text_encoders
from slug_lightning.diffusion.source_clip import load_source_clips
from slug_lightning.embedded import CANVAS, CLIP
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.objective.samples import MAX_SAMPLES
from slug_lightning.utils.model_parts import base_parameters, parts_of


class DiffusionModule(UnlearnModule):
    """Wrap a Stable Diffusion pipeline (1.x, 2.x, XL) to forget a style, an object, or anything that captions name.

    Candidates are the matrices of its text encoders, as in SLUG (arXiv 2407.11867, section 4.3); name others with `layers=`,
    such as "*unet*". For the gradient, a batch is `{"image": [B, 3, H, W], "text": B captions}`, pictures in [-1, 1]. It may
    also hold "concept", the words of each caption that name the concept (or ""): objective "clip" uses these in place of the
    caption, and objective "denoising" refuses captions of which the tokenizer cuts them off. And it may hold the classes that
    judges should see, as prompts do: then near data are the nearest classes, else the nearest 5 % of the captions.

    On the validation and test splits a batch is prompts: `{"text": …, "seed": [B], "steps": [B], "<kind>": [B] …}`. Each is
    drawn from its own seed, and `<kind>_accuracy` is how often the judge of that kind sees the class asked for (-1: none);
    `accuracy` counts the samples for which all judges do. With UnlearnCanvas (arXiv 2402.11846), UA is 1 - `accuracy` on
    forget prompts; IRA and CRA are the accuracies of the concept's kind and of the other kind on retain prompts.

    Args:
        pipeline: name or folder of a pipeline, or the pipeline, whose own modules are edited.
        objective: "denoising": the loss the pipeline was trained with, through the UNet; it needs pictures and captions only.
            "clip": how well pictures fit their captions for the CLIP that the text encoder comes from: far cheaper.
        clip: that CLIP, by name ("hf:openai/clip-vit-large-patch14", or as open_clip names a folder or a repository,
            "local-dir:…", "hf-hub:…") or as a model, which is then frozen and moved to the pipeline's device and precision;
            for SDXL a list of two. If the text encoder was edited since, its own tensors are used.
        judges: by kind of concept, such as "style": name or folder of a transformers image classifier, a module from pictures
            in [-1, 1] to logits, or class names, between which `clip` decides. Without judges, the losses are the metrics.
        guidance: scale of classifier-free guidance when drawing; 1 disables it.
        size: height and width of pictures in pixels; default: the pipeline's own.
        dtype: of the weights, if the pipeline is loaded by name.
        gradient_checkpointing: whether the UNet recomputes its activations in the backward pass instead of storing them.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Raises:
        UnlearnError: if the pipeline is not supported, or `clip` or a judge is missing or does not fit it.

    Example:
        >>> from slug_lightning.embedded import CANVAS, CLIP
        >>> module = DiffusionModule(CANVAS / "pipeline", objective="clip", clip=f"local-dir:{CLIP}")
        >>> batch = {"image": torch.zeros(2, 3, 64, 64), "text": ["cat in blob style", "dog"]}
        >>> module.forget_step(batch, 0).requires_grad
        True
    """

    forget_metric: Optional[str] = "accuracy"
    forget_target: Optional[float] = 0.1
    max_step = 4.0
    """Styles lie deep in a text encoder: some are forgotten by steps only that are longer than its weights."""
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
            raise UnlearnError(f"objective must be 'denoising' or 'clip', got {objective!r}")
        if objective == "clip" and clip is None:
            raise UnlearnError(
                "clip: objective='clip' compares captions with pictures, and a pipeline has no image tower; give the CLIP that "
                'its text encoder comes from (Stable Diffusion 1: "hf:openai/clip-vit-large-patch14"), or objective="denoising"'
            )
        pipeline = load_pipeline(pipeline, getattr(torch, dtype))
        super().__init__(parts_of(pipeline), loss=None, learning_rate=learning_rate)
        self.pipeline = pipeline
        self.strict_loading = False  # checkpoints hold only what may be edited
        self.model.requires_grad_(False)
        for encoder, _ in text_encoders(pipeline).values():
            for parameter in base_parameters(encoder).values():
                parameter.requires_grad_(True)
        self.objective = objective
        self.guidance = guidance
        self.size = size or int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
        if self.size % pipeline.vae_scale_factor:
            raise UnlearnError(f"size must be a multiple of {pipeline.vae_scale_factor} pixels, got {self.size}")
        clips = [] if clip is None else load_source_clips(clip, pipeline, judging_only=objective == "denoising")
        self.clips = nn.ModuleList(clips)
        self.judges = make_judges(judges or {}, clips)
        self.denoising = Denoising(pipeline, self.size) if objective == "denoising" else None
        if self.denoising and gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        self.retain_metric = [f"{kind}_accuracy" for kind in self.judges]  # type: ignore[assignment]
        if not self.judges:  # then the losses themselves are the metrics, of pairs, which cannot be drawn
            self.forget_metric = self.retain_metric = self.forget_target = None
            self.gallery_step = None  # type: ignore[assignment,method-assign]

    def configure_model(self) -> None:
        """Refuse FSDP2: a pipeline calls submodules of its models directly, past the hooks that gather shards."""
        if self.device_mesh is not None:
            raise UnlearnError("strategy: a pipeline cannot be sharded over devices; use ddp, or one device")

    def forget_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the denoising loss of a forget batch, or `mean(1 - cos)` of its matching pairs; the edit raises it."""
        if self.denoising:
            self._refuse_cut(batch)
            return self.denoising(batch)
        # The rest of a caption, such as the object drawn in a style, should be retained.
        texts = [concept or text for concept, text in zip(batch.get("concept", batch["text"]), batch["text"], strict=True)]
        pairs = {"image": batch["image"], "text": texts}
        return torch.stack([matching_loss(clip, pairs) for clip in self.clips]).sum()

    def retain_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the denoising or the contrastive loss of a retain batch, which the edit keeps low."""
        if self.denoising:
            return self.denoising(batch)
        return torch.stack([contrastive_loss(clip, dict(batch)) for clip in self.clips]).sum()

    def embed(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return what the text encoders make of whole captions or prompts, `[B, D]`; nothing is drawn."""
        return pooled_text(self.pipeline, batch["text"])

    def labels(self, batch: Mapping[str, Any]) -> dict[str, list[Optional[str]]]:
        """Return by judge the classes asked for, B names, or numbers where the judge has no names; None for -1."""
        found: dict[str, list[Optional[str]]] = {}
        for kind in [kind for kind in self.judges if kind in batch]:
            names = getattr(self.judges[kind], "names", None)
            asked = batch[kind].tolist()
            found[kind] = [None if label < 0 else names[label] if names else str(label) for label in asked]
        return found

    @torch.no_grad()
    def draw(self, batch: Mapping[str, Any]) -> Tensor:
        """Draw the prompts of an evaluation batch: `[B, 3, size, size]`, in [-1, 1]."""
        steps = batch["steps"].unique().tolist()
        if len(steps) != 1:
            raise UnlearnError(f"steps: all prompts of a batch must have the same number of sampling steps, got {steps}")
        seeds = batch["seed"].tolist()
        return draw(self.pipeline, batch["text"], seeds, steps=steps[0], guidance=self.guidance, size=self.size)

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the class that each judge sees in each picture, `[B]`, by kind."""
        return {kind: judge(pictures).argmax(1) for kind, judge in self.judges.items()}

    def scores(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return whether each picture shows the classes asked for, `[B]`, by kind and for all kinds; NaN where none was asked."""
        if not self.judges:
            return {}
        asked = {kind: batch[kind] for kind in self.judges if kind in batch}
        if not asked:
            raise UnlearnError(f"judges: the prompts have labels for none of {list(self.judges)}, only {list(batch)}")
        pictures = self.draw(batch)
        finite = pictures.isfinite().flatten(1).all(1)  # in a picture of NaN a judge would see its first class
        found = {}
        for kind, labels in asked.items():
            logits = self.judges[kind](pictures)
            if labels.max() >= logits.shape[1]:
                raise UnlearnError(
                    f"judges: {kind!r} has {logits.shape[1]} classes, and prompts ask for class {labels.max()}; give the labels "
                    "of the data in the order of the judge's classes"
                )
            seen = (logits.argmax(1) == labels) & finite
            found[f"{kind}_accuracy"] = seen.float().masked_fill(labels < 0, torch.nan)
        every = torch.stack(list(found.values()))
        found["accuracy"] = every.nan_to_num(1.0).amin(0).masked_fill(every.isnan().all(0), torch.nan)
        return found

    def gallery_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[Tensor, list[str]]:
        """Draw a few prompts of an evaluation batch, evenly spaced: pictures `[n, 3, H, W]` in [0, 1], and the prompts."""
        count = len(batch["text"])
        rows = torch.linspace(0, count - 1, min(MAX_SAMPLES, count)).long()
        texts = [batch["text"][int(row)] for row in rows]
        pictures = self.draw({"text": texts, "seed": batch["seed"][rows], "steps": batch["steps"][rows]})
        return (pictures + 1) / 2, texts

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write the pipeline as plain diffusers loads it."""
        save_pipeline(self.pipeline, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what no edit reaches: autoencoder, safety checker, image towers and judges."""
        edited = tuple(f"model.{name}." for name in (*text_encoders(self.pipeline), "unet"))
        checkpoint["state_dict"] = {name: p for name, p in checkpoint["state_dict"].items() if name.startswith(edited)}

    def _refuse_cut(self, batch: Mapping[str, Any]) -> None:
        """Refuse captions of which a tokenizer cuts the concept off."""
        for name, (_, tokenizer) in text_encoders(self.pipeline).items():
            for text, concept in zip(batch["text"], batch.get("concept", ()), strict=False):
                ids = [tokenizer(text, truncation=cut, verbose=False).input_ids for cut in (False, True)]
                whole, seen = (tokenizer.decode(some, skip_special_tokens=True) for some in ids)
                # A tokenizer that does not know the words at all loses them either way.
                if _has_words(whole, concept) and not _has_words(seen, concept):
                    raise UnlearnError(
                        f"forget: the tokenizer of {name} reads {tokenizer.model_max_length} tokens, and of the caption {text!r} "
                        f"only {seen!r}, which no longer names {concept!r}; shorten the captions, or name the concept early"
                    )


def _has_words(text: str, concept: str) -> bool:
    """Whether a text has a concept's words next to each other, whatever the case, spaces and signs, which tokenizers change."""
    words, own = (re.findall(r"\w+", given.lower()) for given in (text, concept))
    return any(words[i : i + len(own)] == own for i in range(len(words) + 1))


class EmbeddedCanvas(DiffusionModule):
    """Load the miniature UnlearnCanvas that ships with the package: 20 things in 5 styles at 32 × 32 pixels, with two judges.

    Its text encoder is the text tower of the embedded CLIP. The judges are classifiers that were trained separately. The
    arguments are those of `DiffusionModule`.

    Example:
        >>> prompts = {"text": ["cat in blob style"], "seed": torch.tensor([0]), "steps": torch.tensor([2])}
        >>> EmbeddedCanvas().draw(prompts).shape
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

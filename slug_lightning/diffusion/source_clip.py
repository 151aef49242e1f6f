"""The CLIP that a pipeline's text encoder was taken from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slug_lightning.clip.models import SourceClip, encode_image, encode_text, load_clip, padded_tokens, to_hugging_face
from slug_lightning.diffusion.pipelines import resized, text_encoders
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.utils.model_parts import base_parameters

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of a picture's channels in [0, 1] that OpenAI's CLIP and most models after it expect."""


class TextSourceClip(SourceClip):
    """A frozen CLIP that reads texts with the tensors of a pipeline's text encoder in place of its own.

    Where the pipeline has left out the CLIP's last layers, as Stable Diffusion 2 does, the CLIP's own ones follow.

    Args:
        clip: a transformers `CLIPModel`, or an open_clip model with a ViT.
        pipeline: a Stable Diffusion pipeline, one of whose text encoders has the CLIP's weights.
        tokenizer: of the CLIP; needed only for classes. Default: the text encoder's.
        normalisation: mean and deviation of pictures; default: the model's own, else OpenAI's.
        judging_only: whether the CLIP is only asked which class a picture shows; then the text encoder may be any.

    Raises:
        UnlearnError: if half or more of the text matrices of every text encoder differ from the CLIP's.
    """

    def __init__(
        self, clip: nn.Module, pipeline: Any, tokenizer: Any = None, normalisation: Any = None, judging_only: bool = False
    ) -> None:
        normalisation = normalisation or _normalisation(clip)
        twin: Any = to_hugging_face(clip)
        name = "text_encoder" if judging_only else _matching(twin, pipeline)
        encoder, own_tokenizer = text_encoders(pipeline)[name]
        super().__init__(twin.eval().to(encoder.device, encoder.dtype), *normalisation)
        self.pipeline, self.name = pipeline, name
        self.tokenize = partial(padded_tokens, own_tokenizer, length=own_tokenizer.model_max_length)
        self.tokenize_classes = tokenizer or self.tokenize

    @property
    def encoder(self) -> Any:
        """The pipeline's text encoder; not a submodule, as it belongs to the pipeline."""
        return getattr(self.pipeline, self.name)

    def forward(self, tokens: Tensor) -> Tensor:
        """Text features, `[B, D]`, by the CLIP's own tensors."""
        return encode_text(self.model, tokens.to(self.encoder.device))

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Image features, `[B, D]`, of pictures in [-1, 1]."""
        normal = ((resized(pictures, self.size) + 1) / 2 - self.mean) / self.deviation
        return encode_image(self.model, normal.to(self.encoder.dtype))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text features, `[B, D]`, by the pipeline's tensors."""
        held = {f"model.{name}": p for name, p in _text_tensors(self.encoder).items()}
        return functional_call(self, held, (self.tokenize(texts),))

    @torch.no_grad()
    def classes(self, names: Sequence[str]) -> Tensor:
        """Text features of class names, `[C, D]`, by the CLIP's own tensors, which no edit changes."""
        return self(self.tokenize_classes(list(names)))


def load_source_clips(clip: Any, pipeline: Any, judging_only: bool = False) -> list[TextSourceClip]:
    """Load the CLIPs of a pipeline's text encoders.

    Args:
        clip: name of a CLIP as `slug_lightning.clip.models.load_clip` takes it, such as "hf:openai/clip-vit-large-patch14", or
            the model; or a list of them, for a pipeline with two text encoders.
        pipeline: the pipeline.
        judging_only: as in `TextSourceClip`.

    Raises:
        UnlearnError: as `TextSourceClip`; if a name does not say where weights are, or two CLIPs match one text encoder.
    """
    found: list[TextSourceClip] = []
    for one in clip if isinstance(clip, (list, tuple)) else [clip]:
        if isinstance(one, nn.Module):
            found.append(TextSourceClip(one, pipeline, judging_only=judging_only))
        elif str(one).startswith(("hf:", "hf-hub:", "local-dir:")):
            model, tokenizer = load_clip(str(one))
            found.append(TextSourceClip(model, pipeline, tokenizer, _processor_normalisation(str(one)), judging_only))
        else:
            raise UnlearnError(f"clip: {str(one)!r} names no weights; put hf:, hf-hub: or local-dir: in front, or give the model")
    names = [source.name for source in found]
    if len(set(names)) < len(names) and not judging_only:
        raise UnlearnError(f"clip: two of them match {names[0]}; give one for each text encoder")
    return found


def _normalisation(clip: nn.Module) -> Any:
    """The mean and deviation that an open_clip model was trained with, else OpenAI's."""
    known = getattr(getattr(clip, "visual", None), "preprocess_cfg", None) or {}
    return (known["mean"], known["std"]) if known.keys() >= {"mean", "std"} else OPENAI


def _processor_normalisation(name: str) -> Any:
    """The mean and deviation of a transformers CLIP's image processor; None if there is none."""
    if not name.startswith("hf:"):
        return None
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name.removeprefix("hf:"))
    except (OSError, ValueError):
        return None
    return processor.image_mean, processor.image_std


def _text_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of a text encoder, without adapters, by the names that a `CLIPModel` of any transformers has for them."""
    named = {name.replace(".base_layer.", ".").removeprefix("text_model."): p for name, p in base_parameters(encoder).items()}
    return {name if name.startswith("text_projection") else f"text_model.{name}": p for name, p in named.items()}


def _matching(clip: Any, pipeline: Any) -> str:
    """Which text encoder has the CLIP's text weights, bit for bit at its own precision, except for a few edited ones."""
    own = plain_parameters(clip)
    wrong = []
    for name, (encoder, _) in text_encoders(pipeline).items():
        theirs = {key: p for key, p in _text_tensors(encoder).items() if p.ndim > 1}  # vectors often are all 0 or 1
        fits = all(key in own and own[key].shape == p.shape for key, p in theirs.items())
        odd = [key for key, p in theirs.items() if key not in own or not _is_same(p, own[key])]
        if fits and len(odd) < len(theirs) / 2:
            return name
        wrong.append(f"{name} in {odd[0]} and {len(odd) - 1} more of {len(theirs)} matrices")
    raise UnlearnError(
        f"clip: its text tower is not the pipeline's: they differ in {'; '.join(wrong)}. Give the CLIP that the text encoder was "
        'taken from (Stable Diffusion 1: "hf:openai/clip-vit-large-patch14"), or objective="denoising"'
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bitwise_equal(one, other.to(one.device, one.dtype))

"""The CLIP that a pipeline's text encoder was taken from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from slug_lightning.clip.models import SourceClip, encode_image, encode_text, load_clip, padded_tokens, to_hugging_face
from slug_lightning.diffusion.pipelines import resized, text_encoders
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.utils.model_parts import base_parameters
from slug_lightning.utils.optional_imports import import_optional

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of a picture's channels in [0, 1] that OpenAI's CLIP and most models after it expect."""


class TextSourceClip(SourceClip):
    """A frozen CLIP that reads texts with the tensors of a pipeline's text encoder in place of its own.

    Where the pipeline has left out the CLIP's last layers, as Stable Diffusion 2 does, the CLIP's own ones follow. The CLIP is
    given as a model or by a name that `load_clip` takes; it is refused if half or more of its text matrices differ from those
    of every text encoder, except for `judging_only`, where it only tells which class a picture shows.
    """

    def __init__(self, clip: Any, pipeline: Any, judging_only: bool = False) -> None:
        name, tokenizer = "", None
        if not isinstance(clip, nn.Module):
            name = str(clip)
            if not name.startswith(("hf:", "hf-hub:", "local-dir:")):
                raise UnlearnError(f"clip: {name!r} names no weights; put hf:, hf-hub: or local-dir: in front, or give the model")
            clip, tokenizer = load_clip(name)
        twin: Any = to_hugging_face(clip)
        component = "text_encoder" if judging_only else _matching(twin, pipeline)
        encoder, own_tokenizer = text_encoders(pipeline)[component]
        super().__init__(twin.eval().to(encoder.device, encoder.dtype), *_normalisation(clip, name))
        self.pipeline, self.component = pipeline, component
        self.tokenize = partial(padded_tokens, own_tokenizer, length=own_tokenizer.model_max_length)
        self.tokenize_classes = tokenizer or self.tokenize

    @property
    def encoder(self) -> Any:
        """The pipeline's text encoder; not a submodule, as it belongs to the pipeline."""
        return getattr(self.pipeline, self.component)

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


def load_source_clips(clip: Any, pipeline: Any, judging_only: bool = False) -> list[TextSourceClip]:
    """Load the CLIP of a pipeline's text encoder, or a list of them for a pipeline with two; refuse two for the same one."""
    given = clip if isinstance(clip, (list, tuple)) else [clip]
    clips = [TextSourceClip(one, pipeline, judging_only) for one in given]
    if len({one.component for one in clips}) < len(clips) and not judging_only:
        raise UnlearnError(f"clip: two of them match {clips[0].component}; give one for each text encoder")
    return clips


def _normalisation(clip: nn.Module, name: str) -> tuple[Any, Any]:
    """The mean and deviation of pictures that a CLIP was trained with, as far as it or its processor says; else OpenAI's."""
    known = getattr(getattr(clip, "visual", None), "preprocess_cfg", None) or {}
    if known.keys() >= {"mean", "std"}:
        return known["mean"], known["std"]
    if name.startswith("hf:"):
        with suppress(OSError, ValueError):
            processor = import_optional("transformers", "hf").AutoImageProcessor.from_pretrained(name.removeprefix("hf:"))
            return processor.image_mean, processor.image_std
    return OPENAI


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
        odd = [k for k, p in theirs.items() if k not in own or not bitwise_equal(p, own[k].to(p.device, p.dtype))]
        if fits and len(odd) < len(theirs) / 2:
            return name
        wrong.append(f"{name} in {odd[0]} and {len(odd) - 1} more of {len(theirs)} matrices")
    raise UnlearnError(
        f"clip: its text tower is not the pipeline's: they differ in {'; '.join(wrong)}. Give the CLIP that the text encoder was "
        'taken from (Stable Diffusion 1: "hf:openai/clip-vit-large-patch14"), or objective="denoising"'
    )

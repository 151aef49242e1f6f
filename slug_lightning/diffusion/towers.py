"""The CLIP that a pipeline's text encoder comes from: its image tower beside the pipeline's own text tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slug_lightning.clip.models import encode_image, encode_text, load_clip, to_hugging_face
from slug_lightning.diffusion.pipelines import resized, text_encoders
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.utils.model_parts import base_parameters

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of a picture's channels in [0, 1], as OpenAI's CLIP and most of its kin want them."""


class Towers(nn.Module):
    """A frozen CLIP that reads texts with the tensors of a pipeline's text encoder in place of its own.

    It is what `matching_loss` and `contrastive_loss` take. Where the pipeline has left out the CLIP's last layers, as
    Stable Diffusion 2 does, those of the CLIP follow.

    Args:
        clip: a transformers `CLIPModel`, or an open_clip model with a ViT.
        pipeline: a Stable Diffusion pipeline, one of whose text encoders has the CLIP's weights.
        tokenizer: of the CLIP; needed only for classes.
        normalisation: mean and deviation of pictures; default: what the model says, else OpenAI's.
        judging_only: whether no more is asked than which class a picture shows; then the text encoder may be any.

    Raises:
        UnlearnError: if no text encoder has the text weights of the CLIP, but for less than half of its matrices.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, clip: nn.Module, pipeline: Any, tokenizer: Any = None, normalisation: Any = None, judging_only: bool = False
    ) -> None:
        super().__init__()
        mean, deviation = normalisation or _normalisation(clip)
        twin: Any = to_hugging_face(clip) if hasattr(clip, "visual") else clip
        self.pipeline, self.name = pipeline, "text_encoder" if judging_only else _matching(twin, pipeline)
        self.own_tokenizer = tokenizer
        self.clip = _Text(twin.eval().requires_grad_(False).to(self.encoder.device, self.encoder.dtype))
        self.size = int(twin.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    @property
    def encoder(self) -> Any:
        """The pipeline's text encoder; not a part of this module, as it is one of the pipeline."""
        return getattr(self.pipeline, self.name)

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.model.logit_scale

    @property
    def _tokenizer(self) -> Any:
        return text_encoders(self.pipeline)[self.name][1]

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Image features, `[B, D]`, of pictures in [-1, 1]."""
        normal = ((resized(pictures, self.size) + 1) / 2 - self.mean) / self.deviation
        return encode_image(self.clip.model, normal.to(self.encoder.dtype))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text features, `[B, D]`, by the pipeline's tensors."""
        tokens = tokens_of(self._tokenizer, texts).to(self.encoder.device)
        held = {f"model.{name}": p for name, p in _text_tensors(self.encoder).items()}
        return functional_call(self.clip, held, (tokens,))

    @torch.no_grad()
    def classes(self, names: Sequence[str]) -> Tensor:
        """Text features of class names, `[C, D]`, by the CLIP's own tensors, which no edit changes."""
        tokens = self.own_tokenizer(list(names)) if self.own_tokenizer else tokens_of(self._tokenizer, names)
        return self.clip(tokens.to(self.encoder.device))


class _Text(nn.Module):
    """A CLIP whose `forward` gives text features, as `functional_call` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor) -> Tensor:
        return encode_text(self.model, tokens)


def load_towers(clip: Any, pipeline: Any, judging_only: bool = False) -> list[Towers]:
    """The image tower for every text encoder that has one.

    Args:
        clip: name of a CLIP as `slug_lightning.clip.models.load_clip` takes it, such as "hf:openai/clip-vit-large-patch14", or
            the model; or a list of them, for a pipeline with two text encoders.
        pipeline: the pipeline.
        judging_only: as in `Towers`.

    Raises:
        UnlearnError: as `Towers`; if a name does not say where weights are, or two CLIPs are those of one text encoder.
    """
    found: list[Towers] = []
    for one in clip if isinstance(clip, (list, tuple)) else [clip]:
        if isinstance(one, nn.Module):
            found.append(Towers(one, pipeline, judging_only=judging_only))
        elif str(one).startswith(("hf:", "hf-hub:", "local-dir:")):
            model, tokenizer = load_clip(str(one))
            found.append(Towers(model, pipeline, tokenizer, _processor_normalisation(str(one)), judging_only))
        else:
            raise UnlearnError(f"clip: {str(one)!r} names no weights; put hf:, hf-hub: or local-dir: in front, or give the model")
    names = [towers.name for towers in found]
    if len(set(names)) < len(names) and not judging_only:
        raise UnlearnError(f"clip: two of them are that of {names[0]}; give one for each text encoder")
    return found


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids `[B, T]` as a pipeline makes them."""
    length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _normalisation(clip: nn.Module) -> Any:
    """Of an open_clip model what it was made with, else OpenAI's."""
    known = getattr(getattr(clip, "visual", None), "preprocess_cfg", None) or {}
    return (known["mean"], known["std"]) if known.keys() >= {"mean", "std"} else OPENAI


def _processor_normalisation(name: str) -> Any:
    """Of a transformers CLIP what its image processor says; None if there is none."""
    if not name.startswith("hf:"):
        return None
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name.removeprefix("hf:"))
    except (OSError, ValueError):
        return None
    return processor.image_mean, processor.image_std


def _text_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of a text encoder, below its adapters, by the names that a `CLIPModel` of any transformers has for them."""
    named = {name.replace(".base_layer.", "."): p for name, p in base_parameters(encoder).items()}
    named = {name.removeprefix("text_model."): p for name, p in named.items()}
    return {name if name.startswith("text_projection") else f"text_model.{name}": p for name, p in named.items()}


def _matching(clip: Any, pipeline: Any) -> str:
    """Which text encoder has the CLIP's text weights, bit for bit at its own precision, but for a few that were edited since."""
    own = plain_parameters(clip)
    wrong = []
    for name, (encoder, _) in text_encoders(pipeline).items():
        theirs = {key: p for key, p in _text_tensors(encoder).items() if p.ndim > 1}  # vectors often are all 0 or 1
        odd = [key for key, p in theirs.items() if key not in own or not _is_same(p, own[key])]
        fits = all(key in own and own[key].shape == p.shape for key, p in theirs.items())
        if fits and len(odd) < len(theirs) / 2:
            return name
        wrong.append(f"{name} in {odd[0]} and {len(odd) - 1} more of {len(theirs)} matrices")
    raise UnlearnError(
        f"clip: its text tower is not the pipeline's: they differ in {'; '.join(wrong)}. Give the CLIP that the text encoder was "
        'taken from (Stable Diffusion 1: "hf:openai/clip-vit-large-patch14"), or objective="denoising"'
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bitwise_equal(one, other.to(one.device, one.dtype))

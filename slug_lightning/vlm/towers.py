"""The vision tower of a vision-language model, and the CLIP or SigLIP that it was taken from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from slug_lightning.clip.models import SourceClip, encode_image, encode_text, load_clip, to_hugging_face
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.vlm.prompts import QuestionEncoder, as_pil

FEW = 4
"""Matrices that may differ from the CLIP's: those of one edit. For a large tower, a tenth."""
PARTS = ("early", "middle", "late")
BLOCK = re.compile(r"(.*?\.)(\d+)\.")
"""The prefix of a block's tensor names, with the block's number."""
NAMES = ("vision_tower", "vision_model", "visual")
"""The tower's name in transformers: in LLaVA and PaliGemma, in Idefics3 and SmolVLM, in Qwen-VL."""


def vision_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the vision tower of a model, with its name; refuse a model that has none under a known name."""
    for name, module in model.named_modules():  # outer modules first
        if name.rpartition(".")[2] in NAMES:
            return name, module
    raise UnlearnError(
        f"model: {type(model).__name__} has no vision tower ({', '.join(NAMES)}); give an image-text-to-text model"
    )


def image_features(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Compute what the language model reads of the pictures in `inputs`: tensors whose last dimension is a token's features."""
    extract = getattr(model, "get_image_features", None) or model.model.get_image_features
    own = inspect.signature(extract).parameters.keys() | inspect.signature(model.model.get_image_features).parameters.keys()
    found = extract(**{name: tensor for name, tensor in inputs.items() if name in own})
    found = getattr(found, "pooler_output", found)  # transformers 5 returns the tower's output object
    return [found] if isinstance(found, Tensor) else list(found)


def by_depth(tower: nn.Module) -> dict[str, list[str]]:
    """Divide the blocks of a tower into three parts of equal depth, as patterns of tensor names; other tensors are in none."""
    found: dict[str, dict[str, int]] = {}
    for name, _ in tower.named_parameters():
        if match := BLOCK.match(name):
            found.setdefault(match[1], {})[match[0]] = int(match[2])
    numbers = max(found.values(), key=len, default={})  # a projector has a few numbers of its own
    blocks = sorted(numbers, key=numbers.__getitem__)
    if len(blocks) < len(PARTS):
        return {}
    return {
        part: [f"{block}*" for i, block in enumerate(blocks) if i * len(PARTS) // len(blocks) == number]
        for number, part in enumerate(PARTS)
    }


def freeze_unseen(model: Any, tower: nn.Module, encoder: QuestionEncoder) -> None:
    """Set `requires_grad` for those tensors of the tower that the language model's input depends on, and for nothing else.

    LLaVA reads the last layer but one; the gradient of a CLIP's own loss knows the last one too, whose edit would change no
    answer.
    """
    if getattr(encoder.processor, "patch_size", 0) is None:  # as those of old LLaVA checkpoints
        raise UnlearnError(
            "processor: without a patch_size it cannot reserve tokens for a picture; set its patch_size, "
            "vision_feature_select_strategy and num_additional_image_tokens (1 with a class token) as in the model's config"
        )
    model.requires_grad_(False)
    matrices = [p for p in tower.parameters() if p.is_floating_point()]
    for p in matrices:
        p.requires_grad_(True)
    size = getattr(model.config.vision_config, "image_size", None) or 224
    side = size if isinstance(size, int) else max(size)
    with _without_tiles(encoder.processor.image_processor):
        blank = encoder.ask(torch.zeros(1, 3, side, side, dtype=torch.uint8), ["?"])
    blank = {name: t.to(matrices[0].device, matrices[0].dtype if t.is_floating_point() else None) for name, t in blank.items()}
    with torch.enable_grad():
        features = image_features(model, blank)
        tokens, made = int((blank["input_ids"] == encoder.image_token).sum()), sum(f.numel() // f.shape[-1] for f in features)
        if tokens != made:
            raise UnlearnError(
                f"processor: it reserves {tokens} tokens for a picture, and the tower computes {made} features; its patch_size, "
                "vision_feature_select_strategy and num_additional_image_tokens must be those of the model"
            )
        seen = _leaves(features)
    for p in matrices:
        p.requires_grad_(id(p) in seen)


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """Find the ids of the parameters that tensors were computed from, without a backward pass."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    visited: set[Any] = {None}
    while waiting:
        if (node := waiting.pop()) not in visited:
            visited.add(node)
            waiting += [behind for behind, _ in node.next_functions]
    return {id(node.variable) for node in visited if hasattr(node, "variable")}  # AccumulateGrad nodes


@contextmanager
def _without_tiles(image_processor: Any) -> Iterator[None]:
    """Keep pictures in one piece, where Idefics3 would also make tiles: the tower reads both in the same way."""
    splitting = getattr(image_processor, "do_image_splitting", None)
    try:
        if splitting is not None:
            image_processor.do_image_splitting = False
        yield
    finally:
        if splitting is not None:
            image_processor.do_image_splitting = splitting


class VisionSourceClip(SourceClip):
    """The CLIP or SigLIP that a vision tower comes from, which from now on sees with the tower's own tensors.

    It is named as `slug_lightning.clip.models.load_clip` takes it. The model's image processor preprocesses pictures for it; if
    that makes tiles or another size, pictures are resized to a square and normalised by its mean and deviation instead.
    """

    def __init__(self, name: str, tower: nn.Module, image_processor: Any) -> None:
        clip, tokenizer = load_clip(name)
        of_tower = next(tower.parameters())
        # In training mode, as Lightning expects; we set evaluation mode ourselves.
        twin = to_hugging_face(clip).train().to(of_tower.device, of_tower.dtype)
        super().__init__(twin, image_processor.image_mean, image_processor.image_std)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        _share(name, self.model.vision_model, tower)

    def encode_image(self, pictures: Any) -> Tensor:
        """Image features, `[B, D]`, of uint8 pictures, each `[3, H, W]`."""
        seen = self.image_processor(as_pil(pictures), return_tensors="pt")["pixel_values"]
        if seen.shape[1:] != (3, self.size, self.size):
            size = (self.size, self.size)
            resized = [interpolate(p[None].float(), size, mode="bicubic", antialias=True) for p in pictures]
            seen = (torch.cat(resized).to(self.mean.device).clamp(0, 255) / 255 - self.mean) / self.deviation
        return encode_image(self.model, seen.to(self.mean.device, self.model.dtype))

    def encode_text(self, texts: Any) -> Tensor:
        """Text features, `[B, D]`."""
        return encode_text(self.model, self.tokenizer(list(texts)).to(self.mean.device))


def _share(name: str, own: nn.Module, tower: nn.Module) -> None:
    """Replace the tensors of a CLIP's image tower by those of the model's tower.

    Their matrices must have the same names, shapes and bits, except for a few that may have been edited since.
    """
    theirs = {key.removeprefix("vision_model."): p for key, p in tower.named_parameters()}
    held = dict(own.named_parameters())
    matrices = [key for key, p in theirs.items() if p.ndim > 1]  # vectors often are all 0 or 1
    fits = all(key in held and held[key].shape == theirs[key].shape for key in matrices)
    odd = [key for key in matrices if key not in held or not _same_when_rounded(theirs[key], held[key])]
    if not matrices or not fits or len(odd) > max(FEW, len(matrices) // 10):
        raise UnlearnError(
            f"clip: the vision tower, a {type(tower).__name__}, is not that of {name}: they differ in {len(odd)} of "
            f"{len(matrices)} matrices, such as {odd[:1]}. Give the CLIP or SigLIP that it was taken from; if there is none, or "
            "the tower was trained since, use objective='answers'"
        )
    for key, p in theirs.items():
        if key in held:
            parent, _, last = key.rpartition(".")
            setattr(own.get_submodule(parent), last, p)


def _same_when_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, or would be if the second had also been saved in 16 bits."""
    return any(bitwise_equal(one, other.to(saved).to(one.dtype)) for saved in (one.dtype, torch.float16, torch.bfloat16))

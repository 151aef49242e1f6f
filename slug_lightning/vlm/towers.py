"""The part of a vision-language model that sees, and the CLIP or SigLIP that it comes from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slug_lightning.clip.models import encode_image, encode_text, load_clip, to_hugging_face
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.vlm.prompts import Prompts, as_pil

FEW = 4
"""Matrices that may differ from the CLIP's: those of one edit. Of a large tower, a tenth."""
PARTS = ("early", "middle", "late")
BLOCK = re.compile(r"(.*?\.)(\d+)\.")
"""What the names of a block's tensors begin with, and its number."""
NAMES = ("vision_tower", "vision_model", "visual")
"""What transformers calls the tower: in LLaVA and PaliGemma, in Idefics3 and SmolVLM, in Qwen-VL."""


def vision_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """The tower of a vision-language model, with its name in it.

    Raises:
        UnlearnError: if it has none under a name that is known.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> from slug_lightning.embedded import VLM
        >>> name, tower = vision_tower(AutoModelForImageTextToText.from_pretrained(VLM))
        >>> name, type(tower).__name__
        ('model.vision_tower', 'CLIPVisionModel')
    """
    for name, module in model.named_modules():  # outer modules first
        if name.rpartition(".")[2] in NAMES:
            return name, module
    raise UnlearnError(
        f"model: {type(model).__name__} has no vision tower ({', '.join(NAMES)}); give an image-text-to-text model"
    )


def image_features(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What the language model gets of the pictures in `inputs`: tensors whose last dimension is one token's features."""
    extract = getattr(model, "get_image_features", None) or model.model.get_image_features
    own = inspect.signature(extract).parameters.keys() | inspect.signature(model.model.get_image_features).parameters.keys()
    found = extract(**{name: tensor for name, tensor in inputs.items() if name in own})
    found = getattr(found, "pooler_output", found)  # transformers 5 gives the tower's output object
    return [found] if isinstance(found, Tensor) else list(found)


def by_depth(tower: nn.Module) -> dict[str, list[str]]:
    """The blocks of a tower in three parts of equal depth, as patterns of tensor names; what is in no block is in no part.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> from slug_lightning.embedded import VLM
        >>> _, tower = vision_tower(AutoModelForImageTextToText.from_pretrained(VLM))
        >>> by_depth(tower)["late"]
        ['encoder.layers.4.*', 'encoder.layers.5.*']
    """
    found: dict[str, dict[str, int]] = {}
    for name, _ in tower.named_parameters():
        if match := BLOCK.match(name):
            found.setdefault(match[1], {})[match[0]] = int(match[2])
    numbers = max(found.values(), key=len, default={})  # what joins blocks to the language model has a few numbers of its own
    blocks = sorted(numbers, key=numbers.__getitem__)
    if len(blocks) < len(PARTS):
        return {}
    return {
        part: [f"{block}*" for i, block in enumerate(blocks) if i * len(PARTS) // len(blocks) == number]
        for number, part in enumerate(PARTS)
    }


def freeze_unseen(model: Any, tower: nn.Module, prompts: Prompts) -> None:
    """Let only those tensors of the tower be edited that the language model gets to see, and nothing else of the model.

    LLaVA reads the last layer but one; the gradient of a CLIP's own loss knows the last one too, whose edit would change no
    answer.

    Args:
        model: the vision-language model; afterwards `requires_grad` is true of the tensors that may be edited.
        tower: its vision tower.
        prompts: how it is asked.

    Raises:
        UnlearnError: if the processor makes another number of tokens for a picture than the tower makes features, or cannot
            know how many these are.
    """
    if getattr(prompts.processor, "patch_size", 0) is None:  # as those of old LLaVA checkpoints
        raise UnlearnError(
            "processor: it has no patch_size, so that it cannot keep tokens for a picture; set its patch_size, "
            "vision_feature_select_strategy and num_additional_image_tokens (1 with a class token) as in the model's config"
        )
    model.requires_grad_(False)
    matrices = [p for p in tower.parameters() if p.is_floating_point()]
    for p in matrices:
        p.requires_grad_(True)
    size = getattr(model.config.vision_config, "image_size", None) or 224
    side = size if isinstance(size, int) else max(size)
    with _in_one_piece(prompts.processor.image_processor):
        blank = prompts.ask(torch.zeros(1, 3, side, side, dtype=torch.uint8), ["?"])
    blank = {name: t.to(matrices[0].device, matrices[0].dtype if t.is_floating_point() else None) for name, t in blank.items()}
    with torch.enable_grad():
        features = image_features(model, blank)
        tokens, made = int((blank["input_ids"] == prompts.image_token).sum()), sum(f.numel() // f.shape[-1] for f in features)
        if tokens != made:
            raise UnlearnError(
                f"processor: it keeps {tokens} tokens for a picture of which the tower makes {made} features; its patch_size, "
                "vision_feature_select_strategy and num_additional_image_tokens must be those of the model"
            )
        seen = _leaves(features)
    for p in matrices:
        p.requires_grad_(id(p) in seen)


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The identities of the parameters that tensors were computed from, without a backward pass."""
    waiting = [tensor.grad_fn for tensor in tensors]
    visited: set[Any] = set()
    found: set[int] = set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):  # where a gradient is accumulated
            found.add(id(node.variable))
        waiting += [behind for behind, _ in node.next_functions]
    return found


@contextmanager
def _in_one_piece(image_processor: Any) -> Iterator[None]:
    """Have no picture cut into tiles, as Idefics3 does, which see as the whole picture does."""
    cuts = getattr(image_processor, "do_image_splitting", None)
    if cuts is not None:
        image_processor.do_image_splitting = False
    try:
        yield
    finally:
        if cuts is not None:
            image_processor.do_image_splitting = cuts


class SourceClip(nn.Module):
    """The CLIP or SigLIP that a tower comes from, which sees by the tower's own tensors from now on.

    It is what `matching_loss` and `contrastive_loss` take, so that the gradient of a CLIP's loss lands in the tensors of the
    vision-language model.

    Args:
        name: of the CLIP, as `slug_lightning.clip.models.load_clip` takes it: "hf:openai/clip-vit-large-patch14-336",
            "local-dir:…".
        tower: the vision tower of a vision-language model.
        image_processor: of that model: it makes what the CLIP sees, or if it makes tiles or another size, pictures are resized to
            a square and normalised as it says.

    Raises:
        UnlearnError: if the tower has not a CLIP's or SigLIP's layers, or not those of this one: their names and shapes, and
            the bits of all but a few matrices (which may have been edited since).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, tower: nn.Module, image_processor: Any) -> None:
        super().__init__()
        clip, self.tokenizer = load_clip(name)
        twin: Any = to_hugging_face(clip) if hasattr(clip, "visual") else clip
        of_tower = next(tower.parameters())
        # In training mode, as Lightning expects; we set evaluation mode ourselves.
        self.model = twin.requires_grad_(False).train().to(of_tower.device, of_tower.dtype)
        _share(name, self.model.vision_model, tower)
        self.size = int(twin.config.vision_config.image_size)
        self.image_processor = image_processor
        for key, value in (("mean", image_processor.image_mean), ("deviation", image_processor.image_std)):
            self.register_buffer(key, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_image(self, pictures: Any) -> Tensor:
        """Image features, `[B, D]`, of uint8 pictures, each `[3, H, W]`."""
        seen = self.image_processor(as_pil(pictures), return_tensors="pt")["pixel_values"]
        if seen.shape[1:] != (3, self.size, self.size):
            size = (self.size, self.size)
            resized = [torch.nn.functional.interpolate(p[None].float(), size, mode="bicubic", antialias=True) for p in pictures]
            seen = (torch.cat(resized).to(self.mean.device).clamp(0, 255) / 255 - self.mean) / self.deviation
        return encode_image(self.model, seen.to(self.mean.device, self.model.dtype))

    def encode_text(self, texts: Any) -> Tensor:
        """Text features, `[B, D]`."""
        return encode_text(self.model, self.tokenizer(list(texts)).to(self.mean.device))


def _share(name: str, own: nn.Module, tower: nn.Module) -> None:
    """Put the tower's tensors in place of those of a CLIP's image tower, if they are the same."""
    theirs = {key.removeprefix("vision_model."): p for key, p in tower.named_parameters()}
    held = dict(own.named_parameters())
    matrices = [key for key, p in theirs.items() if p.ndim > 1]  # vectors often are all 0 or 1
    unknown = [key for key in matrices if key not in held]
    if unknown or not matrices:
        raise UnlearnError(
            f"clip: the vision tower, a {type(tower).__name__}, has not a CLIP's or SigLIP's layers (such as "
            f"{(unknown or ['no matrix'])[0]}); use route='answers', which needs no CLIP"
        )
    odd = [key for key in matrices if held[key].shape != theirs[key].shape or not _rounded_alike(theirs[key], held[key])]
    if any(held[key].shape != theirs[key].shape for key in matrices) or len(odd) > max(FEW, len(matrices) // 10):
        raise UnlearnError(
            f"clip: the vision tower is not that of {name}: they differ in {odd[0]} and {len(odd) - 1} more of {len(matrices)} "
            "matrices. Give the CLIP or SigLIP that it was taken from; where the tower was trained on since, use route='answers'"
        )
    for key, p in theirs.items():
        if key in held:
            parent, _, last = key.rpartition(".")
            setattr(own.get_submodule(parent), last, p)


def _rounded_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, but that the first may have been kept in 16 bits for a while."""
    return any(bitwise_equal(one, other.to(kept).to(one.dtype)) for kept in (one.dtype, torch.float16, torch.bfloat16))

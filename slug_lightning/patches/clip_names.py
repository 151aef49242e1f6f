"""One CLIP under the names of two libraries: where each keeps which weights, and patches carried from one to the other.

A ViT CLIP holds the same numbers in open_clip and in transformers, but transformers keeps q, k and v apart, which
open_clip keeps in one `in_proj_weight`, `[3D, D]`, and keeps its two projections as linear layers, transposed. `TABLE` is
the whole map, `DIALECTS` is how the names begin, by the model that holds them. What is not in the table (ResNets, timm
towers, layer scale, attention pooling) has no counterpart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.edit import Edit, P
from slug_lightning.tensors.dtensor import whole

NUMBER = re.compile(r"\.(\d+)\.")


class Place(NamedTuple):
    """Where a tensor of transformers is kept: in which tensor, in which third of its rows, and whether transposed."""

    name: str
    third: int | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that is meant, as transformers shapes it, sharing its memory.

        Example:
            >>> Place("visual.transformer.resblocks.0.attn.in_proj_bias", third=1).of(torch.arange(6))
            tensor([2, 3])
        """
        part = tensor if self.third is None else torch.atleast_1d(tensor).tensor_split(3)[self.third]
        return part.transpose(0, -1) if self.transposed else part


def _table() -> dict[str, Place]:
    table = {
        "logit_scale": Place("logit_scale"),
        "visual_projection.weight": Place("visual.proj", transposed=True),
        "text_projection.weight": Place("text.text_projection", transposed=True),
        "vision_model.embeddings.class_embedding": Place("visual.class_embedding"),
        "vision_model.embeddings.patch_embedding.weight": Place("visual.conv1.weight"),
        "vision_model.embeddings.position_embedding.weight": Place("visual.positional_embedding"),
        "text_model.embeddings.token_embedding.weight": Place("text.token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": Place("text.positional_embedding"),
    }
    pairs = {
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "text.ln_final",
    }
    for theirs, ours in (("vision_model", "visual"), ("text_model", "text")):
        layer, block = f"{theirs}.encoder.layers.#", f"{ours}.transformer.resblocks.#"
        pairs |= {
            f"{layer}.layer_norm1": f"{block}.ln_1",
            f"{layer}.layer_norm2": f"{block}.ln_2",
            f"{layer}.self_attn.out_proj": f"{block}.attn.out_proj",
            f"{layer}.mlp.fc1": f"{block}.mlp.c_fc",
            f"{layer}.mlp.fc2": f"{block}.mlp.c_proj",
        }
        for kind in ("weight", "bias"):
            for third, letter in enumerate("qkv"):
                table[f"{layer}.self_attn.{letter}_proj.{kind}"] = Place(f"{block}.attn.in_proj_{kind}", third)
    return table | {f"{one}.{kind}": Place(f"{other}.{kind}") for one, other in pairs.items() for kind in ("weight", "bias")}


TABLE = _table()
"""Name in transformers' `CLIPModel`, `#` for the number of a layer -> place in open_clip's `CustomTextCLIP`."""


class Dialect(NamedTuple):
    """How one kind of model names its tensors: the library, and what the names begin with in place of the table's."""

    open_clip: bool
    begins: dict[str, str]


DIALECTS = (
    Dialect(True, {"logit_scale": "logit_scale", "visual.": "visual.", "text.": ""}),  # CLIP
    Dialect(True, {"logit_scale": "logit_scale", "visual.": "visual.", "text.": "text."}),  # CustomTextCLIP
    Dialect(True, {"visual.": ""}),  # VisionTransformer
    # CLIPModel, and either tower with its projection; before transformers 5 each tower, also in a LLaVA
    Dialect(False, {name: name for name in ("logit_scale", "visual_p", "text_p", "vision_model.", "text_model.")}),
    Dialect(False, {"vision_model.": ""}),  # CLIPVisionModel, also as the vision_tower of a LLaVA
    Dialect(False, {"text_model.": ""}),  # CLIPTextModel, also as the text_encoder of a pipeline
)
VISION = ("visual.", "vision_model.", "vision_tower.", "image_encoder.")
TEXT = ("text.", "text_model.", "text_encoder.", "text_encoder_2.")
"""What a tower stands under, where that says which tower it is; the layers of both have the same names."""


def translations(patch: P, held: Mapping[str, Tensor]) -> Iterator[P]:
    """Give a patch under the names, in the shapes and in the orientation of another model of the same weights.

    A patch of one of q, k and v becomes one of the fused tensor: the other rows of its base are those that `held` has, and
    their direction is a zero of the sign that leaves every number as it is, -0.0 too (at a strength of at least 0).
    Elementwise arithmetic commutes with splitting, fusing and transposing, so that both models have the same bits after
    the edit.

    Args:
        patch: of a ViT CLIP in open_clip or transformers, of one of its towers, or of a model that holds it, as LLaVA does.
        held: the tensors of such a model, by name, without this patch or with it.

    Yields:
        A patch for each place in `held` where names and shapes fit, its names being those of `held`; most often one. Its
        base is of the patch's dtype and on its device, and is not compared with `held`, as only bits tell whether these
        are the same weights: `UnlearnPatch.apply` looks.

    Example:
        >>> from slug_lightning.patches.edit import Edit
        >>> from slug_lightning.patches.patch import UnlearnPatch
        >>> name = "vision_model.encoder.layers.0.self_attn.q_proj.bias"
        >>> patch = UnlearnPatch({name: torch.tensor([1.0])}, [Edit("cats", 0.5, {name: torch.tensor([2.0])})])
        >>> held = {"visual.transformer.resblocks.0.attn.in_proj_bias": torch.tensor([1.0, 7.0, 8.0])}
        >>> (other,) = translations(patch, held)
        >>> other.base
        {'visual.transformer.resblocks.0.attn.in_proj_bias': tensor([1., 7., 8.])}
        >>> other.edits[0].directions
        {'visual.transformer.resblocks.0.attn.in_proj_bias': tensor([2., -0., -0.])}
    """
    numbers = _numbers(patch.base)
    seen: list[dict[Place, Place]] = []
    for source in _readings(patch.base, numbers):
        for dialect in DIALECTS:
            for prefix in _prefixes(held, next(iter(source)), _places(dialect, "", numbers)):
                target = _places(dialect, prefix, numbers)
                ways = {place: target[key] for key, place in source.items() if key in target and target[key].name in held}
                if len(ways) < len(source) or ways in seen:
                    continue
                if all(_shape(patch.base, one) == _shape(held, other) for one, other in ways.items()):
                    seen.append(ways)
                    yield _carried(patch, ways, held)


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and transpose the tensors of an open_clip `CLIP` into those of a `CLIPModel`, sharing their memory.

    Raises:
        UnlearnError: if a tensor has no counterpart.

    Example:
        >>> to_transformers({"visual.proj": torch.ones(3, 2)})["visual_projection.weight"].shape
        torch.Size([2, 3])
    """
    places = _places(DIALECTS[0], "", _numbers(tensors))
    if unknown := tensors.keys() - {place.name for place in places.values()}:
        raise UnlearnError(f"model: {min(unknown)} has no counterpart in transformers' CLIPModel")
    return {key: place.of(tensors[place.name]) for key, place in places.items() if place.name in tensors}


def _numbers(names: Iterable[str]) -> list[str]:
    """The numbers of layers in names; one that no layer has where there are none."""
    return sorted({number for name in names for number in NUMBER.findall(name)}) or ["#"]


def _places(dialect: Dialect, prefix: str, numbers: Iterable[str]) -> dict[str, Place]:
    """Where a model of a dialect, standing under a prefix, would keep each tensor of the table."""
    places = {}
    for key, place in TABLE.items():
        home = place.name if dialect.open_clip else key
        begin = next((begin for begin in dialect.begins if home.startswith(begin)), None)
        if begin is None or (prefix + dialect.begins[begin]).endswith(TEXT if begin.startswith("vis") else VISION):
            continue
        name = prefix + dialect.begins[begin] + home.removeprefix(begin)
        for number in numbers:
            found = name.replace("#", number)
            places[key.replace("#", number)] = place._replace(name=found) if dialect.open_clip else Place(found)
    return places


def _readings(names: Iterable[str], numbers: list[str]) -> list[dict[str, Place]]:
    """What the tensors of a patch are, by their names: one reading, or one for each tower that they may be of."""
    names = set(names)
    parts = min(names).split(".")
    found: list[dict[str, Place]] = []
    for dialect in DIALECTS:
        for cut in range(len(parts)):
            prefix = "".join(part + "." for part in parts[:cut])
            reading = {key: place for key, place in _places(dialect, prefix, numbers).items() if place.name in names}
            if {place.name for place in reading.values()} == names and reading not in found:
                found.append(reading)
    return found


def _prefixes(held: Iterable[str], key: str, places: Mapping[str, Place]) -> list[str]:
    """What stands before the name of a tensor wherever it is held, the one nearest the root first."""
    if key not in places:
        return []
    end = places[key].name
    return sorted({name.removesuffix(end) for name in held if f".{name}".endswith(f".{end}")}, key=lambda p: (len(p), p))


def _shape(tensors: Mapping[str, Tensor], place: Place) -> torch.Size:
    return place.of(torch.empty(tensors[place.name].shape, device="meta")).shape


def _carried(patch: P, ways: Mapping[Place, Place], held: Mapping[str, Tensor]) -> P:
    """The patch with every part of a tensor at its other place."""

    def carry(tensors: Mapping[str, Tensor], rest: float | None) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for one, other in ways.items():
            if one.name in tensors:
                tensor, like = tensors[one.name], held[other.name]
                if other.name not in made:
                    made[other.name] = torch.empty(like.shape, dtype=tensor.dtype, device=tensor.device)
                    made[other.name].copy_(whole(like)) if rest is None else made[other.name].fill_(rest)
                other.of(made[other.name]).copy_(one.of(tensor))
        return made

    # x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0.
    def none(edit: Edit) -> float:
        return math.copysign(0.0, -edit.step * edit.strength)

    edits = [replace(e, directions=carry(e.directions, none(e)), origin=e.digest) for e in patch.edits]
    return replace(patch, base=carry(patch.base, None), edits=edits)

"""The names of one CLIP in two libraries, and patches carried from one to the other.

A ViT CLIP holds the same numbers in open_clip and in transformers, but transformers keeps q, k and v apart, which
open_clip keeps in one `in_proj_weight`, `[3D, D]`, and keeps its two projections as linear layers, transposed. `TABLE` is
the whole map; `DIALECTS` says how the names begin, by the model that holds the tensors. What is not in the table (ResNets,
timm towers, layer scale, attention pooling) has no counterpart.
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


class Slot(NamedTuple):
    """Where a tensor of transformers is stored: in which tensor, in which third of its rows, and whether transposed."""

    name: str
    third: int | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stored part of `tensor`, as transformers shapes it, sharing its memory."""
        part = tensor if self.third is None else torch.atleast_1d(tensor).tensor_split(3)[self.third]
        return part.transpose(0, -1) if self.transposed else part


def _table() -> dict[str, Slot]:
    table = {
        "logit_scale": Slot("logit_scale"),
        "visual_projection.weight": Slot("visual.proj", transposed=True),
        "text_projection.weight": Slot("text.text_projection", transposed=True),
        "vision_model.embeddings.class_embedding": Slot("visual.class_embedding"),
        "vision_model.embeddings.patch_embedding.weight": Slot("visual.conv1.weight"),
        "vision_model.embeddings.position_embedding.weight": Slot("visual.positional_embedding"),
        "text_model.embeddings.token_embedding.weight": Slot("text.token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": Slot("text.positional_embedding"),
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
                table[f"{layer}.self_attn.{letter}_proj.{kind}"] = Slot(f"{block}.attn.in_proj_{kind}", third)
    return table | {f"{one}.{kind}": Slot(f"{other}.{kind}") for one, other in pairs.items() for kind in ("weight", "bias")}


TABLE = _table()
"""Name in transformers' `CLIPModel`, with `#` for the number of a layer -> slot in open_clip's `CustomTextCLIP`."""


class Dialect(NamedTuple):
    """How one kind of model names its tensors: the library, and how the names begin instead of as in the table."""

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
"""Prefixes that say which tower it is; the layers of both have the same names."""


def translations(patch: P, tensors: Mapping[str, Tensor]) -> Iterator[P]:
    """Translate a patch into the names, shapes and orientation of another model of the same weights.

    A patch of one of q, k and v becomes one of the fused tensor: the other rows of its base are those of `tensors`, and
    their direction is a zero of the sign that leaves every number as it is, -0.0 too (at a strength of at least 0).
    Elementwise arithmetic commutes with splitting, fusing and transposing, so that both models have the same bits after
    the edit.

    `patch` may be of a ViT CLIP, of one of its towers, or of a model that holds it, as LLaVA does; `tensors` are those of
    such a model, with this patch or without it. Gives a patch for each part where names and shapes fit, most often one. Its
    base has the patch's dtype and device, and is not compared with `tensors`: `UnlearnPatch.apply` does that.
    """
    numbers = _numbers(patch.base)
    seen: list[dict[Slot, Slot]] = []
    for source in _readings(patch.base, numbers):
        for dialect in DIALECTS:
            for prefix in _prefixes(tensors, next(iter(source)), _slots(dialect, "", numbers)):
                target = _slots(dialect, prefix, numbers)
                ways = {slot: target[key] for key, slot in source.items() if key in target and target[key].name in tensors}
                if len(ways) < len(source) or ways in seen:
                    continue
                if all(_shape(patch.base, one) == _shape(tensors, other) for one, other in ways.items()):
                    seen.append(ways)
                    yield _carried(patch, ways, tensors)


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and transpose the tensors of an open_clip `CLIP` into those of a `CLIPModel`, sharing their memory."""
    slots = _slots(DIALECTS[0], "", _numbers(tensors))
    if unknown := tensors.keys() - {slot.name for slot in slots.values()}:
        raise UnlearnError(f"model: {min(unknown)} has no counterpart in transformers' CLIPModel")
    return {key: slot.of(tensors[slot.name]) for key, slot in slots.items() if slot.name in tensors}


def _numbers(names: Iterable[str]) -> list[str]:
    """The numbers of layers in names; where there are none, one that no layer has."""
    return sorted({number for name in names for number in re.findall(r"\.(\d+)\.", name)}) or ["#"]


def _slots(dialect: Dialect, prefix: str, numbers: Iterable[str]) -> dict[str, Slot]:
    """Where a model of a dialect, standing under a prefix, would store each tensor of the table."""
    slots = {}
    for key, slot in TABLE.items():
        home = slot.name if dialect.open_clip else key
        begin = next((begin for begin in dialect.begins if home.startswith(begin)), None)
        if begin is None or (prefix + dialect.begins[begin]).endswith(TEXT if begin.startswith("vis") else VISION):
            continue
        name = prefix + dialect.begins[begin] + home.removeprefix(begin)
        for number in numbers:
            found = name.replace("#", number)
            slots[key.replace("#", number)] = slot._replace(name=found) if dialect.open_clip else Slot(found)
    return slots


def _readings(names: Iterable[str], numbers: list[str]) -> list[dict[str, Slot]]:
    """What the tensors of a patch are, by their names: one reading, or one for each tower that they may belong to."""
    names = set(names)
    parts = min(names).split(".")
    found: list[dict[str, Slot]] = []
    for dialect in DIALECTS:
        for cut in range(len(parts)):
            prefix = "".join(part + "." for part in parts[:cut])
            reading = {key: slot for key, slot in _slots(dialect, prefix, numbers).items() if slot.name in names}
            if {slot.name for slot in reading.values()} == names and reading not in found:
                found.append(reading)
    return found


def _prefixes(names: Iterable[str], key: str, slots: Mapping[str, Slot]) -> list[str]:
    """What stands before the name of a tensor wherever it occurs, the one nearest the root first."""
    if key not in slots:
        return []
    end = slots[key].name
    return sorted({name.removesuffix(end) for name in names if f".{name}".endswith(f".{end}")}, key=lambda p: (len(p), p))


def _shape(tensors: Mapping[str, Tensor], slot: Slot) -> torch.Size:
    return slot.of(torch.empty(tensors[slot.name].shape, device="meta")).shape


def _carried(patch: P, ways: Mapping[Slot, Slot], tensors: Mapping[str, Tensor]) -> P:
    """The patch with every part of a tensor in its other slot."""

    def carry(values: Mapping[str, Tensor], rest: float | None) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for one, other in ways.items():
            if one.name in values:
                value, like = values[one.name], tensors[other.name]
                if other.name not in made:
                    made[other.name] = torch.empty(like.shape, dtype=value.dtype, device=value.device)
                    made[other.name].copy_(whole(like)) if rest is None else made[other.name].fill_(rest)
                other.of(made[other.name]).copy_(one.of(value))
        return made

    def zero(edit: Edit) -> float:
        """Return a zero with the sign that changes nothing: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0."""
        return math.copysign(0.0, -edit.step * edit.strength)

    edits = [replace(e, directions=carry(e.directions, zero(e)), origin=e.digest) for e in patch.edits]
    return replace(patch, base=carry(patch.base, None), edits=edits)

"""Classifiers that tell what a drawn picture shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Union

import torch
from torch import Tensor, nn

from slug_lightning.diffusion.source_clip import TextSourceClip
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained

Judge = Union[str, Path, nn.Module, list[str]]
"""Name or folder of a transformers image classifier; a module from pictures in [-1, 1] to logits; or class names for a CLIP."""


class NamedClassifier(nn.Module):
    """A transformers image classifier with its own preprocessing: pictures `[B, 3, H, W]` in [-1, 1] -> logits `[B, C]`."""

    def __init__(self, name: Union[str, Path]) -> None:
        super().__init__()
        transformers = import_optional("transformers", "hf")
        self.processor = load_pretrained("judges", transformers.AutoImageProcessor, name)
        self.model = load_pretrained("judges", transformers.AutoModelForImageClassification, name).float()

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return list(self.model.config.id2label.values())

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.processor(list((pictures + 1) / 2), do_rescale=False, return_tensors="pt")
        return self.model(seen["pixel_values"].to(pictures.device)).logits


class ZeroShot(nn.Module):
    """The class whose name is nearest to a picture, by a frozen CLIP: pictures in [-1, 1] -> similarities `[B, C]`.

    Class names are read by the CLIP's own tensors, which no edit changes.
    """

    classes: Tensor

    def __init__(self, source: TextSourceClip, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self._source = [source]  # not a submodule, as the loss uses the same CLIP
        with torch.no_grad():
            self.register_buffer("classes", source(source.tokenize_classes(names)), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return self._source[0].encode_image(pictures) @ self.classes.T


def make_judges(judges: Mapping[str, Judge], clips: list[TextSourceClip]) -> nn.ModuleDict:
    """Make a frozen classifier for each kind of concept, such as "style"; the first CLIP judges where class names are given."""
    made = nn.ModuleDict()
    for kind, judge in judges.items():
        if isinstance(judge, nn.Module):
            made[kind] = judge
        elif isinstance(judge, (str, Path)):
            made[kind] = NamedClassifier(judge)
        elif clips:
            made[kind] = ZeroShot(clips[0], list(judge))
        else:
            raise UnlearnError(
                f"judges: {kind!r} has class names only, which need a CLIP to compare with; give clip=…, or a classifier"
            )
    return made.eval().requires_grad_(False)

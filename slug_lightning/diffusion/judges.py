"""Who tells what a drawn picture shows: classifiers that the user names or gives, or a CLIP by zero-shot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Union

from torch import Tensor, nn

from slug_lightning.diffusion.towers import Towers
from slug_lightning.errors import UnlearnError

Judge = Union[str, Path, nn.Module, list[str]]
"""Name or folder of a transformers image classifier; a module from pictures in [-1, 1] to logits; or class names for a CLIP."""


class NamedClassifier(nn.Module):
    """A transformers image classifier with its own preprocessing: pictures `[B, 3, H, W]` in [-1, 1] -> logits `[B, C]`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = AutoModelForImageClassification.from_pretrained(name).float()

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.processor(list((pictures + 1) / 2), do_rescale=False, return_tensors="pt")
        return self.model(seen["pixel_values"].to(pictures.device)).logits


class ZeroShot(nn.Module):
    """The class whose name is nearest to a picture, by a frozen CLIP: pictures in [-1, 1] -> similarities `[B, C]`."""

    classes: Tensor

    def __init__(self, towers: Towers, names: list[str]) -> None:
        super().__init__()
        self._towers = [towers]  # not a part of this module: the CLIP belongs to the objective, too
        self.register_buffer("classes", towers.classes(names), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return self._towers[0].encode_image(pictures) @ self.classes.T


def make_judges(judges: Mapping[str, Judge], towers: list[Towers]) -> nn.ModuleDict:
    """A frozen classifier for every kind of concept.

    Args:
        judges: by kind, such as "style".
        towers: CLIPs; the first one judges where only class names are given.

    Raises:
        UnlearnError: if there are only class names and no CLIP, or a classifier cannot be found.
    """
    made = nn.ModuleDict()
    for kind, judge in judges.items():
        if isinstance(judge, nn.Module):
            made[kind] = judge
        elif isinstance(judge, (str, Path)):
            try:
                made[kind] = NamedClassifier(str(judge))
            except (OSError, ValueError) as error:
                raise UnlearnError(
                    f"judges: no image classifier with its processor is found as {str(judge)!r}: {error}"
                ) from error
        elif towers:
            made[kind] = ZeroShot(towers[0], list(judge))
        else:
            raise UnlearnError(f"judges: {kind!r} has class names only, to be told by a CLIP; give clip=…, or a classifier")
    return made.eval().requires_grad_(False)

"""The embedded drawings of the same things by five vendors."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slug_lightning.embedded import SHARD, UNSEEN


class Drawings(NamedTuple):
    """The drawings of an embedded shard; names are sorted."""

    pictures: Tensor  # RGBA, uint8, [N, 4, 64, 64]
    things: Tensor  # index into thing_names, [N]
    styles: Tensor  # index into style_names, [N]
    thing_names: list[str]
    style_names: list[str]


def load_drawings() -> Drawings:
    """Read the drawings that the embedded CLIP was trained on.

    Example:
        >>> drawings = load_drawings()
        >>> len(drawings.thing_names), drawings.style_names
        (234, ['blob', 'emojione', 'firefox', 'fluent', 'noto'])
    """
    return _drawings(SHARD)


def load_unseen() -> Drawings:
    """Read drawings, in the same styles, of ten things that the embedded CLIP has never seen, by picture or by name.

    How fast it learns these says what to expect of a thing that it has truly forgotten. Its tokenizer has none of the ten
    names: each is the unknown word.

    Example:
        >>> unseen = load_unseen()
        >>> unseen.thing_names[:3], tuple(unseen.pictures.shape)
        (['anchor', 'banana', 'bell'], (50, 4, 64, 64))
    """
    return _drawings(UNSEEN)


def _drawings(path: Path) -> Drawings:
    pictures, labels = _decoded(path)
    thing_names = sorted({label["thing"] for label in labels})
    style_names = sorted({label["style"] for label in labels})
    return Drawings(
        pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        things=torch.tensor([thing_names.index(label["thing"]) for label in labels]),
        styles=torch.tensor([style_names.index(label["style"]) for label in labels]),
        thing_names=thing_names,
        style_names=style_names,
    )


@functools.cache
def _decoded(path: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """A shard's pictures, `[N, H, W, 4]`, and labels, cached as decoding takes most of a second."""
    from PIL import Image

    with tarfile.open(path) as shard:
        files = {entry.name: shard.extractfile(entry).read() for entry in shard if entry.isfile()}  # type: ignore[union-attr]
    keys = sorted(name.removesuffix(".png") for name in files if name.endswith(".png"))
    pictures = [np.asarray(Image.open(io.BytesIO(files[f"{key}.png"])).convert("RGBA")) for key in keys]
    return np.stack(pictures), [json.loads(files[f"{key}.json"]) for key in keys]

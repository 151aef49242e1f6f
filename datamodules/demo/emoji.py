"""The embedded drawings: five vendors' drawings of the same objects, rendered on the fly."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, StackDataset

from slug_lightning.datamodules.base import UnlearnDataModule, split_indices
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Batches, Split
from slug_lightning.utils.names import labelled

Names = Union[str, list[str], None]
NEAR: dict[Split, int] = {"val": 100, "test": 500}
"""At least so many renderings of what is near in each split."""
NEAR_SEED = 1_000_003
"""Renderings of what is near share no random numbers with the other sets."""


def render(pictures: Tensor, generator: torch.Generator, amount: float = 1.0) -> Tensor:
    """Render drawings: rotated, scaled and shifted, in varying light, on a plain background of random colour.

    The generator draws a rotation within ±25°, scale 0.7 to 1.1, shift within ±10 %, contrast 0.8 to 1.2, brightness ±0.1, noise
    of standard deviation 0.02, and any background colour. `amount`, in [0, 1], is that of variation: at 0 every drawing is
    upright, at scale 0.9, centered on white. From RGBA, uint8 `[B, 4, H, W]`, to RGB, float32 `[B, 3, H, W]`, normalised by mean
    0.5 and standard deviation 0.5, so in about [-1, 1].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(pictures), *shape, generator=generator) * (high - low) + low

    turn, size = uniform(-0.44 * amount, 0.44 * amount), uniform(0.7 + 0.2 * (1 - amount), 1.1 - 0.2 * (1 - amount))
    # affine_grid maps output to input coordinates, so the drawing's size is the inverse of the matrix's scale.
    matrix = torch.zeros(len(pictures), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = turn.cos() / size
    matrix[:, 0, 1], matrix[:, 1, 0] = -turn.sin() / size, turn.sin() / size
    matrix[:, :, 2] = uniform(-0.2 * amount, 0.2 * amount, 2)
    rgba = pictures.float() / 255
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)  # else dark fringes where alpha is 0
    grid = torch.nn.functional.affine_grid(matrix, list(premultiplied.shape), align_corners=False)
    warped = torch.nn.functional.grid_sample(premultiplied, grid, align_corners=False)
    ground = uniform(1.0 - amount, 1.0, 3, 1, 1)
    image = warped[:, :3] + (1 - warped[:, 3:]) * ground
    contrast = uniform(1.0 - 0.2 * amount, 1.0 + 0.2 * amount, 1, 1, 1)
    light = uniform(-0.1 * amount, 0.1 * amount, 1, 1, 1)
    image = (image - 0.5) * contrast + 0.5 + light
    image = image + 0.02 * amount * torch.randn(image.shape, generator=generator)
    return (image - 0.5) / 0.5


def emoji_pairs(drawings: Drawings, rows: Tensor, generator: torch.Generator, *, thing: bool, style: bool) -> Dataset:
    """Render some drawings, captioned by object, by style, or by both, as `ClipModule` expects its samples.

    A sample is a dict: "image", `[3, 64, 64]`; "text", tokens `[T]`; "thing" and "style", the index, or -1 if not asked;
    "shown_thing" and "shown_style", the index in any case, of which other wordings are made.
    A row that is listed twice is rendered twice.
    """
    import open_clip

    captions = [caption_of(drawings, int(row), thing, style) for row in rows]
    none = torch.full_like(rows, -1)
    columns: dict[str, Any] = {
        "image": torch.cat([render(drawings.pictures[part], generator) for part in rows.split(256)]),
        "text": open_clip.get_tokenizer(f"local-dir:{CLIP}")(captions),
        "thing": drawings.things[rows] if thing else none,
        "style": drawings.styles[rows] if style else none,
        "shown_thing": drawings.things[rows],
        "shown_style": drawings.styles[rows],
    }
    return StackDataset(**columns)


def caption_of(drawings: Drawings, row: int, thing: bool = True, style: bool = True) -> str:
    """Return the caption of a drawing: its object, its style, or both, as "airplane in blob style"."""
    what = drawings.thing_names[int(drawings.things[row])]
    how = f"{drawings.style_names[int(drawings.styles[row])]} style"
    return f"{what} in {how}" if thing and style else what if thing else how


class Part(NamedTuple):
    """Drawings that go into one set, in one split."""

    concept: Optional[str]  # whose forget set it is; None for the retain set
    rows: Tensor  # which drawings, `[N]`
    times: int  # how often each is rendered
    kinds: tuple[str, ...]  # what is asked of them: "thing", "style" or both


class EmojiDataModule(UnlearnDataModule):
    """Forget art styles, objects, or some of both, of the embedded drawings; retain all the rest.

    Every image is a fresh rendering (`render`) that the model was not trained on, and no two sets share one. The drawings of a
    style are split, too: half of them train, a quarter validation, a quarter test. An object has only five drawings, so each
    split has renderings of all five.

    The retain set has the other styles and objects, on drawings of both; and of the drawings to forget, the objects or styles
    that are not to be forgotten, so that an object in a style that is forgotten as well is never counted as retained. The
    renderings stay in memory, 24 MB for each object.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: an object to forget, such as "cat", or several.
        batch_size: samples in a batch.
        seed: of splits and renderings.

    Raises:
        UnlearnError: if neither a style nor an object is named, or one is named twice; in `setup`, if one is unknown, or if
            nothing is left to retain.

    Example:
        >>> data = EmojiDataModule(style="noto")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["image"].shape[1:], batch["style"].unique()
        (torch.Size([3, 64, 64]), tensor([4]))
        >>> EmojiDataModule(style="blob", thing=["cat", "octopus"]).concept
        ['blob style', 'cat', 'octopus']
    """

    samples, note = "fresh renderings", ""
    """What the sets hold, and what else there is to say of them in the report."""

    def __init__(self, style: Names = None, thing: Names = None, *, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.styles, self.things = _names("style", style), _names("thing", thing)
        self.concept = [f"{one} style" for one in self.styles] + self.things
        if not self.concept:
            raise UnlearnError("style, thing: name at least one style or object to forget")

    def setup(self, stage: str) -> None:
        """Render every split; further calls change nothing."""
        if self.notes:
            return
        drawings = load_drawings()
        generator = torch.Generator().manual_seed(self.seed)
        sets: dict[str | None, list[Dataset]] = {concept: [] for concept in (*self.concept, None)}
        for split, parts in self._parts(drawings).items():
            if all(part.concept for part in parts):
                raise UnlearnError(f"style, thing: nothing is left to retain in the {split} data; forget less")
            made = self._make(drawings, parts, split, generator)
            for concept, splits in sets.items():
                own = [dataset for part, dataset in zip(parts, made, strict=True) if part.concept == concept]
                splits.append(own[0] if concept else ConcatDataset(own))
        for concept, splits in sets.items():
            kind = "forget" if concept else "retain"
            self.set_parts(kind, *splits, concept=concept)
            apart = "" if concept in self.things else ", of its own drawings"
            self.notes[labelled(kind, concept)] += f"; {self.samples} in each split{apart}{self.note}"

    def render_near(self, names: Sequence[str]) -> dict[Split, Batches] | None:
        """Render things, and styles such as "blob style", anew: at least 100 pictures for the search and 500 for the report.

        Drawings of a style or object to forget are left out. The others are the same in both splits, but for styles, which have
        so many that each split gets some of them.
        """
        drawings = load_drawings()
        found = self.near_drawings(drawings, names)
        splits: dict[Split, Batches] = {}
        for number, (split, least) in enumerate(NEAR.items() if found else (), 1):
            generator = torch.Generator().manual_seed(NEAR_SEED * number + self.seed)
            parts = [self._near_part(kind, *enough(rows, least, generator)) for kind, rows in found.items()]
            splits[split] = self._loader(ConcatDataset(self._make(drawings, parts, split, generator)))
        return splits or None

    def near_drawings(self, drawings: Drawings, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the drawings of things and styles of these names by kind, without those of what is to be forgotten."""
        _, touched = self.masks(drawings)
        asked = {name.removesuffix(" style") for name in names}
        kinds = {"thing": (drawings.things, drawings.thing_names), "style": (drawings.styles, drawings.style_names)}
        found = {}
        for kind, (labels, known) in kinds.items():
            mask = torch.tensor([name in asked for name in known])[labels]
            if len(rows := (mask & ~(touched["style"] | touched["thing"])).nonzero()[:, 0]):
                found[kind] = rows
        return found

    def _near_part(self, kind: str, rows: Tensor, times: int) -> Part:
        """What is asked of drawings that are near by their kind: here, as of the rest, both kinds."""
        return Part(None, rows, times, ("thing", "style"))

    def masks(self, drawings: Drawings) -> tuple[dict[str, tuple[str, Tensor]], dict[str, Tensor]]:
        """Return the kind of each concept, "style" or "thing", with a mask of its drawings; and by kind, a mask of all."""
        masks = [("style", drawings.styles == _index("style", one, drawings.style_names)) for one in self.styles]
        masks += [("thing", drawings.things == _index("thing", one, drawings.thing_names)) for one in self.things]
        none = torch.zeros(len(drawings.things), dtype=torch.bool)
        every = {kind: sum((mask for other, mask in masks if other == kind), none) for kind in ("style", "thing")}
        return dict(zip(self.concept, masks, strict=True)), every

    def _parts(self, drawings: Drawings) -> dict[Split, list[Part]]:
        """Return what each split consists of: untouched drawings, then each concept's, with what else these show."""
        masks, touched = self.masks(drawings)
        rows = {concept: _split(mask, self.seed, whole=kind == "thing") for concept, (kind, mask) in masks.items()}
        untouched = _split(~(touched["style"] | touched["thing"]), self.seed)
        parts: dict[Split, list[Part]] = {}
        for split, style_times, thing_times in zip(SPLITS, (1, 2, 4), (1, 1, 4), strict=True):
            times = {"style": style_times, "thing": thing_times}
            found = [Part(None, untouched[split], times["style" if self.styles else "thing"], ("thing", "style"))]
            for concept, (kind, _) in masks.items():
                own, other = rows[concept][split], "style" if kind == "thing" else "thing"
                # An object has few drawings, so each is rendered more often.
                found.append(Part(concept, own, times[kind] * (16 if kind == "thing" else 1), (kind,)))
                found.append(Part(None, own[~touched[other][own]], times[kind], (other,)))
            parts[split] = [part for part in found if len(part.rows)]
        return parts

    def _make(self, drawings: Drawings, parts: Sequence[Part], split: Split, generator: torch.Generator) -> Sequence[Dataset]:
        """Make a dataset of each part."""
        # Rendered in the order that the published figures rest on: the concepts, what else they show, and the rest.
        made = {}
        for i in sorted(range(len(parts)), key=lambda i: (parts[i].concept is None, len(parts[i].kinds))):
            rows, kinds = parts[i].rows.repeat(parts[i].times), parts[i].kinds
            made[i] = emoji_pairs(drawings, rows, generator, thing="thing" in kinds, style="style" in kinds)
        return [made[i] for i in range(len(parts))]


def enough(rows: Tensor, least: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Choose drawings, and how often to take each, to have at least so many: some of them at random, or all several times.

    Example:
        >>> enough(torch.arange(25), 60, torch.Generator())[1], len(enough(torch.arange(900), 60, torch.Generator())[0])
        (3, 60)
    """
    if len(rows) <= least:
        return rows, -(-least // len(rows))
    return rows[torch.randperm(len(rows), generator=generator)[:least]], 1


def _names(argument: str, given: Names) -> list[str]:
    """Return the given names as a list, after checking that none is repeated."""
    names = [given] if isinstance(given, str) else list(given or ())
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UnlearnError(f"{argument}: {repeated[0]!r} is given more than once; name each once")
    return names


def _index(argument: str, name: str, known: list[str]) -> int:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.3) or known[:5]
        raise UnlearnError(f"{argument}: {name!r} is not known; near misses: {', '.join(near)}")
    return known.index(name)


def _split(mask: Tensor, seed: int, whole: bool = False) -> dict[Split, Tensor]:
    """Split drawings; if `whole`, or if there are too few for three splits, each split has all of them."""
    rows = mask.nonzero()[:, 0]
    if whole or len(rows) < 3:
        return dict.fromkeys(SPLITS, rows)
    return {split: rows[indices] for split, indices in split_indices(len(rows), seed).items()}

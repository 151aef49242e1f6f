"""The embedded pictures: five vendors' drawings of the same things, in renderings made on the fly."""

from __future__ import annotations

import difflib
from typing import Union

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from slug_lightning.datamodules.base import UnlearnDataModule, split_indices
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Split
from slug_lightning.utils.names import labelled

TEMPLATES = ("{}", "a picture of {}", "an emoji of {}")
"""Wordings of a caption; `{}` is a thing, or a style as in "noto style", or both."""


def render(pictures: Tensor, generator: torch.Generator, amount: float = 1.0) -> Tensor:
    """Draw each picture once more: turned, scaled and shifted, in other light, on a plain ground of random colour.

    Every call gives a rendering that was never drawn before, which is how training, search and report
    each see pictures of their own.

    Args:
        pictures: RGBA drawings, uint8, `[B, 4, H, W]`.
        generator: where the randomness comes from: turn within ±25°, scale 0.7 to 1.1, shift within ±10 %,
            contrast 0.8 to 1.2, brightness ±0.1, noise of standard deviation 0.02, ground of any colour.
        amount: of that, in [0, 1]; at 0 every drawing is upright, 0.9 in size, in the middle of a white ground.

    Returns:
        RGB renderings, float32, `[B, 3, H, W]`, normalised to mean 0.5 and deviation 0.5, so in about [-1, 1].

    Example:
        >>> one = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
        >>> render(one, torch.Generator().manual_seed(0)).shape
        torch.Size([1, 3, 64, 64])
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


class EmojiPairs(Dataset):
    """Renderings with captions and labels, as `ClipModule` wants its batches.

    Args:
        images: `[N, 3, 64, 64]`.
        text: tokens, `[N, T]`.
        things: index of the thing, or -1 where it is not asked, `[N]`.
        styles: index of the style, likewise.
    """

    def __init__(self, images: Tensor, text: Tensor, things: Tensor, styles: Tensor) -> None:
        self.columns = {"image": images, "text": text, "thing": things, "style": styles}

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def emoji_pairs(drawings: Drawings, rows: Tensor, generator: torch.Generator, *, thing: bool, style: bool) -> EmojiPairs:
    """Render some drawings, captioned by thing, by style, or by both.

    Args:
        drawings: all drawings.
        rows: which of them, `[N]`; one that is named twice is rendered twice.
        generator: of the renderings.
        thing: whether the caption names the thing, and the thing is asked.
        style: likewise the style.

    Example:
        >>> pairs = emoji_pairs(load_drawings(), torch.tensor([0, 0]), torch.Generator(), thing=True, style=False)
        >>> len(pairs), pairs[0]["style"]
        (2, tensor(-1))
    """
    import open_clip

    captions = [caption_of(drawings, int(row), thing, style) for row in rows]
    things, styles = drawings.things[rows], drawings.styles[rows]
    none = torch.full_like(things, -1)
    images = torch.cat([render(drawings.pictures[part], generator) for part in rows.split(256)])
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(captions)
    return EmojiPairs(images, tokens, things if thing else none, styles if style else none)


def caption_of(drawings: Drawings, row: int, thing: bool = True, style: bool = True) -> str:
    """The words for a drawing: its thing, its style, or both.

    Example:
        >>> caption_of(load_drawings(), 0)
        'airplane in blob style'
    """
    what = drawings.thing_names[int(drawings.things[row])]
    how = f"{drawings.style_names[int(drawings.styles[row])]} style"
    return f"{what} in {how}" if thing and style else what if thing else how


_FRESH = "; fresh renderings in each"
_OWN = ", of drawings of its own"


class EmojiDataModule(UnlearnDataModule):
    """Forget art styles, or things, or some of both, of the embedded pictures; keep all the rest.

    Every picture is a fresh rendering (`render`) that the model was not trained on, and no two sets share one. To
    forget a style, the split also parts the drawings: half of them for the gradient, a quarter for the search, a
    quarter for the report. A thing has five drawings only, so each split has renderings of all five.

    What is kept: the other styles and the other things, on drawings of both; and of the forgotten drawings what was not
    asked to go: the things they show, or the style they are in. So concepts that touch each other, such as a thing and a
    style it is drawn in, are never counted as kept. The renderings stay in memory, 24 MB of each thing.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: a thing to forget, such as "cat", or several.
        batch_size: samples in a batch.
        seed: of splits and renderings.

    Raises:
        UnlearnError: if neither a style nor a thing is named, or one is named twice; in `setup`, if one is not known, or if
            nothing is left to keep.

    Example:
        >>> data = EmojiDataModule(style="noto")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["image"].shape[1:], batch["style"].unique()
        (torch.Size([3, 64, 64]), tensor([4]))
        >>> EmojiDataModule(style="blob", thing=["cat", "octopus"]).concept
        ['blob style', 'cat', 'octopus']
    """

    def __init__(
        self,
        style: Union[str, list[str], None] = None,
        thing: Union[str, list[str], None] = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.styles = _names("style", style)
        self.things = _names("thing", thing)
        self.concept = [f"{one} style" for one in self.styles] + self.things
        if not self.concept:
            raise UnlearnError("style, thing: name at least one style or thing to forget")

    def setup(self, stage: str) -> None:
        """Render every split, once."""
        if self.notes:
            return
        drawings = load_drawings()
        styles, things = self.numbers(drawings)
        in_style, of_thing = torch.isin(drawings.styles, styles), torch.isin(drawings.things, things)
        # Of each concept its drawings by split, and whether it is a style.
        gone = [(parted(drawings.styles == one, self.seed), True) for one in styles]
        gone += [(dict.fromkeys(SPLITS, (drawings.things == one).nonzero()[:, 0]), False) for one in things]
        kept = parted(~(in_style | of_thing), self.seed)
        generator = torch.Generator().manual_seed(self.seed)

        def pairs(rows: Tensor, thing: bool, style: bool, times: int) -> list[Dataset]:
            return [emoji_pairs(drawings, rows.repeat(times), generator, thing=thing, style=style)] if len(rows) else []

        forget: dict[str, dict[Split, Dataset]] = {concept: {} for concept in self.concept}
        retain: dict[Split, Dataset] = {}
        for split, style_times, thing_times in zip(SPLITS, (1, 2, 4), (1, 1, 4), strict=True):
            for sets, (rows, is_style) in zip(forget.values(), gone, strict=True):
                # A thing has few drawings, so many renderings of each tell; of a style, the number of drawings does.
                times = style_times if is_style else 16 * thing_times
                (sets[split],) = pairs(rows[split], not is_style, is_style, times)
            rest: list[Dataset] = []
            for rows, is_style in gone:  # what else they show, unless that is to go as well
                others = rows[split][~(of_thing if is_style else in_style)[rows[split]]]
                rest += pairs(others, is_style, not is_style, style_times if is_style else thing_times)
            both = pairs(kept[split], True, True, style_times if self.styles else thing_times)
            if not both + rest:
                raise UnlearnError(f"style, thing: nothing is left to retain in the {split} data; forget less")
            retain[split] = ConcatDataset(both + rest)
        for (concept, sets), (_, is_style) in zip(forget.items(), gone, strict=True):
            self.set_parts("forget", sets["train"], sets["val"], sets["test"], concept=concept)
            self.notes[labelled("forget", concept)] += _FRESH + _OWN * is_style
        self.set_parts("retain", retain["train"], retain["val"], retain["test"])
        self.notes["retain"] += _FRESH + _OWN

    def numbers(self, drawings: Drawings) -> tuple[Tensor, Tensor]:
        """Which styles and which things are to be forgotten, as the drawings number them.

        Raises:
            UnlearnError: if one is not known.
        """
        styles = [_number("style", one, drawings.style_names) for one in self.styles]
        things = [_number("thing", one, drawings.thing_names) for one in self.things]
        return torch.tensor(styles, dtype=torch.long), torch.tensor(things, dtype=torch.long)


def _names(argument: str, given: Union[str, list[str], None]) -> list[str]:
    """The names given, none of them twice."""
    names = [given] if isinstance(given, str) else list(given or ())
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UnlearnError(f"{argument}: {repeated[0]!r} is given more than once; name each once")
    return names


def _number(argument: str, name: str, known: list[str]) -> int:
    """Which of the known names it is."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.3) or known[:5]
        raise UnlearnError(f"{argument}: {name!r} is not known; near misses: {', '.join(near)}")
    return known.index(name)


def parted(mask: Tensor, seed: int) -> dict[Split, Tensor]:
    """Drawings for each split; where there are too few for three parts, all of them for each."""
    rows = mask.nonzero()[:, 0]
    if len(rows) < 3:
        return dict.fromkeys(SPLITS, rows)
    return {split: rows[part] for split, part in split_indices(len(rows), seed).items()}

"""Collect the image-text pairs whose captions name a concept, and others to retain, without copies, into a folder."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from slug_lightning.datamodules.base import make_splits, split_indices
from slug_lightning.datamodules.image_text.pairs import Columns, Pair, decode, open_pairs, whole_words
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import listed
from slug_lightning.utils.optional_imports import import_optional

TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}")
SIDE, FINE = 8, 32
"""Side in pixels of two thumbnails that are compared: coarse, so that encoding and size hardly show; and fine, to confirm."""
LIKENESS = 0.8
"""Root mean square difference of fine thumbnails, in standard deviations of the image, up to which they are copies: pages of
text, or marks on white, have the same coarse thumbnail whatever they say."""
ALIKE = 7.0
"""Root mean square difference, in levels from 0 to 255, up to which coarse thumbnails are of copies. The embedded drawings, saved
at 48 pixels instead of 64 as JPEG of quality 60, differ by at most 6.8; different ones, by at least 10.7."""


@dataclass
class Found:
    """What `collect` found; `str` writes it in sentences."""

    name: str
    read: int = 0  # pairs in the sources
    named: int = 0  # captions that contain the name or an alias
    longer: Counter[str] = field(default_factory=Counter)  # words of others that start with a name: "octopuses" for "octopus"
    copies: int = 0  # pairs left out because their image is a copy of another
    unreadable: list[str] = field(default_factory=list)  # why, for each pair whose image is missing or cannot be decoded
    parts: dict[str, str] = field(default_factory=dict)  # a sentence on the splits of "forget" and of "retain"

    def __str__(self) -> str:
        told = [f"{self.name}: named in {self.named} of {self.read} captions"]
        if self.copies:
            told.append(f"left out: {self.copies} copies of other images")
        if self.unreadable:
            told.append(f"left out: {len(self.unreadable)} images that cannot be read, such as {self.unreadable[0]}")
        told += [f"{kind}: {sentence}" for kind, sentence in self.parts.items()]
        if self.longer:
            words = listed([word for word, _ in self.longer.most_common()])
            told.append(f"not taken for the concept: {words}; give those that mean it as aliases")
        return "\n".join(told)


def collect(
    name: str,
    sources: Sequence[str],
    output: str | Path,
    *,
    aliases: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    at_least: int = 20,
    limit: int = 10_000,
    seed: int = 0,
    **columns: Any,
) -> Found:
    """Write the image-text pairs that name a concept, and others to retain, into a folder for `ImageTextDataModule`.

    The folder gets `forget.csv` and `retain.csv` with the images in `images/`. Their columns are "filepath"; "title", the
    caption, which in the forget set is made by a template; "caption", as it was found; and "part": the split ("train", "val" or
    "test") that a datamodule with the same seed puts it in. No image is in the folder twice, so none is in two splits or sets.
    Copies are recognised by their looks, whatever the encoding and the size.

    The arguments are those of the command; `columns` are `image_column`, `caption_column` and `delimiter` of a CSV, as in
    `ImageTextDataModule`. The sources are read twice; `output` is written whole or not at all.
    """
    output, names = Path(output), [name, *aliases]
    naming, found = whole_words("name", names), Found(name)
    if not templates or any("{}" not in template for template in templates):
        raise UnlearnError(f"templates: must be at least one, each with {{}} where the name should stand, got {list(templates)}")
    if at_least < 3:
        raise UnlearnError(f"at_least: must be >= 3, for train, validation and test, got {at_least}")
    if output.exists() or not output.parent.is_dir():
        raise UnlearnError(f"output: must be a new folder in an existing one, got {output}")
    table = Columns(**columns)
    with TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as temporary:
        folder = _Folder(Path(temporary) / "whole", found)
        forget = list(folder.new(_naming(_read(sources, table), naming, names, found)))
        for row, template in zip(forget, cycle(templates)):
            row["title"] = template.replace("{}", name)
        folder.write("forget", forget, at_least, seed)
        others = (pair for pair in _read(sources, table) if not naming.search(pair.caption))
        folder.write("retain", list(islice(folder.new(others), limit)), at_least, seed)
        folder.path.rename(output)
    return found


def _read(sources: Sequence[str], columns: Columns) -> Iterator[Pair]:
    pairs = chain.from_iterable(open_pairs("sources", source, columns) for source in sources)
    yield from tqdm(pairs, desc="reading", unit=" pairs", leave=False, disable=None)  # None: only on a terminal


def _naming(pairs: Iterator[Pair], naming: re.Pattern[str], names: list[str], found: Found) -> Iterator[Pair]:
    """Yield the pairs whose captions name the concept; in the others, count words that the user may have meant."""
    longer = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})\w+", re.IGNORECASE)
    for pair in pairs:
        found.read += 1
        if naming.search(pair.caption):
            found.named += 1
            yield pair
        else:
            found.longer.update(map(str.casefold, longer.findall(pair.caption)))


class _Folder:
    """The folder that is being made, in which no image is twice."""

    def __init__(self, path: Path, found: Found) -> None:
        self.path, self.found, self.numbers = path, found, count()
        self.box = import_optional("PIL.Image", "clip").Resampling.BOX
        (path / "images").mkdir(parents=True)
        # Thumbnails by their mean in steps of ALIKE. Means differ by no more than images, so a copy is at most a step away.
        self.thumbnails: defaultdict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)

    def new(self, pairs: Iterable[Pair]) -> Iterator[dict[str, str]]:
        """Store the images that can be read and are not copies; yield their rows."""
        for pair in pairs:
            try:
                image = decode(pair, "RGBA")
            except UnlearnError as error:
                self.found.unreadable.append(str(error))
                continue
            if self._is_copy(image):
                self.found.copies += 1
                continue
            path = f"images/{next(self.numbers):06}.{image.format.lower()}"
            (self.path / path).write_bytes(pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes())
            yield {"filepath": path, "title": pair.caption, "caption": pair.caption}

    def _is_copy(self, image: Any) -> bool:
        """Return whether an image looks like one that was stored; if not, remember it."""
        # Colours times opacity: what lies below transparent points is not seen.
        whole = image.convert("RGBa")
        own, fine = (np.asarray(whole.resize((side, side), self.box), dtype=np.float32) for side in (SIDE, FINE))
        step = int(own.mean() // ALIKE)
        near = [other for neighbour in (step - 1, step, step + 1) for other in self.thumbnails[neighbour]]
        if near:
            apart = np.square(np.stack([coarse for coarse, _ in near]) - own).mean(axis=(1, 2, 3))
            # Two levels are what an encoding may change in an image of one colour.
            most = max(LIKENESS * fine[..., :3].std(axis=(0, 1)).mean(), 2.0)
            if any(np.sqrt(np.square(near[i][1] - fine).mean()) <= most for i in np.flatnonzero(apart <= ALIKE**2)):
                return True
        self.thumbnails[step].append((own, fine.astype(np.uint8)))
        return False

    def write(self, kind: str, rows: list[dict[str, str]], at_least: int, seed: int) -> None:
        """Write the table of one set, with the split of each image."""
        if len(rows) < at_least:
            sizes = "{} for train, {} for validation and {} for test".format(*map(len, split_indices(at_least).values()))
            raise UnlearnError(
                f"{kind}: {len(rows)} different images are too few, at least {at_least} are needed, {sizes}; read more "
                f"sources, give more aliases, or lower at_least\n{self.found}"
            )
        _, self.found.parts[kind] = make_splits(kind, rows, seed=seed)
        for split, indices in split_indices(len(rows), seed).items():
            for i in indices:
                rows[i]["part"] = split
        with open(self.path / f"{kind}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

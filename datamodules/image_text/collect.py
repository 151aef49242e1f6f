"""From a name to a forget set: the pairs whose captions name it, and others to keep, without copies, in a folder of their own."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from torch.utils.data import Subset
from tqdm import tqdm

from slug_lightning.datamodules.base import split_indices, three_parts
from slug_lightning.datamodules.image_text.pairs import Pair, decode, open_pairs, whole_words
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import listed
from slug_lightning.utils.optional_imports import import_optional

TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}")
SIDE, FINE = 8, 32
"""Pixels of a side of the pictures that are compared: so few that encoding and size hardly show; and to make sure."""
LIKENESS = 0.8
"""Root mean square difference of the finer ones, in standard deviations of the picture, up to which they are copies: of a page of
text, or a mark on white, the coarse ones are alike whatever it says."""
ALIKE = 7.0
"""Root mean square difference, in levels from 0 to 255, up to which two shrunk pictures are copies. The embedded pictures, saved
at 48 pixels instead of 64 as JPEG of quality 60, are at most 6.8 off; different ones, at least 10.7."""


@dataclass
class Found:
    """What `collect` found; `str` says it in sentences.

    Attributes:
        name: of what is to be forgotten.
        read: how many pairs the sources hold.
        named: in how many captions its name or an alias stands.
        longer: words of other captions that begin like a name, in lower case, and how often: "octopuses" for "octopus".
        copies: how many pairs were left out because of a picture that is a copy of another.
        unreadable: why, of each pair that was left out because its picture is missing or cannot be decoded.
        parts: of "forget" and "retain", how many pairs there are, and for what.
    """

    name: str
    read: int = 0
    named: int = 0
    longer: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    unreadable: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{self.name}: named in {self.named} of {self.read} captions"]
        if self.copies:
            told.append(f"left out: {self.copies} copies of other pictures")
        if self.unreadable:
            told.append(f"left out: {len(self.unreadable)} pictures that cannot be read, such as {self.unreadable[0]}")
        told += [f"{kind}: {sentence}" for kind, sentence in self.parts.items()]
        if self.longer:
            words = listed([word for word, _ in self.longer.most_common()])
            told.append(f"taken for something else: {words}; if one of these is meant, too, give it as an alias")
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
    """Write the image-text pairs that name something, and others, into a folder, for an `ImageTextDataModule`.

    The folder gets `forget.csv` and `retain.csv` with the pictures in `images/`. Their columns are "filepath"; "title", the
    caption, which for what is to be forgotten is made by a template; "caption", as it was found; and "part": "train" (gradient),
    "val" (search) or "test" (report), as a datamodule with the same seed divides them. No picture is in it twice, so none is
    both tuned and reported on, or both forgotten and kept. Copies are known by their looks, whatever the encoding and the size.

    Args:
        name: of what is to be forgotten, as it stands in the captions: as whole words, whatever the case.
        sources: each a CSV file, a folder with one, or tar shards, as `ImageTextDataModule` reads them. They are read twice.
        output: the folder; it is there whole or not at all.
        aliases: other names of it, plurals too. Whatever names none is kept.
        templates: of captions, with {} for `name`; pictures get one after the other.
        at_least: how many pictures there must be, to forget and to retain; 3 or more.
        limit: how many pairs to retain at most: the first.
        seed: of the split.
        columns: `image_column`, `caption_column` and `delimiter` of a CSV, as in `ImageTextDataModule`.

    Returns:
        What was found, in numbers.

    Raises:
        UnlearnError: if an argument is not what it should be, if a source cannot be read, or if there are too few pictures.

    Example:
        >>> import tempfile
        >>> from slug_lightning.embedded import SHARD
        >>> folder = Path(tempfile.mkdtemp()) / "airplane"
        >>> print(collect("airplane", [str(SHARD)], folder, at_least=5, limit=100))
        airplane: named in 5 of 1170 captions
        forget: one set of 5 samples was split into 3 (gradient), 1 (search), 1 (report), seed 0
        retain: one set of 100 samples was split into 50 (gradient), 25 (search), 25 (report), seed 0
        >>> print((folder / "forget.csv").read_text().split()[1])
        images/000000.png,a
    """
    output, names = Path(output), [name, *aliases]
    naming = whole_words("name", names)
    if not templates or any("{}" not in template for template in templates):
        raise UnlearnError(f"templates: {list(templates)}; give at least one, each with {{}} where the name should stand")
    if at_least < 3:
        raise UnlearnError(f"at_least: {at_least} pictures cannot serve gradient, search and report; give 3 or more")
    if output.exists() or not output.parent.is_dir():
        raise UnlearnError(f"output: {output} exists, or the folder that it should lie in does not; name another")
    found = Found(name)
    with TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as beside:
        pictures = _Pictures(Path(beside) / "whole", found)
        forget = list(pictures.new(_naming(_read(sources, columns), naming, names, found)))
        for number, row in enumerate(forget):
            row["title"] = templates[number % len(templates)].replace("{}", name)
        pictures.write("forget", forget, at_least, seed)
        others = (pair for pair in _read(sources, columns) if not naming.search(pair.caption))
        pictures.write("retain", list(islice(pictures.new(others), limit)), at_least, seed)
        pictures.folder.rename(output)
    return found


def _read(sources: Sequence[str], columns: dict[str, Any]) -> Iterator[Pair]:
    pairs = chain.from_iterable(open_pairs("sources", source, **columns) for source in sources)
    yield from tqdm(pairs, desc="reading", unit=" pairs", leave=False, disable=None)  # None: only on a terminal


def _naming(pairs: Iterator[Pair], naming: re.Pattern[str], names: list[str], found: Found) -> Iterator[Pair]:
    """The pairs whose captions name it; of the others, words are counted that the user may have meant."""
    longer = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})\w+", re.IGNORECASE)
    for pair in pairs:
        found.read += 1
        if naming.search(pair.caption):
            found.named += 1
            yield pair
        else:
            found.longer.update(map(str.casefold, longer.findall(pair.caption)))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


class _Pictures:
    """The folder that is being made, in which no picture is twice."""

    def __init__(self, folder: Path, found: Found) -> None:
        self.folder, self.found = folder, found
        self.box = import_optional("PIL.Image", "clip").Resampling.BOX
        (folder / "images").mkdir(parents=True)
        self.count = 0
        # Small pictures by their mean in steps of ALIKE. Means differ by no more than pictures, so a copy is at most a step away.
        self.small: defaultdict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)

    def new(self, pairs: Iterable[Pair]) -> Iterator[dict[str, str]]:
        """Keep the pictures that can be read and are no copies; gives the rows of their table."""
        for pair in pairs:
            try:
                image = decode(pair, "RGBA")
            except UnlearnError as error:
                self.found.unreadable.append(str(error))
                continue
            if self._is_copy(image):
                self.found.copies += 1
                continue
            path = Path("images") / f"{self.count:06}.{image.format.lower()}"
            self.count += 1
            (self.folder / path).write_bytes(pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes())
            yield {"filepath": path.as_posix(), "title": pair.caption, "caption": pair.caption}

    def _is_copy(self, image: Any) -> bool:
        """Whether a picture looks like one that was kept; if not, it is remembered."""
        # Colours times opacity: what lies below transparent points is not seen.
        whole = image.convert("RGBa")
        own, fine = (np.asarray(whole.resize((side, side), self.box), dtype=np.float32) for side in (SIDE, FINE))
        step = int(own.mean() // ALIKE)
        near = [other for neighbour in (step - 1, step, step + 1) for other in self.small[neighbour]]
        if near:
            apart = np.square(np.stack([coarse for coarse, _ in near]) - own).mean(axis=(1, 2, 3))
            # Two levels are what an encoding may change in a picture of one colour.
            most = max(LIKENESS * fine[..., :3].std(axis=(0, 1)).mean(), 2.0)
            if any(_rms(near[i][1] - fine) <= most for i in np.flatnonzero(apart <= ALIKE**2)):
                return True
        self.small[step].append((own, fine.astype(np.uint8)))
        return False

    def write(self, kind: str, rows: list[dict[str, str]], at_least: int, seed: int) -> None:
        """Write the table of `kind`, with the part of each picture."""
        if len(rows) < at_least:
            sizes = "{} for the gradient, {} for the search and {} for the report".format(
                *(len(part) for part in split_indices(at_least).values())
            )
            raise UnlearnError(
                f"{kind}: {len(rows)} different pictures are too few, at least {at_least} are needed, {sizes}; read more "
                f"sources, give more aliases, or lower at_least\n{self.found}"
            )
        parts, self.found.parts[kind] = three_parts(kind, cast(Any, rows), None, None, seed)
        for split, part in parts.items():
            for row in cast(Subset, part).indices:
                rows[row]["part"] = split
        with open(self.folder / f"{kind}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

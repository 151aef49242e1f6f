"""Image-text pairs as map-style datasets, from a CSV or from tar shards."""

from __future__ import annotations

import csv as csv_module
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import by_concept, labelled, listed
from slug_lightning.utils.optional_imports import import_optional

Transform = Callable[[Any], Tensor]
"""A PIL image, RGB, to a float tensor `[3, H, W]`."""
Tokenize = Callable[[list[str]], Any]
"""N texts to token ids, int64, `[N, T]`, as open_clip's tokenizers do, or to any N objects."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What images are read as, whatever their suffix: for other formats Pillow starts other programs."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Columns(NamedTuple):
    """Where a table has what; the label columns are fields of the `.json` in a shard, too."""

    image_column: str = "filepath"
    caption_column: str = "title"
    delimiter: str | None = None  # None: the one of `,` tab `;` `|` that is most frequent in the header
    label_columns: Sequence[str] = ()


class Pair(NamedTuple):
    """An encoded image and its caption."""

    name: str  # for messages: the image's path, or shard and key
    image: Path | bytes  # its path, or its encoded bytes
    caption: str
    labels: dict[str, int]


class ImageTextPairs(Dataset):
    """Pairs as a map-style dataset; an image is decoded when its sample is read.

    A sample is a dict: "image", float32 `[3, H, W]`; "text", int64 `[T]`; and each label's name with an int. The pairs are read
    once, no further than `limit` needs.

    Args:
        where: called with each caption; pairs for which it is false are left out.
        limit: only the first so many pairs.
        labels: class names by label name. A sample's label is the index of the one class name that its caption
            contains as whole words, ignoring case, or -1 if it contains none or several; a name within a longer
            one ("truck" in "fire truck") does not count.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        transform: Transform,
        tokenize: Tokenize,
        *,
        where: Callable[[str], bool] | None = None,
        limit: int | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.transform = transform
        self.tokenize = tokenize
        finders = {name: class_finder(f"labels: {name}", classes) for name, classes in (labels or {}).items()}
        chosen = (pair for pair in pairs if where is None or where(pair.caption))
        self.pairs = [
            pair._replace(labels=pair.labels | {name: only_class(find(pair.caption)) for name, find in finders.items()})
            for pair in islice(chosen, limit)
        ]
        for pair in self.pairs:
            if isinstance(pair.image, Path) and not pair.image.is_file():
                raise UnlearnError(f"{pair.name}: there is no such image file; correct its path, or remove its row")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {"image": self.transform(decode(pair)), "text": self.tokenize([pair.caption])[0], **pair.labels}


class ImageTextFolder(ImageTextPairs):
    r"""The images and captions that a CSV lists.

    Args:
        folder: where relative image paths start.
        csv: the table, UTF-8, with a header.
        transform: makes a tensor of a PIL image.
        tokenize: makes token ids of a list of texts.
        image_column: the column of image paths.
        caption_column: the column of captions.
        delimiter: between columns. None takes the one of `,` tab `;` `|` that is most frequent in the header.
        label_columns: columns of integer labels, which the samples carry under the same names.
        options: `where`, `limit` and `labels` of `ImageTextPairs`.

    Raises:
        UnlearnError: if a column or an image file is missing, or if a row does not fit the header.

    Example:
        >>> import tempfile, torch
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (4, 4)).save(folder / "cat.png")
        >>> _ = (folder / "pairs.csv").write_text("filepath,title\ncat.png,a small cat\n")
        >>> ImageTextFolder(folder, folder / "pairs.csv", lambda image: torch.zeros(3, *image.size), list)[0]["text"]
        'a small cat'
    """

    def __init__(
        self,
        folder: str | Path,
        csv: str | Path,
        transform: Transform,
        tokenize: Tokenize,
        *,
        image_column: str = "filepath",
        caption_column: str = "title",
        delimiter: str | None = None,
        label_columns: Sequence[str] = (),
        **options: Any,
    ) -> None:
        columns = Columns(image_column, caption_column, delimiter, label_columns)
        super().__init__(_read_csv(Path(folder), Path(csv), columns), transform, tokenize, **options)


class ImageTextShards(ImageTextPairs):
    """The pairs of webdataset shards, held in memory as encoded.

    A sample of a shard is an image (`.jpg`, `.jpeg`, `.png`, `.webp`), a `.txt` with its caption, and perhaps a `.json`; one that
    lacks image or caption is skipped. The shards are read once, in order, and the chosen pairs stay in memory, so that they have
    indices: choose with `where`, or set a `limit`. Nothing is read beyond the limit, so the shards should be shuffled, as usual.

    Args:
        shards: paths of the tar files: one, a brace pattern such as `cc3m-{0000..0331}.tar`, a glob such as
            `shards/*.tar`, or several of these joined by `::`.
        transform: makes a tensor of a PIL image.
        tokenize: makes token ids of a list of texts.
        label_columns: fields of the `.json` with integer labels, which the samples carry under the same names.
        options: `where`, `limit` and `labels` of `ImageTextPairs`.

    Raises:
        UnlearnError: if webdataset is not installed, if a shard is missing or damaged, or if none holds a pair.

    Example:
        >>> import torch
        >>> from slug_lightning.embedded import SHARD
        >>> data = ImageTextShards(str(SHARD), lambda image: torch.zeros(3, *image.size), list, limit=4)
        >>> len(data), data[0]["image"].shape
        (4, torch.Size([3, 64, 64]))
    """

    def __init__(
        self, shards: str, transform: Transform, tokenize: Tokenize, *, label_columns: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(_read_shards(shards, label_columns), transform, tokenize, **options)


def whole_words(argument: str, names: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern that finds any of `names` as whole words, ignoring case and spacing; group i + 1 is the i-th name."""
    if not names or not all(name.strip() for name in names):
        raise UnlearnError(f"{argument}: a name is empty, and would match every caption; got {list(names)}")
    groups = ("(" + r"\s+".join(map(re.escape, name.split())) + ")" for name in names)
    return re.compile(rf"(?<!\w)(?:{'|'.join(groups)})(?!\w)", re.IGNORECASE)


def class_finder(argument: str, classes: Sequence[str]) -> Callable[[str], set[int]]:
    """Make a function that returns the indices of the class names in a text: whole words, but not names within longer ones."""
    plain = [" ".join(name.casefold().split()) for name in classes]
    if repeated := [name for name in plain if plain.count(name) > 1]:
        raise UnlearnError(f"{argument} has the class {repeated[0]!r} more than once")
    order = sorted(range(len(classes)), key=lambda i: -len(plain[i]))  # the first that matches wins: longest first
    return partial(_classes_in, whole_words(argument, [classes[i] for i in order]), order)


def _classes_in(pattern: re.Pattern[str], order: Sequence[int], text: str) -> set[int]:
    return {order[(match.lastindex or 0) - 1] for match in pattern.finditer(text)}


def only_class(found: set[int]) -> int:
    """Return the one class that was found in a text, or -1 for none or several."""
    return next(iter(found)) if len(found) == 1 else -1


def sources_by_concept(forget: str | Mapping[str, str], retain: str | None) -> dict[str | None, str]:
    """Return the forget sources by concept, after checking that no two sets have the same source."""
    sources = by_concept("forget", forget)
    if retain in sources.values():
        raise UnlearnError(f"forget, retain: must be different sources, got {retain} for both")
    if repeated := [name for name, source in sources.items() if list(sources.values()).count(source) > 1]:
        raise UnlearnError(f"forget: {listed(repeated)} have the same source; give one for each concept")
    return sources


def refuse_shared(what: str, forget: Mapping[str | None, Collection[Any]], retain: Collection[Any]) -> None:
    """Refuse forget samples, each a text and where it comes from, that are in the retain set too."""
    retained = set(retain)
    for concept, own in forget.items():
        if shared := [each for each in own if each in retained]:
            text, place = shared[0]
            raise UnlearnError(
                f"{labelled('forget', concept)}, retain: {len(shared)} of {len(own)} {what} are in retain too, such as "
                f"{text!r} ({place}); leave them out of retain"
            )


def open_pairs(argument: str, source: str, columns: Columns) -> Iterator[Pair]:
    """Read the pairs of a source: a `.csv` or `.tsv` file, a folder with one, or tar shards, as `ImageTextDataModule` says."""
    path = Path(source)
    if path.is_dir():
        tables = sorted(file for file in path.iterdir() if file.suffix in (".csv", ".tsv"))
        if len(tables) != 1:
            raise UnlearnError(
                f"{argument}: the folder {source} must have one CSV file, got {len(tables)}; name the file, or {source}/*.tar "
                "if the folder has shards"
            )
        path = tables[0]
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path.parent, path, columns)
    if path.suffix == ".tar":
        return _read_shards(source, columns.label_columns)
    raise UnlearnError(f"{argument}: must be a .csv or .tsv file, a folder with one, or .tar shards, got {source}")


def decode(pair: Pair, mode: str = "RGB") -> Any:
    """Decode a pair's image into a PIL image of the given mode, whose `format` says how it was encoded."""
    image = import_optional("PIL.Image", "clip")
    try:
        content = io.BytesIO(pair.image) if isinstance(pair.image, bytes) else pair.image
        with image.open(content, formats=FORMATS) as opened:
            converted = opened.convert(mode)
            converted.format = opened.format
        return converted
    except Exception as error:  # PIL's decoders raise OSError, ValueError, SyntaxError and more
        raise UnlearnError(f"{pair.name}: the image cannot be decoded ({error}); replace it or leave it out") from error


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnlearnError(f"{name}: the text is not UTF-8 ({error}); save it as UTF-8") from error


def _labels_of(record: Mapping[str, Any], columns: Sequence[str], name: str) -> dict[str, int]:
    labels = {}
    for column in columns:
        if column not in record:
            raise UnlearnError(f"label_columns: {name} has no {column!r}, only {sorted(record)}")
        try:
            labels[column] = int(str(record[column]))  # int alone would make 1 of 1.5 and of true
        except ValueError:
            raise UnlearnError(f"label_columns: {name}: {column!r} must be an integer, got {record[column]!r}") from None
    return labels


def _read_csv(folder: Path, csv: Path, columns: Columns) -> Iterator[Pair]:
    if not csv.is_file():
        raise UnlearnError(f"{csv}: there is no such file")
    text = _text(csv.read_bytes(), str(csv))
    image, caption, _, labels = columns
    delimiter = columns.delimiter or max(",\t;|", key=text.partition("\n")[0].count)
    reader = csv_module.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(reader)
    except csv_module.Error as error:
        raise UnlearnError(f"{csv}: not a CSV ({error}); look for a quote that is not closed") from error
    header = list(reader.fieldnames or [])
    for argument, column in [("image_column", image), ("caption_column", caption), *(("label_columns", one) for one in labels)]:
        if column not in header:
            raise UnlearnError(f"{argument}: {csv} has no column {column!r}, only {header} (delimiter {delimiter!r})")
    for number, row in enumerate(rows, start=1):
        name = f"{csv}, row {number}"
        if None in row or None in row.values():
            raise UnlearnError(f"{name}: not as many columns as the header; quote captions that contain {delimiter!r}")
        path = folder / row[image]
        yield Pair(str(path), path, row[caption], _labels_of(row, labels, name))


def _shard_samples(shard: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard: the files of a key by suffix."""
    iterators = import_optional("webdataset.tariterators", "clip")
    try:
        with open(shard, "rb") as stream:
            yield from iterators.group_by_keys(iterators.tar_file_expander([{"url": shard, "stream": stream}]))
    except (tarfile.TarError, ValueError) as error:
        raise UnlearnError(f"{shard}: the shard cannot be read ({error.args[0]}); replace it or leave it out") from error


def _read_shards(shards: str, label_columns: Sequence[str]) -> Iterator[Pair]:
    empty = True
    for pattern in import_optional("webdataset.shardlists", "clip").expand_urls(shards):
        paths = [pattern] if Path(pattern).is_file() else sorted(glob(pattern))
        if not paths:
            raise UnlearnError(f"{pattern}: there is no such shard")
        for path in paths:
            for sample in _shard_samples(path):
                name = f"{path}, key {sample['__key__']}"
                images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
                if images and "txt" in sample:
                    empty = False
                    record = json.loads(sample.get("json", b"{}")) if label_columns else {}
                    caption = _text(sample["txt"], name).strip()
                    yield Pair(name, images[0], caption, _labels_of(record, label_columns, name))
    if empty:
        raise UnlearnError(f"{shards}: no sample has both an image ({', '.join(IMAGE_SUFFIXES)}) and a caption (txt)")

"""Image-text pairs as map-style datasets: from a folder with a CSV, or from tar shards."""

from __future__ import annotations

import csv as csv_module
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional

Transform = Callable[[Any], Tensor]
"""A PIL image, RGB, to a float tensor `[3, H, W]`."""
Tokenize = Callable[[list[str]], Any]
"""N texts to token ids, int64, `[N, T]`, as open_clip's tokenizers do, or to any N objects."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What pictures are read as, whatever their names say: other formats make Pillow start other programs."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Pair(NamedTuple):
    """An image, not yet decoded, and its caption.

    Attributes:
        name: where it comes from, for messages: the image's path, or shard and key.
        image: the image's path, or its encoded bytes.
        caption: the text.
        labels: integer labels by name.
    """

    name: str
    image: Path | bytes
    caption: str
    labels: dict[str, int]


class ImageTextPairs(Dataset):
    """Pairs as a map-style dataset; an image is decoded when its sample is asked for.

    A sample is a dict: "image", float32 `[3, H, W]`; "text", int64 `[T]`; and each label's name with an int.

    Args:
        pairs: read once, no further than `limit` needs.
        transform: makes a tensor of a PIL image.
        tokenize: makes token ids of a list of texts. Long captions are cut as it does.
        where: called with each caption; only pairs for which it is true are kept.
        limit: keep only the first so many.
        labels: class names by label name. A sample's label is the index of the one class name that its caption
            contains as whole words, whatever the case, or -1 if it contains none or several; a name within a longer
            one ("truck" in "fire truck") does not count.

    Raises:
        UnlearnError: if an image file is missing or a class name is empty or repeated; when a sample is read, if its
            image cannot be decoded.

    Example:
        >>> import io, torch
        >>> from PIL import Image
        >>> Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "PNG")
        >>> pairs = [Pair("one", file.getvalue(), "A red fire truck", {})]
        >>> data = ImageTextPairs(
        ...     pairs, lambda image: torch.zeros(3, *image.size), lambda texts: torch.ones(len(texts), 5).long(),
        ...     labels={"vehicle": ["truck", "fire truck"]},
        ... )
        >>> {name: getattr(value, "shape", value) for name, value in data[0].items()}
        {'image': torch.Size([3, 4, 4]), 'text': torch.Size([5]), 'vehicle': 1}
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
                raise UnlearnError(f"{pair.name}: there is no such image file; mend its path, or leave out its row")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {"image": self.transform(decode(pair)), "text": self.tokenize([pair.caption])[0], **pair.labels}


class ImageTextFolder(ImageTextPairs):
    r"""The images that a CSV names, with the captions beside them.

    Args:
        folder: where relative image paths start.
        csv: the table, UTF-8, with a header.
        transform: makes a tensor of a PIL image.
        tokenize: makes token ids of a list of texts.
        image_column: the column of image paths.
        caption_column: the column of captions.
        delimiter: between columns. None takes the one of `,` tab `;` `|` that divides the header most.
        label_columns: columns of integer labels, which the samples carry under the same names.
        options: `where`, `limit` and `labels` of `ImageTextPairs`.

    Raises:
        UnlearnError: if a column or an image file is missing, or if a row does not fit the header.

    Example:
        >>> import tempfile, torch
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (4, 4)).save(folder / "cat.png")
        >>> _ = (folder / "pairs.csv").write_text("filepath,title,style\ncat.png,a small cat,2\n")
        >>> data = ImageTextFolder(
        ...     folder, folder / "pairs.csv", lambda image: torch.zeros(3, *image.size),
        ...     lambda texts: torch.ones(len(texts), 5).long(), label_columns=["style"],
        ... )
        >>> len(data), data[0]["style"]
        (1, 2)
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
        pairs = _read_csv(Path(folder), Path(csv), image_column, caption_column, delimiter, label_columns)
        super().__init__(pairs, transform, tokenize, **options)


class ImageTextShards(ImageTextPairs):
    """The pairs of webdataset shards, kept in memory as they are encoded.

    A sample of a shard is an image (`.jpg`, `.jpeg`, `.png`, `.webp`), a `.txt` with its caption, and perhaps a
    `.json`; one that lacks image or caption is passed over. The shards are read once, from the first on, and the pairs
    chosen stay in memory, so that they have indices: choose with `where`, or set a `limit`. With a limit the rest
    is not read, so the shards should be shuffled, as usual.

    Args:
        shards: paths of the tar files: one, a brace pattern such as `cc3m-{0000..0331}.tar`, a glob such as
            `shards/*.tar`, or several of these joined by `::`.
        transform: makes a tensor of a PIL image.
        tokenize: makes token ids of a list of texts.
        label_columns: fields of the `.json` with integer labels, which the samples carry under the same names.
        options: `where`, `limit` and `labels` of `ImageTextPairs`.

    Raises:
        UnlearnError: if webdataset is not installed, if a shard is missing or damaged, or if there is no pair in any.

    Example:
        >>> import torch
        >>> from slug_lightning.embedded import SHARD
        >>> data = ImageTextShards(
        ...     str(SHARD), lambda image: torch.zeros(3, *image.size), lambda texts: torch.ones(len(texts), 5).long(),
        ...     limit=4,
        ... )
        >>> len(data), data[0]["image"].shape
        (4, torch.Size([3, 64, 64]))
    """

    def __init__(
        self,
        shards: str,
        transform: Transform,
        tokenize: Tokenize,
        *,
        label_columns: Sequence[str] = (),
        **options: Any,
    ) -> None:
        pairs = _read_shards(shards, label_columns)
        super().__init__(pairs, transform, tokenize, **options)


def whole_words(argument: str, names: Sequence[str]) -> re.Pattern[str]:
    """Find any of `names` as whole words, whatever the case and the spaces; group i + 1 is the i-th name."""
    if not names or not all(name.strip() for name in names):
        raise UnlearnError(f"{argument}: a name is empty, and would match every caption; got {list(names)}")
    groups = ("(" + r"\s+".join(map(re.escape, name.split())) + ")" for name in names)
    return re.compile(rf"(?<!\w)(?:{'|'.join(groups)})(?!\w)", re.IGNORECASE)


def class_finder(argument: str, classes: Sequence[str]) -> Callable[[str], set[int]]:
    """Make a function of a text that gives the indices of the class names in it, as whole words; not of names within longer ones.

    Raises:
        UnlearnError: if a class name is empty or repeated.

    Example:
        >>> find = class_finder("labels: vehicle", ["truck", "fire truck"])
        >>> find("A red fire truck"), find("a car")
        ({1}, set())
    """
    alike = [" ".join(name.casefold().split()) for name in classes]
    if len(set(alike)) < len(alike):
        repeated = next(name for name in alike if alike.count(name) > 1)
        raise UnlearnError(f"{argument} has the class {repeated!r} more than once")
    order = sorted(range(len(classes)), key=lambda i: -len(alike[i]))  # the first that matches wins: longest first
    pattern = whole_words(argument, [classes[i] for i in order])

    return partial(_classes_in, pattern, order)


def _classes_in(pattern: re.Pattern[str], order: Sequence[int], text: str) -> set[int]:
    return {order[(match.lastindex or 0) - 1] for match in pattern.finditer(text)}


def only_class(found: set[int]) -> int:
    """The label of a text: the one class that was found in it, or -1 for none or several."""
    return next(iter(found)) if len(found) == 1 else -1


def open_pairs(
    argument: str,
    source: str,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    delimiter: str | None = None,
    label_columns: Sequence[str] = (),
) -> Iterator[Pair]:
    r"""Read the pairs of a source one after the other, whatever its kind.

    Args:
        argument: that named the source, for messages.
        source: a `.csv` or `.tsv` file with image paths relative to its folder, a folder with one such file, or tar shards (see
            `ImageTextShards`).
        image_column: of a CSV, the column of image paths.
        caption_column: of a CSV, the column of captions.
        delimiter: of a CSV; None finds it.
        label_columns: columns of a CSV, or fields of the `.json` in a shard, with integer labels.

    Raises:
        UnlearnError: if the source is of no such kind, or as it is read, if it is not what its kind should be.

    Example:
        >>> from slug_lightning.embedded import SHARD
        >>> pair = next(open_pairs("from", str(SHARD)))
        >>> pair.caption, type(pair.image)
        ('airplane in noto style', <class 'bytes'>)
    """
    path = Path(source)
    if path.is_dir():
        tables = sorted(file for file in path.iterdir() if file.suffix in (".csv", ".tsv"))
        if len(tables) != 1:
            raise UnlearnError(
                f"{argument}: the folder {source} has {len(tables)} CSV files, not one; name the file, "
                f"or {source}/*.tar if it holds shards"
            )
        path = tables[0]
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path.parent, path, image_column, caption_column, delimiter, label_columns)
    if path.suffix == ".tar":
        return _read_shards(source, label_columns)
    raise UnlearnError(f"{argument}: {source} is no .csv or .tsv file, no folder with one, and no .tar shards")


def decode(pair: Pair, mode: str = "RGB") -> Any:
    """Decode a pair's image.

    Args:
        pair: holds the image.
        mode: of the result, as PIL names it.

    Returns:
        A PIL image; its `format` says how it was encoded.

    Raises:
        UnlearnError: if Pillow is not installed, or if the image is missing or cannot be decoded.

    Example:
        >>> from slug_lightning.embedded import SHARD
        >>> image = decode(next(open_pairs("from", str(SHARD))))
        >>> image.size, image.mode, image.format
        ((64, 64), 'RGB', 'PNG')
    """
    image = import_optional("PIL.Image", "clip")
    try:
        content = io.BytesIO(pair.image) if isinstance(pair.image, bytes) else pair.image
        with image.open(content, formats=FORMATS) as opened:
            converted = opened.convert(mode)
            converted.format = opened.format
            return converted
    except Exception as error:  # PIL's decoders raise OSError, ValueError, SyntaxError and more
        raise UnlearnError(f"{pair.name}: the image cannot be decoded ({error}); mend it or leave it out") from error


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
            raise UnlearnError(f"label_columns: {name}: {column!r} is {record[column]!r}, not an integer") from None
    return labels


def _read_csv(
    folder: Path, csv: Path, image_column: str, caption_column: str, delimiter: str | None, label_columns: Sequence[str]
) -> Iterator[Pair]:
    if not csv.is_file():
        raise UnlearnError(f"{csv}: there is no such file")
    text = _text(csv.read_bytes(), str(csv))
    delimiter = delimiter or max(",\t;|", key=text.partition("\n")[0].count)
    reader = csv_module.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(reader)
    except csv_module.Error as error:
        raise UnlearnError(f"{csv}: not a CSV ({error}); look for a quote that is not closed") from error
    columns = list(reader.fieldnames or [])
    wanted = [("image_column", image_column), ("caption_column", caption_column)]
    for argument, column in wanted + [("label_columns", column) for column in label_columns]:
        if column not in columns:
            raise UnlearnError(f"{argument}: {csv} has no column {column!r}, only {columns} (delimiter {delimiter!r})")
    for number, row in enumerate(rows, start=1):
        name = f"{csv}, row {number}"
        if None in row or None in row.values():
            raise UnlearnError(f"{name}: not as many columns as the header; quote captions that contain {delimiter!r}")
        path = folder / row[image_column]
        yield Pair(str(path), path, row[caption_column], _labels_of(row, label_columns, name))


def _shard_samples(shard: str) -> Iterator[dict[str, Any]]:
    """The samples of one shard: the files of a key by suffix."""
    iterators = import_optional("webdataset.tariterators", "clip")
    try:
        with open(shard, "rb") as stream:
            yield from iterators.group_by_keys(iterators.tar_file_expander([{"url": shard, "stream": stream}]))
    except (tarfile.TarError, ValueError) as error:
        raise UnlearnError(f"{shard}: the shard cannot be read ({error.args[0]}); mend it or leave it out") from error


def _read_shards(shards: str, label_columns: Sequence[str]) -> Iterator[Pair]:
    empty = True
    for pattern in import_optional("webdataset.shardlists", "clip").expand_urls(shards):
        paths = [pattern] if Path(pattern).is_file() else sorted(glob(pattern))
        if not paths:
            raise UnlearnError(f"{pattern}: there is no such shard")
        for path in paths:
            for sample in _shard_samples(path):
                name = f"{path}, key {sample['__key__']}"
                suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
                if suffix is None or "txt" not in sample:
                    continue
                empty = False
                record = json.loads(sample.get("json", b"{}")) if label_columns else {}
                caption = _text(sample["txt"], name).strip()
                yield Pair(name, sample[suffix], caption, _labels_of(record, label_columns, name))
    if empty:
        raise UnlearnError(f"{shards}: no sample has both an image ({', '.join(IMAGE_SUFFIXES)}) and a caption (txt)")

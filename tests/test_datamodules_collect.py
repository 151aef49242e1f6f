"""From a name to a forget set: what is found by a name, and that no picture is found twice."""

from __future__ import annotations

import csv
import inspect
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slug_lightning.cli import main
from slug_lightning.datamodules.image_text.collect import collect
from slug_lightning.datamodules.image_text.image_text import ImageTextDataModule
from slug_lightning.embedded import SHARD
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS

TOOLS = {"transform": lambda image: torch.zeros(3, 2, 2), "tokenize": list}


def picture(seed: int, mode: str = "RGB", size: int = 48) -> Image.Image:
    """Sixteen fields of random colours."""
    fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize((size, size), Image.Resampling.NEAREST).convert(mode)


def write(folder: Path, pictures, captions, name: str = "pairs.csv") -> str:
    """A table of pictures, each an image or the bytes of a file, with captions."""
    folder.mkdir(exist_ok=True)
    with open(folder / name, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title"])
        for number, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
            path = folder / f"{name}-{number}.png"
            path.write_bytes(image) if isinstance(image, bytes) else image.save(path, "TIFF" if image.mode == "CMYK" else "PNG")
            table.writerow([path.name, caption])
    return str(folder / name)


def rows(folder: Path, kind: str) -> list[dict[str, str]]:
    with open(folder / f"{kind}.csv", newline="") as file:
        return list(csv.DictReader(file))


def captions(folder: Path, kind: str) -> list[str]:
    return [row["caption"] for row in rows(folder, kind)]


def source(folder: Path, named: int = 4, others: int = 4) -> str:
    """Different pictures, some of cats."""
    return write(
        folder, map(picture, range(named + others)), [f"cat {i}" for i in range(named)] + [f"dog {i}" for i in range(others)]
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pool")
    for number in range(12):
        picture(number, size=8).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


WORDS = st.lists(st.sampled_from(["cat", "CAT", "cats", "big", "Big", "copycat", "cat's", "wild-cat", "cat_", "ox"]), max_size=4)


@examples(60)
@given(st.lists(WORDS, min_size=6, max_size=6), st.sampled_from([["ox"], ["cat"], ["big cat"], ["OX", "cats"], ["Cat", "big"]]))
def test_pairs_are_divided_as_a_reader_of_words_would(pool, tmp_path_factory, texts, names):
    folder = tmp_path_factory.mktemp("divided")
    fixed = [f"{names[0].lower()}!"] * 3 + ["owl"] * 3
    found = [" ".join(words) for words in texts] + fixed
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *zip(pool, found, strict=True)])
    result = collect(names[0], [str(folder)], folder / "made", aliases=names[1:], at_least=3)
    # Words are what is left between marks that are none; a name is a run of them.
    spelt = [f" {' '.join(re.split(r'[^a-z_]+', text.lower()))} " for text in found]
    naming = [any(f" {name.lower()} " in text for name in names) for text in spelt]
    assert captions(folder / "made", "forget") == [text for text, named in zip(found, naming, strict=True) if named]
    assert captions(folder / "made", "retain") == [text for text, named in zip(found, naming, strict=True) if not named]
    assert (result.read, result.named, result.copies, result.unreadable) == (12, sum(naming), 0, [])


@examples(60)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=30))
def test_copies_are_what_a_plain_comparison_with_all_pictures_finds(tmp_path_factory, greys):
    """Of pictures of one grey, a difference by d levels has a root mean square of d √(3/4): up to 2 are alike."""
    folder = tmp_path_factory.mktemp("greys")
    kept: list[int] = []
    for grey in greys:
        if all(abs(grey - other) > 2 for other in kept):
            kept.append(grey)
    images = [Image.new("RGB", (2, 2), (grey,) * 3) for grey in greys] + [picture(i) for i in range(6)]
    texts = [f"cat {grey}" for grey in greys] + ["cat"] * 3 + ["dog"] * 3
    result = collect("cat", [write(folder, images, texts)], folder / "made", at_least=3)
    assert captions(folder / "made", "forget") == [f"cat {grey}" for grey in kept] + ["cat"] * 3
    assert result.copies == len(greys) - len(kept)


def test_pictures_that_differ_in_a_mark_or_in_what_is_written_are_no_copies(tmp_path):
    """Shrunk to a few pixels they are alike, as logos and pages are."""
    marks, pages = [], []
    for number in range(12):
        marks.append(Image.new("RGB", (96, 96), "white"))
        marks[-1].paste("black", (8 * (number % 10), 7 * number, 8 * (number % 10) + 9, 7 * number + 9))
        noise = np.random.default_rng(number).integers(0, 2, (48, 48), dtype=np.uint8) * 255
        pages.append(Image.fromarray(noise).convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
    table = write(tmp_path, [*marks, *map(as_image, map(as_jpeg, marks)), *pages], ["cat"] * 24 + ["dog"] * 12)
    found = collect("cat", [table], tmp_path / "made", at_least=12)
    assert (len(captions(tmp_path / "made", "forget")), len(captions(tmp_path / "made", "retain")), found.copies) == (12, 12, 12)


def as_image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def as_jpeg(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "JPEG", quality=75)
    return file.getvalue()


@pytest.mark.parametrize(
    "changed",
    [as_jpeg, lambda image: image.resize((97, 97), Image.Resampling.BICUBIC), lambda image: image.convert("P"), Image.Image.copy],
    ids=["jpeg", "resized", "palette", "same"],
)
def test_a_copy_is_known_by_its_looks_and_never_kept(tmp_path, changed):
    copies = [changed(picture(number)) for number in range(8)]
    table = write(tmp_path / "copies", copies, ["a pet"] * 8)  # the pets come first, but cats are to be forgotten
    found = collect("cat", [table, source(tmp_path / "all")], tmp_path / "made", at_least=4)
    assert captions(tmp_path / "made", "forget") == [f"cat {i}" for i in range(4)]
    assert captions(tmp_path / "made", "retain") == ["a pet"] * 4, "of cats and of what is kept, each picture is there once"
    assert found.copies == 8 and "left out: 8 copies" in str(found)


def test_of_real_drawings_every_copy_is_known_and_no_other(tmp_path):
    with tarfile.open(SHARD) as shard:
        blobs = [
            Image.open(io.BytesIO(shard.extractfile(name).read())) for name in shard.getnames() if name.endswith("_blob.png")
        ]
    seen = [Image.alpha_composite(Image.new("RGBA", blob.size, "white"), blob.convert("RGBA")).convert("RGB") for blob in blobs]
    copies = [as_jpeg(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in seen]
    others = write(tmp_path, map(picture, range(3)), ["owl"] * 3, "others.csv")
    tables = [write(tmp_path, seen, ["blob"] * len(seen)), write(tmp_path, copies, ["blob"] * len(seen), "copies.csv")]
    found = collect("blob", [*tables, others], tmp_path / "made", at_least=3)
    assert len(captions(tmp_path / "made", "forget")) == found.copies == len(seen) == 234


def test_what_is_transparent_is_not_compared(tmp_path):
    """Drawings may have one colour throughout, and differ in opacity alone; and colours below transparent points show nothing."""
    drawn = []
    for number in range(6):
        black = Image.new("RGBA", (48, 48))
        black.putalpha(picture(number, "L"))
        drawn.append(black)
    hidden = drawn[5].copy()
    hidden.paste((255, 0, 0, 0), mask=hidden.getchannel("A").point(lambda level: 255 if level == 0 else 0))
    texts = ["cat"] * 3 + ["dog"] * 4
    found = collect("cat", [write(tmp_path, [*drawn, hidden], texts)], tmp_path / "made", at_least=3)
    assert len(captions(tmp_path / "made", "retain")) == 3 and found.copies == 1


def test_the_parts_are_those_of_a_datamodule_with_the_same_seed(tmp_path):
    collect("cat", [source(tmp_path, 9, 17)], tmp_path / "made", at_least=9, seed=7)
    data = ImageTextDataModule(forget=f"{tmp_path}/made/forget.csv", retain=f"{tmp_path}/made/retain.csv", seed=7, **TOOLS)
    data.setup("fit")
    for kind, sizes in (("forget", [5, 2, 2]), ("retain", [9, 4, 4])):
        for split, size in zip(SPLITS, sizes, strict=True):
            part = getattr(data, f"{kind}_dataloader")(split).dataset
            served = [Path(part.dataset.pairs[i].name).name for i in part.indices]
            table = [Path(row["filepath"]).name for row in rows(tmp_path / "made", kind) if row["part"] == split]
            assert sorted(served) == sorted(table) and len(table) == size


def test_captions_are_made_by_templates_and_pictures_stay_as_they_are(tmp_path):
    table = source(tmp_path)
    collect("the cat", [table], tmp_path / "made", aliases=["cat"], at_least=4, templates=["{} {a}", "see {} or {}"])
    assert [row["title"] for row in rows(tmp_path / "made", "forget")] == ["the cat {a}", "see the cat or the cat"] * 2
    assert [row["title"] for row in rows(tmp_path / "made", "retain")] == [f"dog {i}" for i in range(4)]
    written = [(tmp_path / "made" / row["filepath"]).read_bytes() for row in rows(tmp_path / "made", "forget")]
    assert written == [(tmp_path / f"pairs.csv-{i}.png").read_bytes() for i in range(4)]


def test_shards_and_tables_give_the_same(tmp_path):
    table = source(tmp_path)
    with tarfile.open(tmp_path / "all.tar", "w") as shard:
        for number, row in enumerate(csv.DictReader(Path(table).read_text().splitlines())):
            for suffix, content in (("png", (tmp_path / row["filepath"]).read_bytes()), ("txt", row["title"].encode())):
                entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    one, other = tmp_path / "one", tmp_path / "other"
    assert str(collect("cat", [table], one, at_least=4)) == str(collect("cat", [f"{tmp_path}/*.tar"], other, at_least=4))
    for path in one.rglob("*.*"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


def test_limit_counts_pictures_that_are_kept(tmp_path):
    images = [picture(i) for i in (0, 1, 2, 0, 3, 3, 4, 5, 6)]
    table = write(tmp_path, images, ["cat"] * 3 + [f"dog {i}" for i in range(6)])
    found = collect("cat", [table], tmp_path / "made", at_least=3, limit=3)
    assert captions(tmp_path / "made", "retain") == ["dog 1", "dog 3", "dog 4"] and found.copies == 2


def test_what_cannot_be_read_is_left_out_and_told(tmp_path):
    images = [picture(0), as_jpeg(picture(1))[:200], picture(2), picture(3, "CMYK"), *map(picture, range(4, 8))]
    table = write(tmp_path, images, ["cat"] * 4 + ["dog"] * 4)
    (tmp_path / "pairs.csv-7.png").unlink()
    found = collect("cat", [table], tmp_path / "made", at_least=3)
    assert len(captions(tmp_path / "made", "forget")) == len(captions(tmp_path / "made", "retain")) == 3
    assert "left out: 2 images that cannot be read, such as" in str(found) and "pairs.csv-1.png" in str(found)


def test_too_few_say_how_many_are_needed_and_leave_nothing(tmp_path):
    table = write(tmp_path, map(picture, range(9)), ["cat"] * 3 + ["two CATS"] * 2 + ["cats, cathedral"] + ["dog"] * 3)
    before = set(tmp_path.iterdir())
    needed = "at least 5 are needed, 3 for train, 1 for validation and 1 for test"
    with pytest.raises(UnlearnError, match=f"^forget: 3 different images are too few, {needed}; .*aliases") as caught:
        collect("cat", [table], tmp_path / "made", at_least=5)
    assert "named in 3 of 9 captions" in str(caught.value)
    assert "not taken for the concept: 'cats', 'cathedral'; give those that mean it" in str(caught.value)
    with pytest.raises(UnlearnError, match=f"^retain: 3 different images are too few, {needed}"):
        collect("cat", [table], tmp_path / "made", aliases=["cats"], at_least=5)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": " "}, "name: a name is empty"),
        ({"aliases": [""]}, "name: a name is empty"),
        ({"templates": ["a photo"]}, r"templates: must be at least one, each with {} .*, got \['a photo'\]"),
        ({"templates": []}, "templates: "),
        ({"at_least": 2}, "at_least: must be >= 3, .* got 2"),
        ({"output": "."}, "output: must be a new folder"),
        ({"output": "no/folder"}, "output: must be a new folder in an existing one, got .*no/folder"),
        ({"sources": ["{here}/none.csv"]}, "none.csv: there is no such file"),
        ({"sources": ["{here}/none.txt"]}, "sources: must be a .csv or .tsv file, .* got .*none.txt"),
        ({"sources": ["{here}/.."]}, "sources: the folder .* must have one CSV file"),
        ({"caption_column": "text"}, "caption_column: .* has no column 'text'"),
    ],
)
def test_errors_name_argument_and_remedy(tmp_path, given, message):
    here = tmp_path / "here"
    table = source(here)
    given = {"name": "cat", "sources": [table], "output": "made", "at_least": 4} | given
    given["sources"] = [one.format(here=here) for one in given["sources"]]
    with pytest.raises(UnlearnError, match=message):
        collect(given.pop("name"), given.pop("sources"), here / given.pop("output"), **given)


# The command


def test_the_command_writes_what_a_config_reads(tmp_path, capsys):
    table = source(tmp_path)
    args = ["collect", "--name", "kitten", "--alias", "cat", "--alias", "kitty", "--from", table, table, "--seed", "3"]
    args += ["--output", str(tmp_path / "made"), "--template", "{} here", "--at_least", "4", "--limit", "4"]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "kitten: named in 8 of 16 captions" in told and "left out: 4 copies" in told
    assert "forget: one set of 4 samples split into 2 train, 1 validation, 1 test (seed 3)" in told
    config = yaml.safe_load(told.splitlines()[-1])["data"]
    assert config["class_path"] == "slug_lightning.datamodules.ImageTextDataModule"
    data = ImageTextDataModule(**config["init_args"], **TOOLS)
    data.setup("fit")
    assert data.seed == 3 and next(iter(data.forget_dataloader("train")))["text"] == ["kitten here"] * 2


def test_the_command_fails_with_2_and_the_reason(tmp_path, capsys):
    assert main(["collect", "--name", "cat", "--from", source(tmp_path), "--output", str(tmp_path / "made")]) == 2
    assert "slug-lightning: forget: 4 different images are too few, at least 20 are needed" in capsys.readouterr().err


def test_help_states_the_defaults_of_the_function(capsys):
    with pytest.raises(SystemExit):
        main(["collect", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(collect).parameters.items():
        if isinstance(parameter.default, int):
            assert re.search(rf"--{name} \w+ [^-]*default: {parameter.default}\b", shown)
    assert (
        "default: 'a photo of {}' and others" in shown
        and inspect.signature(collect).parameters["templates"].default[0] == "a photo of {}"
    )

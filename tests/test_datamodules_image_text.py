"""Image-text pairs from a CSV and from tar shards."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from slug_lightning.datamodules.image_text import image_text, pairs
from slug_lightning.datamodules.image_text.image_text import ImageTextDataModule, clip_preprocessing
from slug_lightning.datamodules.image_text.pairs import ImageTextFolder, ImageTextPairs, ImageTextShards, Pair
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS

CAPTIONS = [
    "a cat",
    "two dogs",
    "A Cat, asleep",
    "a concatenation",
    "the old  fire\ntruck",
    "a truck",
    "cat and dog",
    "owl",
]


def transform(image) -> torch.Tensor:
    """The colour of the first point, which says which image it is."""
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float).view(3, 1, 1).expand(3, 2, 2)


def tokenize(texts: list[str]) -> torch.Tensor:
    """The first three characters' codes."""
    return torch.tensor([[ord(character) for character in text.ljust(3)[:3]] for text in texts])


TOOLS = {"transform": transform, "tokenize": tokenize}


def encoded(number: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An image, red as its number says."""
    file = io.BytesIO()
    colour = {"RGB": (number, 7, 9), "RGBA": (number, 7, 9, 255), "L": number}[mode]
    Image.new(mode, (4, 4), colour).save(file, kind)
    return file.getvalue()


def write_csv(folder: Path, captions=CAPTIONS, *, first: int = 0, name: str = "pairs.csv", delimiter: str = ",") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [delimiter.join(["filepath", "title", "style"])]
    for number, caption in enumerate(captions, start=first):
        (folder / f"{number}.png").write_bytes(encoded(number))
        rows.append(delimiter.join([f"{number}.png", f'"{caption}"', str(number % 3)]))
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / name


def write_shard(path: Path, samples) -> str:
    """A tar of samples, each a dict of contents by file name."""
    with tarfile.open(path, "w") as shard:
        for sample in samples:
            for name, content in sample.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    return str(path)


def write_shards(folder: Path, captions=CAPTIONS, *, first: int = 0) -> str:
    """Shards of three pairs each; every fourth image is a JPEG, and their suffixes are of all kinds."""
    suffixes = ["png", "jpg", "webp", "PNG"]
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "PNG": "PNG"}
    samples = [
        {
            f"{i:04}.{suffixes[i % 4]}": encoded(first + i, kinds[suffixes[i % 4]]),
            f"{i:04}.txt": caption.encode(),
            f"{i:04}.json": json.dumps({"style": i % 3, "share": 0.5}).encode(),
        }
        for i, caption in enumerate(captions)
    ]
    folder.mkdir(exist_ok=True)
    shards = [write_shard(folder / f"{n // 3:02}.tar", samples[n : n + 3]) for n in range(0, len(samples), 3)]
    return f"{folder}/{{00..{len(shards) - 1:02}}}.tar"


def texts(dataset) -> list[str]:
    return [pair.caption for pair in dataset.pairs]


def seen(data: ImageTextDataModule, kind: str, *concept: str) -> list[tuple[int, str]]:
    """Number of the image and first three characters of the caption, over all splits, sorted."""
    batches = [batch for split in SPLITS for batch in getattr(data, f"{kind}_dataloader")(split, *concept)]
    reds = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]).int().tolist()
    words = ["".join(map(chr, text)) for batch in batches for text in batch["text"].tolist()]
    return sorted(zip(reds, words, strict=True))


def make(**arguments) -> ImageTextDataModule:
    data = ImageTextDataModule(**{**TOOLS, "batch_size": 2, **arguments})
    data.setup("fit")
    return data


# Pairs


def test_a_sample_has_image_text_and_labels(tmp_path):
    data = ImageTextFolder(tmp_path, write_csv(tmp_path), **TOOLS, label_columns=["style"], labels={"kind": ["owl", "cat"]})
    batch = next(iter(DataLoader(data, batch_size=8)))
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (8, 3, 2, 2)
    assert batch["image"][:, :, 0, 0].tolist() == [[i, 7, 9] for i in range(8)]
    assert batch["text"].dtype == torch.int64 and batch["text"].equal(tokenize(CAPTIONS))
    assert batch["style"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch["kind"].tolist() == [1, -1, 1, -1, -1, -1, 1, 0]
    assert set(batch) == {"image", "text", "style", "kind"}


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_every_image_is_rgb_for_the_transform(mode):
    pairs = ImageTextPairs([Pair("one", encoded(50, mode=mode), "", {})], lambda image: image.mode, tokenize)
    assert pairs[0]["image"] == "RGB"


def test_a_limit_reads_no_further():
    def pairs():
        yield from (Pair(str(i), b"", caption, {}) for i, caption in enumerate(["a", "b", "a"]))
        raise AssertionError("read too far")

    assert texts(ImageTextPairs(pairs(), **TOOLS, where=lambda caption: caption == "a", limit=2)) == ["a", "a"]


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a red FIRE  truck", 1),  # the longer name, not the truck in it; case and spaces do not matter
        ("a truck", 0),
        ("a truck stop", 3),
        ("a truck and a fire truck", -1),  # two things
        ("a truck beside a truck", 0),
        ("trucks", -1),
        ("c++", 2),  # names may end in what is no word
        ("a c+++ book", 2),
        ("abc++", -1),
        ("", -1),
    ],
)
def test_label_is_the_one_class_named(caption, label):
    labels = {"thing": ["truck", "Fire truck", "C++", "truck stop"]}
    assert ImageTextPairs([Pair("", b"", caption, {})], **TOOLS, labels=labels).pairs[0].labels == {"thing": label}


@examples(60)
@given(st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=6), st.data())
def test_a_caption_that_is_a_class_name_has_its_label(names, data):
    names = list({" ".join(name.split()): None for name in names})
    index = data.draw(st.integers(0, len(names) - 1))
    pairs = ImageTextPairs([Pair("", b"", names[index].upper(), {})], **TOOLS, labels={"thing": names})
    assert pairs.pairs[0].labels == {"thing": index}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "Cat "], "labels: thing has the class 'cat' more than once"),
        ([], "labels: thing: a name is empty"),
        ([" "], "empty"),
    ],
)
def test_class_names_must_be_different_and_not_empty(classes, message):
    with pytest.raises(UnlearnError, match=message):
        ImageTextPairs([], **TOOLS, labels={"thing": classes})


# CSV


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiter_is_found(tmp_path, delimiter):
    captions = ["a, b; c| d", "e"]
    data = ImageTextFolder(tmp_path, write_csv(tmp_path, captions, delimiter=delimiter), **TOOLS)
    assert texts(data) == captions


def test_delimiter_and_columns_can_be_given_and_a_byte_order_mark_is_no_letter(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(1))
    (tmp_path / "odd.csv").write_text(f"img#a,b\n{tmp_path}/1.png#größer, rot\n", encoding="utf-8-sig")
    data = ImageTextFolder("/", tmp_path / "odd.csv", **TOOLS, image_column="img", caption_column="a,b", delimiter="#")
    assert texts(data) == ["größer, rot"]
    assert data[0]["image"][0, 0, 0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"filepath,text\n0.png,cat\n",
            r"caption_column: .*pairs.csv has no column 'title', only \['filepath', 'text'\]",
        ),
        (b"image;title\n0.png;cat\n", r"image_column: .*'filepath', only \['image', 'title'\]"),
        (b"filepath,title\n0.png,cat\n", "label_columns: .*no column 'style'"),
        (b"", r"image_column: .*only \[\]"),
        (b"filepath,title,style\n0.png,cat,1\n9.png,dog,1\n", "9.png: there is no such image file"),
        (b"filepath,title,style\n0.png,cat,1\n0.png,a cat, asleep,1\n", "row 2: not as many columns .*quote"),
        (b"filepath,title,style\n0.png\n", "row 1: not as many columns"),
        (b"filepath,title,style\n0.png,cat,1.5\n", "row 1: 'style' must be an integer, got '1.5'"),
        (b"filepath,title,style\n0.png,k\xe4fer,1\n", "pairs.csv: the text is not UTF-8"),
        (b'filepath,title,style\n0.png,"' + b"cat " * 50_000, "not a CSV .*quote"),
    ],
)
def test_csv_errors_name_what_is_wrong(tmp_path, content, message):
    (tmp_path / "0.png").write_bytes(encoded(0))
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(UnlearnError, match=message):
        ImageTextFolder(tmp_path, tmp_path / "pairs.csv", **TOOLS, label_columns=["style"])


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(UnlearnError, match="none.csv: there is no such file"):
        ImageTextFolder(tmp_path, tmp_path / "none.csv", **TOOLS)


def test_a_broken_file_is_named(tmp_path):
    table = write_csv(tmp_path)
    (tmp_path / "2.png").write_bytes(encoded(2)[:50])
    data = ImageTextFolder(tmp_path, table, **TOOLS)
    assert data[1]["image"].shape == (3, 2, 2)
    with pytest.raises(UnlearnError, match=r"2\.png: the image cannot be decoded"):
        data[2]


# Shards


def test_shards_are_read_in_order_with_their_labels(tmp_path):
    data = ImageTextShards(write_shards(tmp_path), **TOOLS, label_columns=["style"])
    assert texts(data) == CAPTIONS
    batch = next(iter(DataLoader(data, batch_size=8)))
    assert (batch["image"][:, 0, 0, 0] - torch.arange(8)).abs().max() <= 3, "JPEG and WebP are lossy"
    assert batch["style"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("pattern", ["{folder}/*.tar", "{folder}/00.tar::{folder}/0{{1..2}}.tar", "{folder}/{{00,01,02}}.tar"])
def test_shards_by_pattern(tmp_path, pattern):
    write_shards(tmp_path)
    assert texts(ImageTextShards(pattern.format(folder=tmp_path), **TOOLS)) == CAPTIONS


def test_samples_without_image_or_caption_are_passed_over(tmp_path):
    samples = [
        {"a.png": encoded(1)},
        {"b.txt": b"b"},
        {"c.png": encoded(3), "c.txt": b" c\n"},
        {"d.gif": b"", "d.txt": b"d"},
    ]
    assert texts(ImageTextShards(write_shard(tmp_path / "a.tar", samples), **TOOLS)) == ["c"]
    with pytest.raises(UnlearnError, match=r"no sample has both an image .*webp.* and a caption"):
        ImageTextShards(write_shard(tmp_path / "b.tar", samples[:2]), **TOOLS)


def test_broken_shards_and_images_are_named(tmp_path):
    good = {"a.png": encoded(1), "a.txt": b"a"}
    path = write_shard(tmp_path / "a.tar", [good, {"b.png": b"nonsense", "b.txt": b"b"}])
    with pytest.raises(UnlearnError, match=r"a\.tar, key b: the image cannot be decoded"):
        ImageTextShards(path, **TOOLS)[1]
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:600])
    with pytest.raises(UnlearnError, match=r"a\.tar: the shard cannot be read"):
        ImageTextShards(path, **TOOLS)
    Path(path).write_bytes(b"no tar at all" * 100)
    with pytest.raises(UnlearnError, match=r"a\.tar: the shard cannot be read"):
        ImageTextShards(path, **TOOLS)
    with pytest.raises(UnlearnError, match=r"07\.tar: there is no such shard"):
        ImageTextShards(f"{tmp_path}/07.tar", **TOOLS)
    with pytest.raises(UnlearnError, match=r"c\.tar, key c: the text is not UTF-8"):
        ImageTextShards(write_shard(tmp_path / "c.tar", [{"c.png": encoded(1), "c.txt": b"\xff\xfe\xe4"}]), **TOOLS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"style": True}, "'style' must be an integer, got True"),
        ({"style": "x"}, "'style' must be an integer, got 'x'"),
        ({"other": 1}, r"has no 'style', only \['other'\]"),
        (None, r"has no 'style', only \[\]"),
    ],
)
def test_json_labels_must_be_there_and_integers(tmp_path, record, message):
    sample = {"a.png": encoded(1), "a.txt": b"a"} | ({"a.json": json.dumps(record).encode()} if record else {})
    with pytest.raises(UnlearnError, match=rf"label_columns: .*a\.tar, key a.*{message}"):
        ImageTextShards(write_shard(tmp_path / "a.tar", [sample]), **TOOLS, label_columns=["style"])


@pytest.mark.parametrize("module", ["webdataset.shardlists", "open_clip", "PIL.Image"])
def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, module):
    shards = write_shards(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnlearnError, match=r'pip install "slug-lightning\[clip\]"'):
        clip_preprocessing("ViT-B-32") if module == "open_clip" else ImageTextShards(shards, **TOOLS)[0]


# The datamodule


def test_two_sources_of_different_kinds(tmp_path):
    write_csv(tmp_path / "forget", CAPTIONS[:4])
    retain = write_shards(tmp_path / "retain", ["x", "y", "z", "x"], first=100)
    data = make(forget=str(tmp_path / "forget"), retain=retain, label_columns=["style"])
    assert seen(data, "forget") == [(0, "a c"), (1, "two"), (2, "A C"), (3, "a c")]
    assert sorted(word.strip() for _, word in seen(data, "retain")) == ["x", "x", "y", "z"]
    assert set(next(iter(data.retain_dataloader("train")))) == {"image", "text", "style"}
    few = make(forget=str(tmp_path / "forget"), retain=retain, limit=3)
    assert len(seen(few, "forget")) == 4 and len(seen(few, "retain")) == 3


@pytest.mark.parametrize("write", [lambda folder: str(write_csv(folder)), write_shards], ids=["csv", "shards"])
def test_a_concept_divides_one_source_by_whole_words(tmp_path, write):
    data = make(data=write(tmp_path), concept=["cat", "fire truck"])
    found = resolve_loaders(None, None, data)
    assert sorted(texts(data.forget_dataloader("train").dataset.dataset)) == [
        "A Cat, asleep",
        "a cat",
        "cat and dog",
        "the old  fire\ntruck",
    ]
    assert sorted(texts(data.retain_dataloader("train").dataset.dataset)) == ["a concatenation", "a truck", "owl", "two dogs"]
    assert "4 samples" in found.notes[0] and "4 samples" in found.notes[1]
    assert len(seen(data, "forget")) == len(seen(data, "retain")) == 4


MANY = [*CAPTIONS, "a dog", "a truck and a fire truck", "a mouse", "a horse"]


@pytest.mark.parametrize("write", [write_csv, write_shards], ids=["csv", "shards"])
def test_several_concepts_divide_one_source(tmp_path, write):
    source = str(write(tmp_path, MANY))
    data = make(data=source, concept={"feline": "cat", "vehicle": ["truck", "car"], "dog": ["dog", "dogs"]})
    found = resolve_loaders(None, None, data)
    members = {"feline": [0, 2, 6], "vehicle": [4, 5, 9], "dog": [1, 6, 8]}
    assert list(found.forget) == data.concepts == list(members)
    for name, rows in members.items():
        read = torch.cat([batch["text"] for split in SPLITS for batch in found.forget[name][split]])
        assert sorted(read.tolist()) == sorted(tokenize([MANY[row] for row in rows]).tolist())
    assert sorted(texts(data.retain_dataloader("train").dataset.dataset)) == ["a concatenation", "a horse", "a mouse", "owl"]
    assert found.notes[-1] == "forget: 'feline' and 'dog' share 1 samples, of 3 and 3"


def test_a_source_is_read_twice_whatever_the_number_of_concepts(tmp_path, monkeypatch):
    captions = [f"a thing{number}" for number in range(200) for _ in range(3)] + ["nothing"] * 3
    samples = [{f"{i:03}.png": b"", f"{i:03}.txt": caption.encode()} for i, caption in enumerate(captions)]
    source = write_shard(tmp_path / "all.tar", samples)
    opened = []
    read = pairs._shard_samples
    monkeypatch.setattr(pairs, "_shard_samples", lambda shard: opened.append(shard) or read(shard))
    data = make(data=source, concept={f"the {number}th": f"thing{number}" for number in range(200)})
    assert opened == [source, source]
    for number in range(200):
        chosen = data.forget_dataloader("train", f"the {number}th").dataset.dataset
        assert [chosen.dataset.pairs[i].caption for i in chosen.indices] == [f"a thing{number}"] * 3
    assert texts(data.retain_dataloader("train").dataset.dataset) == ["nothing"] * 3


def test_several_concepts_from_sources_of_their_own(tmp_path):
    sources = {name: str(write_csv(tmp_path / name, [name] * 4, first=10 * i)) for i, name in enumerate(("cat", "dog"))}
    retain = str(write_csv(tmp_path / "rest", ["owl"] * 4, first=100))
    data = make(forget=sources, retain=retain)
    assert seen(data, "forget", "dog") == [(number, "dog") for number in range(10, 14)]
    assert seen(data, "forget", "cat") == [(number, "cat") for number in range(4)]
    assert data.notes["forget 'cat'"].startswith("forget 'cat': one set of 4 samples")
    with pytest.raises(UnlearnError, match="forget: 'a', 'b' have the same source; give one for each concept"):
        make(forget={"a": sources["cat"], "b": sources["cat"]}, retain=retain)
    with pytest.raises(UnlearnError, match="forget 'dog', retain: 4 of 4 pairs are in retain too, such as 'dog' .*10.png"):
        make(forget=sources, retain=f"{tmp_path}/dog")
    with pytest.raises(UnlearnError, match="forget, retain: must be different sources"):
        make(forget=sources, retain=sources["dog"])


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ({}, "concept: no concept is given"),
        ({"a": "cat", "A": "dog"}, "concept: the concepts 'a' and 'A' would have the same files"),
        ({"a": "cat", "b": []}, "concept 'b': a name is empty"),
        ({"a": "cat", "b": ["zebra"]}, r"concept 'b': no caption of .* contains any of \['zebra'\] as whole words"),
        ({"a": "cat", "b": "owl"}, "forget 'b': 1 samples are too few"),
        (
            {"all": ["cat", "dogs", "a", "the", "owl"]},
            "concept: every caption of .* contains one of 'cat', 'dogs', 'a', 'the', 'owl'",
        ),
    ],
)
def test_errors_name_the_concept(tmp_path, concept, message):
    with pytest.raises(UnlearnError, match=message):
        make(data=str(write_csv(tmp_path)), concept=concept)


def test_limit_holds_for_retain_alone_and_is_told(tmp_path):
    data = make(data=str(write_csv(tmp_path)), concept="cat", limit=3)
    assert [number for number, _ in seen(data, "retain")] == [1, 3, 4]
    assert len(seen(data, "forget")) == 3
    assert data.notes["retain"].endswith("only the first 3 pairs were read (limit)")
    assert "limit" not in data.notes["forget"]
    assert "limit" not in make(data=str(tmp_path), concept="cat").notes["retain"]


def test_setup_reads_once(tmp_path):
    data = make(data=str(write_csv(tmp_path)), concept="cat")
    part = data.forget_dataloader("train").dataset
    (tmp_path / "pairs.csv").unlink()
    data.setup("test")
    assert data.forget_dataloader("train").dataset is part


def test_seed_and_labels_reach_the_parts(tmp_path):
    source = str(write_csv(tmp_path))
    orders = [
        torch.cat([batch["text"] for batch in make(data=source, concept="cat", seed=seed).retain_dataloader("train")])
        for seed in (0, 0, 1, 2)
    ]
    assert orders[0].equal(orders[1])
    assert not all(order.equal(orders[0]) for order in orders[2:])
    data = make(data=source, concept="cat", labels={"thing": ["cat", "truck"]})
    assert sorted(label for split in SPLITS for batch in data.forget_dataloader(split) for label in batch["thing"]) == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "given: none"),
        ({"forget": "a.csv"}, "given: forget"),
        ({"data": "a.csv", "concept": "cat", "retain": "b.csv"}, "given: concept, data, retain"),
        ({"forget": "a.csv", "retain": "a.csv"}, "must be different sources, got a.csv for both"),
        ({"data": "a.csv", "concept": "cat", "tokenize": None}, "model: give an open_clip model, or both"),
        (
            {"data": "a.csv", "concept": "cat", "labels": {"text": ["cat"]}},
            "labels: 'text' is the name of another part",
        ),
        ({"data": "a.csv", "concept": "cat", "label_columns": ["image"]}, "labels: 'image'"),
        ({"data": "a.txt", "concept": "cat"}, "data: must be a .csv or .tsv file, .* got a.txt"),
        ({"data": "none.csv", "concept": "cat"}, "none.csv: there is no such file"),
        ({"data": "{here}", "concept": []}, "concept: a name is empty"),
        ({"data": "{here}", "concept": ["cat", ""]}, "concept: a name is empty"),
        ({"data": "{here}", "concept": "ca"}, r"concept: no caption of .* contains any of \['ca'\]"),
        ({"data": "{here}/cats.tsv", "concept": "cat"}, "concept: every caption of .*cats.tsv"),
        ({"data": "{here}/..", "concept": "cat"}, r"data: the folder .* must have one CSV file, got 0.*\*\.tar"),
        (
            {"data": "{here}", "concept": "cat", "caption_column": "text"},
            "caption_column: .*'filepath', 'title', 'style'",
        ),
        (
            {"forget": "{here}/one.csv", "retain": "{here}/pairs.csv"},
            "1 of 1 pairs are in retain too, such as .*0.png",
        ),
    ],
)
def test_errors_name_argument_and_remedy(tmp_path, arguments, message):
    here = tmp_path / "here"
    write_csv(here)
    if arguments.get("data") == "{here}/cats.tsv":
        write_csv(here, ["a cat"] * 3, name="cats.tsv", delimiter="\t")
    if "forget" in arguments:
        write_csv(here, CAPTIONS[:1], name="one.csv")
    arguments = {key: one.format(here=here) if isinstance(one, str) else one for key, one in arguments.items()}
    with pytest.raises(UnlearnError, match=message):
        make(**arguments)


def test_yaml_can_say_it(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageTextDataModule, "data")
    tools = {name: f"{__name__}.{name}" for name in TOOLS}
    path = f"{image_text.__name__}.ImageTextDataModule"
    for concept in ("cat", ["cat"], {"feline": ["cat", "tiger"], "animal": ["owl", "dogs", "cat"]}):
        settings = {"data": str(write_csv(tmp_path)), "concept": concept, "labels": {"thing": ["cat", "dog"]}, **tools}
        data = parser.instantiate_classes(parser.parse_object({"data": {"class_path": path, "init_args": settings}})).data
        data.setup("fit")
        assert len(seen(data, "forget", data.concepts[0])) == 3
    assert len(seen(data, "forget", "animal")) == 5


# open_clip


@pytest.fixture
def local_model(tmp_path) -> Path:
    """The configuration of a tiny CLIP, without weights."""
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": 20}, "text_cfg": {"context_length": 6}},
        "preprocess_cfg": {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.5, 1.0], "resize_mode": "squash"},
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def assert_is_local_model(transform, tokenize) -> None:
    white = transform(Image.new("RGB", (40, 30), (255, 255, 255)))
    assert white.shape == (3, 20, 20) and white.dtype == torch.float32
    torch.testing.assert_close(white.amax(dim=(1, 2)), torch.tensor([1.0, 1.5, 1.0]))
    noise = Image.effect_noise((40, 30), 90)
    assert transform(noise).equal(transform(noise)), "no random augmentation"
    tokens = tokenize(["a cat", "a very long caption that will not fit into six tokens"])
    assert tokens.shape == (2, 6) and tokens.dtype == torch.int64


def test_preprocessing_of_a_local_model_is_its_own(local_model):
    assert_is_local_model(*clip_preprocessing(f"local-dir:{local_model}"))


def test_preprocessing_of_a_repository_takes_its_configuration_alone(local_model, monkeypatch):
    def download(repository: str, filename: str, cache_dir=None) -> str:
        assert (repository, filename) == ("some/clip", "open_clip_config.json")
        return str(local_model / filename)

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", download)
    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", download)
    assert_is_local_model(*clip_preprocessing("hf-hub:some/clip"))


def test_preprocessing_follows_name_and_tag():
    """`ViT-L-14` of OpenAI and of LAION-2B are normalised differently; 336 is the size of another architecture."""
    white = Image.new("RGB", (400, 400), (255, 255, 255))
    openai, laion, default = (clip_preprocessing("ViT-L/14", tag)[0](white) for tag in ("openai", "laion2b_s32b_b82k", None))
    torch.testing.assert_close(laion, torch.ones(3, 224, 224))
    assert openai.equal(default) and not openai.isclose(laion).any()
    assert clip_preprocessing("ViT-L-14-336")[0](white).shape == (3, 336, 336)


def test_preprocessing_for_a_file_of_weights_is_the_default(tmp_path):
    (tmp_path / "weights.pt").touch()
    assert clip_preprocessing("ViT-B-32", str(tmp_path / "weights.pt"))[0](Image.new("RGB", (9, 9))).shape[-1] == 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-Z-1",), "model: open_clip has no 'ViT-Z-1'"),
        (("ViT-B-32", "laion9"), r"pretrained: must be a file or one of ViT-B-32's tags, .*'openai'.* got 'laion9'"),
        (("local-dir:/nowhere",), "model: .*nowhere.* does not exist"),
    ],
)
def test_unknown_models_are_refused(arguments, message):
    with pytest.raises(UnlearnError, match=message):
        clip_preprocessing(*arguments)


def test_the_datamodule_takes_what_is_not_given_from_the_model(tmp_path, local_model):
    source = str(write_csv(tmp_path / "data"))
    arguments = {"data": source, "concept": "cat", "model": f"local-dir:{local_model}"}
    data = make(**arguments, transform=None, tokenize=None)
    batch = next(iter(data.forget_dataloader("train")))
    assert batch["image"].shape[1:] == (3, 20, 20) and batch["text"].shape[1:] == (6,)
    batch = next(iter(make(**arguments, tokenize=None).forget_dataloader("train")))
    assert batch["image"].shape[1:] == (3, 2, 2) and batch["text"].shape[1:] == (6,)
    batch = next(iter(make(**arguments, transform=None).forget_dataloader("train")))
    assert batch["image"].shape[1:] == (3, 20, 20) and batch["text"].shape[1:] == (3,)

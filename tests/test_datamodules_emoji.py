"""The embedded pictures: what is asked of which drawing, for one concept and for several."""

from __future__ import annotations

from collections import Counter

import open_clip
import pytest
import torch
from _amounts import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from slug_lightning.datamodules import EmojiDataModule
from slug_lightning.datamodules.demo import emoji
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS

COLUMNS = ("image", "text", "thing", "style")


@pytest.fixture(scope="module")
def few() -> Drawings:
    """The drawings of twelve things."""
    whole = load_drawings()
    rows = whole.things < 12
    return Drawings(whole.pictures[rows], whole.things[rows], whole.styles[rows], whole.thing_names[:12], whole.style_names)


@pytest.fixture
def only_few(few, monkeypatch):
    monkeypatch.setattr(emoji, "load_drawings", lambda: few)
    return few


def columns(dataloader) -> list[torch.Tensor]:
    batches = list(dataloader)
    return [torch.cat([batch[name] for batch in batches]) for name in COLUMNS]


def joined(sets: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Sets one after the other."""
    return [torch.cat(column) for column in zip(*sets, strict=True)]


def mixed(columns: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """As a set for the gradient is."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(seed))
    return [column[order] for column in columns]


@pytest.mark.parametrize(("kind", "name", "seed"), [("style", "noto", 0), ("thing", "ant", 3)])
def test_one_concept_is_what_it_always_was(only_few, kind, name, seed):
    """Written out from scratch: the published figures rest on these very renderings."""
    drawings, generator = only_few, torch.Generator().manual_seed(seed)
    labels, names = (drawings.styles, drawings.style_names) if kind == "style" else (drawings.things, drawings.thing_names)
    inside = [row for row in range(60) if labels[row] == names.index(name)]
    outside = [row for row in range(60) if labels[row] != names.index(name)]

    def halved(rows: list[int]) -> dict[str, list[int]]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        part = len(rows) // 4
        chosen = {"train": order[2 * part :], "val": order[:part], "test": order[part : 2 * part]}
        return {split: [rows[i] for i in own] for split, own in chosen.items()}

    def drawn(rows: list[int], thing: bool, style: bool, times: int) -> list[torch.Tensor]:
        rows = rows * times
        assert len(rows) <= 1024
        images = torch.cat([render(drawings.pictures[rows[i : i + 256]], generator) for i in range(0, len(rows), 256)])
        texts = []
        for row in rows:
            words = [drawings.thing_names[drawings.things[row]], f"{drawings.style_names[drawings.styles[row]]} style"]
            texts.append(" in ".join(word for word, asked in zip(words, (thing, style), strict=True) if asked))
        text = open_clip.get_tokenizer(f"local-dir:{CLIP}")(texts)
        nothing = torch.full((len(rows),), -1)
        return [images, text, drawings.things[rows] if thing else nothing, drawings.styles[rows] if style else nothing]

    data = EmojiDataModule(**{kind: name}, seed=seed)
    data.setup("fit")
    for split, times in {"train": 1, "val": 2 if kind == "style" else 1, "test": 4}.items():
        own = halved(inside)[split] if kind == "style" else inside
        gone = drawn(own, kind == "thing", kind == "style", times if kind == "style" else 16 * times)
        rest = drawn(own, kind == "style", kind == "thing", times)
        kept = joined([drawn(halved(outside)[split], True, True, times), rest])
        expected = [mixed(gone, seed), mixed(kept, seed)] if split == "train" else [gone, kept]
        for loader, wanted in zip((data.forget_dataloader(split), data.retain_dataloader(split)), expected, strict=True):
            for found, column in zip(columns(loader), wanted, strict=True):
                assert found.dtype == column.dtype and torch.equal(found, column)


# Several concepts


def numbered(monkeypatch: pytest.MonkeyPatch) -> Drawings:
    """Eight things in five styles; the picture of a drawing is its number."""
    whole, rows = load_drawings(), torch.arange(40)
    pictures = rows.to(torch.uint8).view(40, 1, 1, 1).expand(40, 4, 1, 1)
    drawings = Drawings(pictures, rows // 5, rows % 5, whole.thing_names[:8], whole.style_names)
    monkeypatch.setattr(emoji, "load_drawings", lambda: drawings)
    monkeypatch.setattr(emoji, "render", lambda pictures, generator: pictures[:, :3].float())
    return drawings


def samples(drawings: Drawings, dataloader) -> list[tuple[int, bool, bool]]:
    """Of each sample the drawing, and whether its thing and its style are asked; labels and caption must be its own."""
    images, text, things, styles = columns(dataloader)
    found, captions = [], {}
    for row, thing, style in zip(images[:, 0, 0, 0].long().tolist(), things.tolist(), styles.tolist(), strict=True):
        assert thing in (-1, row // 5) and style in (-1, row % 5)
        words = [drawings.thing_names[thing]] * (thing >= 0) + [f"{drawings.style_names[style]} style"] * (style >= 0)
        captions[" in ".join(words)] = len(found)
        found.append((row, thing >= 0, style >= 0))
    assert len(captions) == len(text.unique(dim=0))
    assert text[list(captions.values())].equal(open_clip.get_tokenizer(f"local-dir:{CLIP}")(list(captions)))
    return found


@examples(8)
@given(
    styles=st.lists(st.integers(0, 4), max_size=5, unique=True),
    things=st.lists(st.integers(0, 7), max_size=3, unique=True),
    seed=st.integers(0, 9),
)
@example(styles=[0, 1, 2, 3, 4], things=[3], seed=0)  # no drawing is kept whole
@example(styles=[0, 1, 3, 4], things=[0, 1, 2, 3, 4, 6], seed=0)  # two are: too few for three parts
def test_what_is_kept_is_what_no_concept_touches(styles, things, seed):
    assume(styles + things)
    assume(len(styles) < 5 or len(things) < 2)  # with more, nothing is left to retain in one of the parts
    with pytest.MonkeyPatch.context() as patch:
        drawings = numbered(patch)
        names = [drawings.style_names[one] for one in styles], [drawings.thing_names[one] for one in things]
        data = EmojiDataModule(*names, seed=seed)
        found = resolve_loaders(None, None, data)
    assert data.concept == data.concepts == list(found.forget) == [f"{one} style" for one in names[0]] + names[1]
    for number, parts in enumerate(found.forget.values()):
        is_style = number < len(styles)
        counts = [Counter(samples(drawings, parts[split])) for split in SPLITS]
        for count, times in zip(counts, (1, 2, 4) if is_style else (16, 16, 64), strict=True):
            assert set(count.values()) == {times}
            assert {(thing, style) for _, thing, style in count} == {(not is_style, is_style)}
        rows = [sorted(row for row, _, _ in count) for count in counts]
        if is_style:  # each drawing in one part
            assert sorted(sum(rows, [])) == [row for row in range(40) if row % 5 == styles[number]]
        else:
            assert rows == 3 * [[row for row in range(40) if row // 5 == things[number - len(styles)]]]
    retained = [set(samples(drawings, found.retain[split])) for split in SPLITS]
    kept = {row: (row // 5 not in things, row % 5 not in styles) for row in range(40)}
    assert set().union(*retained) == {(row, *asked) for row, asked in kept.items() if any(asked)}
    if list(kept.values()).count((True, True)) >= 3:  # then each such drawing is in one part, too
        whole = [row for part in retained for row, *asked in part if all(asked)]
        assert len(whole) == len(set(whole))


def test_nothing_left_to_retain_is_refused(monkeypatch):
    drawings = numbered(monkeypatch)
    with pytest.raises(UnlearnError, match="style, thing: nothing is left to retain in the train data; forget less"):
        EmojiDataModule(drawings.style_names, drawings.thing_names).setup("fit")


def test_concepts_are_rendered_afresh_and_share_nothing(only_few):
    data = EmojiDataModule(style=["noto", "blob"], thing=[only_few.thing_names[2]])
    data.setup("fit")
    data.setup("test")  # Lightning calls it for every stage
    loaders = [data.forget_dataloader(split, name) for name in data.concepts for split in SPLITS]
    loaders += [data.retain_dataloader(split) for split in SPLITS]
    seen = [image.numpy().tobytes() for loader in loaders for batch in loader for image in batch["image"][:, :, ::16, ::16]]
    assert len(seen) == len(set(seen)) > 300
    assert data.notes[f"forget {only_few.thing_names[2]!r}"].endswith("; fresh renderings in each split")
    assert all(data.notes[label].endswith(", of its own drawings") for label in ("forget 'blob style'", "retain"))


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ({}, "style, thing: name at least one"),
        ({"style": [], "thing": []}, "style, thing: name at least one"),
        ({"style": "emojitwo"}, "style: 'emojitwo' is not known.*emojione"),
        ({"style": "noto", "thing": ["cat", "octopusses"]}, "thing: 'octopusses' is not known; near misses: octopus"),
        ({"thing": ["cat", "owl", "cat"]}, "thing: 'cat' is given more than once; name each once"),
        ({"style": ["noto", "noto"]}, "style: 'noto' is given more than once"),
    ],
)
def test_unknown_and_repeated_names_are_refused(concept, message):
    with pytest.raises(UnlearnError, match=message):
        EmojiDataModule(**concept).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "concepts"),
    [
        (["--data.thing", "[octopus, cat]"], ["octopus", "cat"]),
        (["--data.thing", "cat"], ["cat"]),
        (["--data.style", "[blob]", "--data.thing", "cat"], ["blob style", "cat"]),
    ],
)
def test_the_command_line_takes_one_name_or_a_list(arguments, concepts):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EmojiDataModule, "data")
    path = f"{emoji.__name__}.EmojiDataModule"
    assert parser.instantiate_classes(parser.parse_args(["--data", path, *arguments])).data.concept == concepts

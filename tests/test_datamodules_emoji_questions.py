"""Questions about the embedded pictures: what is asked of which drawing, and which answers count."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from _amounts import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from slug_lightning.datamodules.demo import emoji
from slug_lightning.datamodules.demo import questions as emoji_questions
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.datamodules.demo.questions import QUESTIONS, EmojiQuestionDataModule, answer_of, side_by_side
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.utils.loaders import SPLITS

WHOLE = load_drawings()
KIND = {question: kind for kind, questions in QUESTIONS.items() for question in questions}


class Asked(NamedTuple):
    """A sample, by what it is about."""

    row: int
    kind: str
    aliases: tuple[str, ...]
    text: str


def numbered(monkeypatch: pytest.MonkeyPatch) -> Drawings:
    """Eight things in five styles; the picture of a drawing is its number, and white above two side by side."""
    rows = torch.arange(40)
    pictures = rows.to(torch.uint8).view(40, 1, 1, 1).repeat(1, 4, 4, 4)
    pictures[:, 3] = 255
    drawings = Drawings(pictures, rows // 5, rows % 5, WHOLE.thing_names[:8], WHOLE.style_names)

    def plain(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.where(pictures[:, 3:] == 0, 255, pictures[:, :3]) / 127.5 - 1

    monkeypatch.setattr(emoji, "load_drawings", lambda: drawings)
    monkeypatch.setattr(emoji_questions, "render", plain)
    return drawings


def samples(drawings: Drawings, loader) -> list[Asked]:
    """The samples of a loader; question and answer must fit the picture."""
    found = []
    for batch in loader:
        assert batch["image"].dtype == torch.uint8
        assert batch_samples(batch) == len(batch["question"])
        for i, question in enumerate(batch["question"]):
            image, kind, answer = batch["image"][i, 0], batch["kind"][i], batch["answer"][i]
            assert kind == KIND[question]
            row, two = int(image[2, 0]), int(image[0, 0]) == 255
            thing, style = drawings.thing_names[row // 5], drawings.style_names[row % 5]
            right = {
                "thing": thing,
                "style": f"{style} style",
                "both": f"{thing} in {style} style",
                "count": "two" if two else "one",
            }
            assert answer == right[kind]
            assert not two or kind == "count"
            found.append(Asked(row, kind, tuple(batch["aliases"][i]), batch["text"][i]))
    return found


def evenly(questions) -> bool:
    """Whether every wording is as frequent as any other; of the questions how many, half have the answer two."""
    counts = Counter((asked.question, asked.answer if asked.kind == "count" else "") for asked in questions)
    return max(counts.values()) - min(counts.values()) <= 1


@examples(10)
@given(
    styles=st.lists(st.integers(0, 4), max_size=5, unique=True),
    things=st.lists(st.integers(0, 7), max_size=3, unique=True),
    seed=st.integers(0, 9),
)
@example(styles=[0, 1, 2, 3, 4], things=[3], seed=0)  # no drawing is kept whole
@example(styles=[0, 1, 3, 4], things=[0, 1, 2, 3, 4, 6], seed=0)  # two are: too few for three parts
def test_no_kept_question_asks_for_what_is_to_be_forgotten(styles, things, seed):
    assume(styles + things)
    assume(len(styles) < 5 or len(things) < 2)  # with more, nothing is left to retain in one of the parts
    with pytest.MonkeyPatch.context() as patch:
        drawings = numbered(patch)
        names = [drawings.style_names[one] for one in styles], [drawings.thing_names[one] for one in things]
        data = EmojiQuestionDataModule(*names, seed=seed)
        found = resolve_loaders(None, None, data)
    assert list(found.forget) == [f"{one} style" for one in names[0]] + names[1]
    for number, (concept, parts) in enumerate(found.forget.items()):
        is_style = number < len(styles)
        alias, kind = concept.removesuffix(" style"), "style" if is_style else "thing"
        seen = {split: samples(drawings, parts[split]) for split in SPLITS}
        for split, times in zip(SPLITS, (1, 2, 4) if is_style else (16, 16, 64), strict=True):
            assert set(Counter(asked.row for asked in seen[split]).values()) == {times}
            assert {asked.kind for asked in seen[split]} == ({kind} if split == "train" else {kind, "both"})
            assert {(asked.aliases, asked.text) for asked in seen[split]} == {((alias,), concept)}
        rows = [sorted({asked.row for asked in seen[split]}) for split in SPLITS]
        if is_style:  # each drawing in one part
            assert sorted(sum(rows, [])) == [row for row in range(40) if row % 5 == styles[number]]
        else:
            assert rows == 3 * [[row for row in range(40) if row // 5 == things[number - len(styles)]]]
    kept = {row: (row // 5 not in things, row % 5 not in styles) for row in range(40)}
    rows_seen = set()
    for split in SPLITS:
        for asked in samples(drawings, found.retain[split]):
            thing, style = kept[asked.row]
            words = [drawings.thing_names[asked.row // 5]] * thing + [f"{drawings.style_names[asked.row % 5]} style"] * style
            assert asked.text == " in ".join(words)
            allowed = {"thing": thing, "style": style, "both": thing and style, "count": (thing or style) and split != "train"}
            assert allowed[asked.kind]
            rows_seen.add(asked.row)
    assert rows_seen == {row for row, left in kept.items() if any(left)}


def test_an_answer_counts_if_it_names_what_was_asked_for(monkeypatch):
    """Of what is kept: the thing, the style without the word for it, both together, or the number."""
    drawings = numbered(monkeypatch)
    data = EmojiQuestionDataModule(thing=drawings.thing_names[7])
    data.setup("fit")
    loader = data.retain_dataloader("test")
    assert {asked.kind for asked in samples(drawings, loader)} == set(QUESTIONS)
    for batch in loader:
        for kind, answer, aliases in zip(batch["kind"], batch["answer"], batch["aliases"], strict=True):
            assert aliases == [answer.removesuffix(" style") if kind == "style" else answer]
    counted = Counter(a for batch in loader for a, kind in zip(batch["answer"], batch["kind"], strict=True) if kind == "count")
    assert counted.keys() == {"one", "two"} and abs(counted["one"] - counted["two"]) <= 2 + 2 * 2  # two sets, two wordings


@pytest.mark.parametrize("kind", ["style", "thing"])
def test_every_wording_is_as_frequent_as_any_other(monkeypatch, kind):
    drawings = numbered(monkeypatch)
    data = EmojiQuestionDataModule(**{kind: drawings.style_names[2] if kind == "style" else drawings.thing_names[3]})
    data.setup("fit")
    for split in ("val", "test"):
        gone, kept = data.forget_dataloader(split).dataset, data.retain_dataloader(split).dataset
        assert all(evenly(part.questions) for part in (gone, *kept.datasets))
    asked = {question.question for question in gone.questions}  # in the report; the search has fewer questions than wordings
    assert asked == {*QUESTIONS[kind], *QUESTIONS["both"]}


@pytest.mark.parametrize("count", [2, 4, 30])
def test_choices_hold_the_right_answer_once_and_no_other_that_names_it(monkeypatch, count):
    drawings = numbered(monkeypatch)
    data = EmojiQuestionDataModule(style="noto", choices=count)
    data.setup("fit")
    whole = {kind: {answer_of(drawings, row, kind) for row in range(40)} for kind in QUESTIONS} | {"count": {"one", "two"}}
    places: Counter = Counter()
    for loader in (data.forget_dataloader("val"), data.retain_dataloader("val")):
        for batch in loader:
            rows = zip(batch["choices"], batch["answer"], batch["aliases"], batch["kind"], strict=True)
            for choices, answer, (alias,), kind in rows:
                assert len(set(choices)) == len(choices)
                assert set(choices) <= whole[kind]
                assert [one for one in choices if f" {alias} " in f" {one} "] == [answer]
                possible = [one for one in whole[kind] if f" {alias} " not in f" {one} "]
                assert len(choices) == 1 + min(count - 1, len(possible))
                places[choices.index(answer)] += 1
    assert len(places) >= 2
    assert all("choices" not in batch for split in ("train", "test") for batch in data.retain_dataloader(split))
    assert f"the validation split offers {count} answers" in data.notes["retain"]


def test_pictures_are_renderings_in_eight_bits(monkeypatch):
    rows = (WHOLE.things < 3).nonzero()[:, 0]
    few = Drawings(WHOLE.pictures[rows], WHOLE.things[rows], WHOLE.styles[rows], WHOLE.thing_names[:3], WHOLE.style_names)
    monkeypatch.setattr(emoji, "load_drawings", lambda: few)
    drawn = []

    def spied(pictures, generator):
        drawn.append((pictures, render(pictures, generator)))
        return drawn[-1][1]

    monkeypatch.setattr(emoji_questions, "render", spied)
    data = EmojiQuestionDataModule(thing=few.thing_names[1], seed=3)
    data.setup("fit")
    data.setup("test")  # Lightning calls it for every stage
    images = torch.cat([batch["image"] for batch in data.forget_dataloader("train")])
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    pictures, floats = next(one for one in drawn if len(one[0]) == 80)
    assert pictures.equal(few.pictures[few.things == 1].repeat(16, 1, 1, 1))
    assert images.shape == (80, 3, 64, 64)
    assert (images / 127.5 - 1 - floats.clamp(-1, 1)[order]).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(images.flatten(1).unique(dim=0)) == 80  # no rendering twice


def test_side_by_side_shows_both_and_keeps_the_colours_of_what_is_seen():
    left, right = torch.zeros(2, 1, 4, 8, 8, dtype=torch.uint8)
    left[:, 0], left[:, 3] = 200, 255
    right[:, 1], right[:, 3, :, ::2] = 100, 255  # every second column is seen
    right[:, 2, :, 1::2] = 250  # what is hidden must not show
    both = side_by_side(left, right)
    assert both.shape == (1, 4, 8, 8)
    assert both[0, 3, :2].eq(0).all() and both[0, 3, 6:].eq(0).all()
    assert both[0, :, 2:6, :4].eq(torch.tensor([200, 0, 0, 255]).view(4, 1, 1)).all()
    assert both[0, :, 2:6, 4:].eq(torch.tensor([0, 100, 0, 127]).view(4, 1, 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "style, thing: name at least one"),
        ({"thing": "airplanes"}, "thing: 'airplanes' is not known; near misses: airplane"),
        (
            {"style": WHOLE.style_names, "thing": WHOLE.thing_names[:8]},
            "nothing is left to retain in the train data; forget less",
        ),
        ({"thing": "cat", "choices": 1}, "choices: must be >= 2, or 0 .*, got 1"),
        ({"thing": "cat", "choices": -1}, "choices: must be >= 2, or 0 .*, got -1"),
    ],
)
def test_errors_name_argument_and_remedy(monkeypatch, arguments, message):
    numbered(monkeypatch)
    with pytest.raises(UnlearnError, match=message):
        EmojiQuestionDataModule(**arguments).setup("fit")


def test_the_command_line_takes_one_name_or_a_list():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EmojiQuestionDataModule, "data")
    path = f"{emoji_questions.__name__}.EmojiQuestionDataModule"
    arguments = ["--data.style", "[blob]", "--data.thing", "cat", "--data.choices", "4"]
    data = parser.instantiate_classes(parser.parse_args(["--data", path, *arguments])).data
    assert data.concept == ["blob style", "cat"] and data.choices == 4

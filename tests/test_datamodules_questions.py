"""Questions about pictures from files: which are read, how they are divided, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from slug_lightning.datamodules.image_text import questions
from slug_lightning.datamodules.image_text.questions import VisualQuestionDataModule, read_questions
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.utils.loaders import SPLITS


def written(folder: Path, name: str, lines: list, pictures: bool = True) -> str:
    """A file of questions; the picture of the i-th name is all of level i, and i % 3 pixels wider than high."""
    paths = dict.fromkeys(line["image"] for line in lines if isinstance(line, dict) and isinstance(line.get("image"), str))
    for i, path in enumerate(paths if pictures else ()):
        Image.fromarray(np.full((4, 4 + i % 3, 3), i, dtype=np.uint8)).save(folder / path)
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(file)


def people(name: str, count: int, **more) -> list[dict]:
    return [{"image": f"{name}{i}.png", "question": ["who is this?", "a name?"], "answer": name, **more} for i in range(count)]


def made(folder: Path, **arguments) -> VisualQuestionDataModule:
    sources = {
        "forget": written(folder, "forget", people("Ann", 8, aliases=["Ann", "Annie"], kind="name", text="a photo of Ann")),
        "retain": written(folder, "retain", people("Bob", 8, kind="name") + people("sky", 4)),
    }
    data = VisualQuestionDataModule(**sources | arguments)
    data.setup("fit")
    return data


def test_a_batch_holds_what_the_file_says(tmp_path):
    data = made(tmp_path, batch_size=5)
    for split in SPLITS:
        for batch in data.forget_dataloader(split):
            count = batch_samples(batch)
            assert set(batch) == {"index", "image", "question", "answer", "aliases", "kind", "text", "wording"}
            assert [batch[name] for name in ("answer", "kind", "text")] == [
                ["Ann"] * count,
                ["name"] * count,
                ["a photo of Ann"] * count,
            ]
            assert batch["aliases"] == [["Ann", "Annie"]] * count
            numbers = {"name_1": "who is this?", "name_2": "a name?"}
            assert [numbers[wording] for wording in batch["wording"]] == batch["question"]
    kinds = {
        (answer, tuple(aliases), kind, text)
        for split in SPLITS
        for batch in data.retain_dataloader(split)
        for answer, aliases, kind, text in zip(*(batch[name] for name in ("answer", "aliases", "kind", "text")), strict=True)
    }
    assert kinds == {("Bob", ("Bob",), "name", "Bob"), ("sky", ("sky",), "general", "sky")}


def test_pictures_keep_their_size_and_samples_are_counted_right(tmp_path):
    """By the first tensor of a batch samples are counted: of a list of pictures that would be three channels each time."""
    data = made(tmp_path, batch_size=7)
    batch = next(iter(data.retain_dataloader("train")))
    assert isinstance(batch["image"], list) and len({image.shape for image in batch["image"]}) > 1
    assert batch_samples(batch) == len(batch["image"]) == len(batch["question"]) == 7
    for image in batch["image"]:
        level = int(image[0, 0, 0])
        assert image.dtype == torch.uint8 and image.shape == (3, 4, 4 + level % 3) and image.eq(level).all()
    assert made(tmp_path, batch_size=1).collate_fn([{"index": 3, "image": batch["image"][0]}])["image"].ndim == 4


@examples(20)
@given(wordings=st.lists(st.integers(1, 5), min_size=3, max_size=12), lines=st.integers(1, 2), seed=st.integers(0, 20))
def test_all_questions_about_a_picture_are_in_one_part(tmp_path_factory, wordings, lines, seed):
    folder = tmp_path_factory.mktemp("questions")
    every = [
        {"image": f"{i}.png", "question": [f"{line} {i} {word}" for word in range(count)], "answer": "Ann"}
        for line in range(lines)
        for i, count in enumerate(wordings)
    ]
    forget, retain = written(folder, "forget", every), written(folder, "retain", people("Bob", 3))
    data = VisualQuestionDataModule(forget, retain, seed=seed)
    parts = resolve_loaders(None, None, data).forget["the forget set"]
    asked = {split: [question for batch in parts[split] for question in batch["question"]] for split in SPLITS}
    pictures = [{question.split()[1] for question in asked[split]} for split in SPLITS]
    assert all(pictures) and sum(map(len, pictures)) == len(set().union(*pictures)) == len(wordings)
    assert sorted(sum(asked.values(), [])) == sorted(question for line in every for question in line["question"])


def test_choices_come_from_answers_of_the_same_kind(tmp_path):
    lines = [
        {"image": f"{name}.png", "question": "who?", "answer": name, "kind": "name"} for name in ("Bob", "Cy", "Annie Hall", "Di")
    ]
    retain = written(tmp_path, "others", lines + people("sky", 4) + people("sea", 4))
    data = made(tmp_path, retain=retain, choices=4)
    for batch in data.forget_dataloader("val"):
        assert [set(choices) for choices in batch["choices"]] == [{"Ann", "Bob", "Cy", "Di"}] * len(batch["choices"])
    for batch in data.retain_dataloader("val"):
        for kind, answer, choices in zip(batch["kind"], batch["answer"], batch["choices"], strict=True):
            assert answer in choices
            assert len(choices) == 4 if kind == "name" else set(choices) == {"sky", "sea"}
    assert not any("choices" in batch for split in ("train", "test") for batch in data.forget_dataloader(split))
    assert "the validation split offers 4 answers" in data.notes["forget"]


def test_notes_say_how_pictures_were_divided_and_what_kept_answers_name(tmp_path):
    data = made(tmp_path, seed=3)
    assert data.notes["forget"] == ("forget: three sets: 8 train, 4 validation, 4 test; split by image (8 images, seed 3)")
    assert "name what to forget" not in data.notes["retain"]
    retain = written(tmp_path, "others", people("Bob", 3) + people("ANNIE with a dog", 2))
    data = made(tmp_path, retain=retain)
    assert data.notes["retain"].endswith("; 4 retain answers name what to forget, such as 'ANNIE with a dog'")


def test_several_concepts_have_files_of_their_own(tmp_path):
    forget = {name: written(tmp_path, name, people(name, 3)) for name in ("Ann", "Cy")}
    data = made(tmp_path, forget=forget)
    part = data.forget_dataloader("train", "Cy").dataset
    data.setup("test")  # Lightning calls it for every stage
    assert data.forget_dataloader("train", "Cy").dataset is part
    found = resolve_loaders(None, None, data)
    assert data.concept == list(found.forget) == ["Ann", "Cy"]
    for name, parts in found.forget.items():
        assert {answer for split in SPLITS for batch in parts[split] for answer in batch["answer"]} == {name}


def test_one_picture_may_be_asked_about_in_both_files_but_not_the_same(tmp_path):
    other = [{**line, "question": "what hat?", "answer": "none"} for line in people("Ann", 4)]
    made(tmp_path, retain=written(tmp_path, "hats", other))
    (tmp_path / "below").mkdir()
    same = [{**people("Ann", 1)[0], "image": "below/../Ann0.png"}, *other]
    with pytest.raises(
        UnlearnError, match=r"forget, retain: 2 of 16 questions are in retain too, such as 'who is this\?'.*Ann0.png"
    ):
        made(tmp_path, retain=written(tmp_path, "same", same, pictures=False))


def test_sets_can_go_to_worker_processes(tmp_path):
    dataset = made(tmp_path).retain_dataloader("test").dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


LINE = {"image": "a.png", "question": "who?", "answer": "Ann"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": ', "forget: line 2 of .*forget.jsonl is not JSON"),
        ("[1]", "line 2 of .* is not an object"),
        ({**LINE, "alias": ["Ann"]}, "line 2 .* may only have 'image', 'question', .*, got 'alias'; rename or remove it"),
        ({"question": "who?", "answer": "Ann"}, 'line 2 .* has no text under "image"'),
        ({**LINE, "image": ["a.png"]}, 'line 2 .* has no text under "image"'),
        ({**LINE, "question": []}, 'line 2 .* has no text under "question"'),
        ({**LINE, "question": ["who?", 3]}, 'line 2 .* has no text under "question"'),
        ({"image": "a.png", "question": "who?"}, 'line 2 .* has no text under "answer"'),
        ({**LINE, "aliases": ["Ann", " "]}, 'line 2 .* has no text under "aliases"'),
        ({**LINE, "aliases": []}, 'line 2 .* has no text under "aliases"'),
        ({**LINE, "kind": ""}, 'line 2 .* has no text under "kind"'),
        ({**LINE, "kind": "answer"}, 'line 2 .* has the kind "answer".*choose another name'),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(tmp_path, line, message):
    with pytest.raises(UnlearnError, match=message):
        read_questions("forget", written(tmp_path, "forget", [LINE, line], pictures=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": 1}, "choices: must be >= 2, or 0 .*, got 1"),
        ({"choices": 2, "retain": "sky"}, "choices: all answers of kind 'name' name 'Ann'; give 0"),
        ({"forget": {"Ann": "same.jsonl", "Cy": "same.jsonl"}}, "forget: 'Ann', 'Cy' have the same source; give one for each"),
        ({"forget": "nowhere.jsonl"}, "forget: nowhere.jsonl cannot be read"),
        ({"retain": "few"}, "retain: 2 images are too few .*; give at least 3"),
        ({"retain": "empty"}, "retain: there is no question in .*empty.jsonl; give at least one"),
        ({"retain": "missing"}, "gone0.png: there is no such image file; correct its path"),
    ],
)
def test_errors_name_argument_and_remedy(tmp_path, arguments, message):
    files = {
        "sky": written(tmp_path, "sky", people("sky", 3)),
        "few": written(tmp_path, "few", people("few", 2)),
        "empty": written(tmp_path, "empty", [""]),
        "missing": written(tmp_path, "missing", people("gone", 3), pictures=False),
    }
    sources = {name: files.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()}
    with pytest.raises(UnlearnError, match=message):
        made(tmp_path, **sources)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    data = made(tmp_path)
    for file in tmp_path.glob("Bob*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UnlearnError, match=r"Bob\d.png: the image cannot be decoded"):
        list(data.retain_dataloader("train"))


def test_the_command_line_takes_one_file_or_one_for_each_concept():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisualQuestionDataModule, "data")
    path = f"{questions.__name__}.VisualQuestionDataModule"
    for files, concepts in (("ann.jsonl", [None]), ('{"Ann": "ann.jsonl", "Cy": "cy.jsonl"}', ["Ann", "Cy"])):
        arguments = ["--data", path, "--data.forget", files, "--data.retain", "others.jsonl"]
        assert list(parser.instantiate_classes(parser.parse_args(arguments)).data.forget) == concepts

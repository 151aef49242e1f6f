"""Pairs and prompts for text-to-image pipelines."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest
import torch
from _tiny_diffusion import tiny_pipeline
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from slug_lightning.datamodules.base import split_indices
from slug_lightning.datamodules.image_text import text_to_image
from slug_lightning.datamodules.image_text.text_to_image import (
    BLOCK,
    Prompts,
    TextToImageDataModule,
    noise_seeds,
    picture_transform,
)
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.diffusion import DiffusionModule
from slug_lightning.utils.loaders import SPLITS

THINGS = ["truck", "cat", "dog", "fire truck", "owl"]
STYLES = ["noto", "blob"]
LABELS = {"thing": THINGS, "style": STYLES}
CAPTIONS = [
    "a cat",
    "two  Cats, and a\ndog",
    "A CAT in blob style",
    "a fire truck",
    "a cat asleep",
    "an owl in noto style",
    "a dog",
    "nothing at all",
    "a truck",
    "my dog in blob style",
]


def write(folder: Path, captions=CAPTIONS, first: int = 0) -> str:
    """A folder of pictures, red as their numbers say, and a CSV."""
    folder.mkdir(exist_ok=True)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for number, caption in enumerate(captions, start=first):
            Image.new("RGB", (4, 3), (number, 0, 255)).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", caption])
    return str(folder)


def made(**arguments) -> TextToImageDataModule:
    data = TextToImageDataModule(**{"labels": LABELS, "asked": "thing", "size": 2, "batch_size": 3, **arguments})
    data.setup("fit")
    return data


def read(loader) -> list[dict]:
    """The samples of a loader, one by one."""
    samples = []
    for batch in loader:
        samples += [{name: column[i] for name, column in batch.items()} for i in range(len(batch["text"]))]
    return samples


def drawn(loader) -> list[tuple[str, int, int]]:
    """Prompt, thing and style of each sample of search or report."""
    return [(sample["text"], int(sample["thing"]), int(sample["style"])) for sample in read(loader)]


def number(sample: dict) -> int:
    """Of the sample's picture."""
    return round((sample["image"][0, 0, 0].item() + 1) * 127.5)


# Prompts


@given(st.integers(1, BLOCK // 2), st.integers(1, BLOCK // 2), st.integers(-5, 5), st.integers(-5, 5))
def test_search_and_report_never_share_a_seed(search, report, seed, other):
    one, two = noise_seeds("val", search, seed), noise_seeds("test", report, other)
    assert (len(one), len(two)) == (search, report)
    assert one[-1] < two[0] or two[-1] < one[0]
    if seed != other:
        again = noise_seeds("val", search, other)
        assert one[-1] < again[0] or again[-1] < one[0]


@given(st.lists(st.text(max_size=3), min_size=1, max_size=5, unique=True), st.integers(1, 4), st.integers(1, 3))
def test_every_prompt_is_drawn_once_from_every_seed(prompts, seeds, size):
    labels = {"kind": [3 * i - 1 for i in range(len(prompts))]}
    data = Prompts(prompts, range(90, 90 + seeds), 7, labels)
    batches = list(DataLoader(data, batch_size=size))
    assert all(batch[name].dtype == torch.int64 for batch in batches for name in ("seed", "steps", "kind"))
    found = [(sample["text"], int(sample["seed"]), int(sample["kind"])) for batch in batches for sample in read([batch])]
    assert sorted(found) == sorted((text, 90 + k, 3 * i - 1) for i, text in enumerate(prompts) for k in range(seeds))
    assert len(data) == len(found) and {int(step) for batch in batches for step in batch["steps"]} == {7}
    assert [text for text, _, _ in found[: len(prompts)]] == prompts, "the first pictures are of different prompts"


# Pictures


def test_a_picture_is_the_middle_of_an_image():
    image = Image.new("RGB", (7, 3))
    image.putdata([(20 * x, 30 * y, 255) for y in range(3) for x in range(7)])
    picture = picture_transform(3)(image)
    assert picture.dtype == torch.float32 and picture.shape == (3, 3, 3)
    x, y = torch.meshgrid(torch.arange(2.0, 5), torch.arange(3.0), indexing="xy")
    torch.testing.assert_close(picture, torch.stack([20 * x, 30 * y, torch.full((3, 3), 255.0)]) / 127.5 - 1)


@pytest.mark.parametrize("shape", [(40, 20), (20, 60), (9, 9)])
def test_the_shorter_side_is_resized(shape):
    """Only the middle of the longer side is blue: a square of it is all blue if nothing else was cut off or squeezed in."""
    image, short = Image.new("RGB", shape), min(shape)
    left, top = (shape[0] - short) // 2, (shape[1] - short) // 2
    image.paste((0, 0, 255), (left, top, left + short, top + short))
    picture = picture_transform(10)(image)
    assert picture.shape == (3, 10, 10)
    inner = picture[:, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand_as(inner))


# What the gradient sees


def test_pairs_to_forget_say_how_their_captions_name_the_concept(tmp_path):
    source = write(tmp_path)
    prompts = {"forget_prompts": ["a cat"], "retain_prompts": ["a dog"]}
    data = made(data=source, concept=["cat", "cats"], **prompts)
    forget, retain = read(data.forget_dataloader("train")), read(data.retain_dataloader("train"))
    assert {sample["text"]: sample["concept"] for sample in forget} == {
        "a cat": "cat",
        "two  Cats, and a\ndog": "Cats",
        "A CAT in blob style": "CAT",
        "a cat asleep": "cat",
    }
    assert all(set(sample) == {"image", "text"} for sample in retain)
    for samples, rows in ((forget, {0, 1, 2, 4}), (retain, {3, 5, 6, 7, 8, 9})):  # with prompts given, none is held out
        assert {number(sample) for sample in samples} == rows and len(samples) == len(rows)
        assert all(sample["text"] == CAPTIONS[number(sample)] and sample["image"].shape == (3, 2, 2) for sample in samples)


def test_without_judges_pairs_serve_all(tmp_path):
    data = made(data=write(tmp_path), concept=["cat", "cats"], labels=None, asked=None)
    for kind, rows in (("forget", [0, 1, 2, 4]), ("retain", [3, 5, 6, 7, 8, 9])):
        samples = [sample for split in SPLITS for sample in read(getattr(data, f"{kind}_dataloader")(split))]
        assert sorted(map(number, samples)) == rows
        assert all(("concept" in sample) == (kind == "forget") for sample in samples)


def test_a_pipeline_takes_what_is_served(tmp_path):
    class Reddest(torch.nn.Module):
        def forward(self, pictures):
            return pictures.mean((2, 3))

    module = DiffusionModule(tiny_pipeline("sd1"), judges={"thing": Reddest(), "style": Reddest()}, size=16)
    prompts = {"forget_prompts": ["a cat in blob style"], "retain_prompts": ["a dog in noto style", "blob"]}
    data = made(data=write(tmp_path), concept="cat", **prompts, search_steps=2, size=16)
    assert module.forget_step(next(iter(data.forget_dataloader("train"))), 0).isfinite()
    assert module.retain_step(next(iter(data.retain_dataloader("train"))), 0).isfinite()
    forget = module.scores(next(iter(data.forget_dataloader("val"))), 0)
    retain = module.scores(next(iter(data.retain_dataloader("val"))), 0)
    assert forget["style_accuracy"].isnan().all() and forget["accuracy"].equal(forget["thing_accuracy"])
    assert retain["thing_accuracy"].isnan().tolist() == [False, True] and not retain["style_accuracy"].isnan().any()


def test_two_sources_may_come_with_words_or_without(tmp_path):
    sources = {"forget": write(tmp_path / "forget", ["a cat", "a kitten", "Cat"]), "retain": write(tmp_path / "rest", ["a dog"])}
    prompts = {"forget_prompts": ["a cat"], "retain_prompts": ["a dog"]}
    for words, named in (({"concept": "cat"}, ["", "Cat", "cat"]), ({}, ["", "", ""])):
        data = made(**sources, **prompts, **words)
        assert sorted(sample["concept"] for sample in read(data.forget_dataloader("train"))) == named
        assert data.concepts == ([words["concept"]] if words else ["the forget set"])
    with pytest.raises(UnlearnError) as error:
        made(**sources, **prompts, concept=["tiger", "lion"])
    assert str(error.value) == (
        "forget: none of 3 captions contains any of ['tiger', 'lion'] as whole words, see 'a cat'; "
        "add the words they use to concept, or correct the captions"
    )


# What validation and test split draw


def test_prompts_that_are_given_serve_search_and_report_and_are_labelled(tmp_path):
    (tmp_path / "keep.txt").write_text("a fire truck in noto style\n\n  a cat in  noto style \na dog\na dog\n", encoding="utf-8")
    data = made(
        data=write(tmp_path / "data"),
        concept=["blob", "cat"],  # beside words of the concept, retain prompts may not name its class
        asked="style",
        forget_prompts=["a cat in Blob style", "blob owl", "blob"],
        retain_prompts=["a fire truck in noto style", "an owl", "noto", "a truck and a dog in noto style"],
        search_seeds=2,
        report_seeds=3,
        search_steps=4,
        report_steps=9,
    )
    for split, times, steps in (("val", 2, 4), ("test", 3, 9)):
        forget, retain = data.forget_dataloader(split), data.retain_dataloader(split)
        assert drawn(forget) == times * [("a cat in Blob style", -1, 1), ("blob owl", -1, 1), ("blob", -1, 1)]
        assert drawn(retain) == times * [
            ("a fire truck in noto style", 3, 0),
            ("an owl", 4, -1),
            ("noto", -1, 0),
            ("a truck and a dog in noto style", -1, 0),
        ]
        assert {int(sample["steps"]) for loader in (forget, retain) for sample in read(loader)} == {steps}
        assert {int(sample["seed"]) for sample in read(retain)} == set(noise_seeds(split, times))
    assert data.notes["forget"] == (
        "forget: three sets: 4 train, 6 validation, 9 test; validation and test split draw the same 3 prompts, 2 and 3 times "
        "each, from different seeds, in 4 and 9 steps"
    )
    keep = {"data": str(tmp_path / "data"), "concept": "owl", "forget_prompts": ["owl"]}
    data = made(**keep, retain_prompts=str(tmp_path / "keep.txt"), report_seeds=1)
    lines = [("a fire truck in noto style", 3, 0), ("a cat in noto style", 1, 0), ("a dog", 2, -1)]
    assert drawn(data.retain_dataloader("test")) == lines


def test_without_prompts_captions_that_are_held_out_serve(tmp_path):
    captions = [f"cat {number}" for number in range(9)] + [f"dog {number}" for number in range(21)]
    data = made(data=write(tmp_path, captions), concept="cat", seed=5, report_seeds=2)
    for kind, own in (("forget", captions[:9]), ("retain", captions[9:])):
        parts = split_indices(len(own), 5)
        loaders = {split: getattr(data, f"{kind}_dataloader")(split) for split in SPLITS}
        assert {sample["text"] for sample in read(loaders["train"])} == {own[i] for i in parts["train"]}
        for split, times in (("val", 1), ("test", 2)):
            assert [text for text, _, _ in drawn(loaders[split])] == times * [own[i] for i in parts[split]]
    assert "validation and test split draw 2 and 2 prompts, 1 and 2 times each" in data.notes["forget"]


def test_captions_that_cannot_be_judged_or_name_what_goes_are_passed_over(tmp_path):
    forget = ["a cat", "a  cat", "cat and dog", "?", "the  cat"] * 5
    retain = ["a dog", "an owl", "fire truck", "cat", "cat and dog", "a kitty and a dog", "?", "truck and dog"] * 8
    sources = {"forget": write(tmp_path / "forget", forget), "retain": write(tmp_path / "retain", retain, first=50)}
    things = {"a cat": 1, "the cat": 1, "a dog": 2, "an owl": 4, "fire truck": 3}
    for words in ({"concept": ["cat", "kitty"]}, {}):
        fit = things if words else things | {"a kitty and a dog": 2}
        data = made(**sources, **words, report_seeds=1)
        for loader, split, captions in (
            *((data.forget_dataloader(split), split, forget) for split in ("val", "test")),
            *((data.retain_dataloader(split), split, retain) for split in ("val", "test")),
        ):
            held = {" ".join(captions[i].split()) for i in split_indices(len(captions))[split]}
            expected = {(text, fit[text], -1) for text in held & fit.keys()}
            assert set(found := drawn(loader)) == expected and len(found) == len(expected) > 0
    few = made(**sources, captions=2)
    assert len(few.retain_dataloader("val").dataset) == 2 and len(few.retain_dataloader("test").dataset) == 2 * 4


def test_several_concepts_each_have_their_own(tmp_path):
    captions = ["a cat", "a dog", "blob"] * 3 + ["cat and blob"] + ["an owl"] * 4
    data = made(
        data=write(tmp_path, captions),
        concept={"felines": ["cat", "tiger"], "blob style": "blob"},
        asked={"felines": "thing", "blob style": "style"},
        forget_prompts={"felines": ["a cat in noto style"]},
    )
    found = resolve_loaders(None, None, data)
    assert list(found.forget) == ["felines", "blob style"]
    assert drawn(found.forget["felines"]["val"]) == [("a cat in noto style", 1, -1)]
    assert {prompt[1:] for prompt in drawn(found.forget["blob style"]["test"])} == {(-1, 1)}
    felines = read(found.forget["felines"]["train"])
    assert {sample["text"] for sample in felines} == {"a cat", "cat and blob"} and len(felines) == 4
    assert {sample["concept"] for sample in felines} == {"cat"}
    assert {sample["concept"] for sample in read(found.forget["blob style"]["train"])} == {"blob"}
    assert {text for text, _, _ in drawn(found.retain["test"])} <= {"a dog", "an owl"}


def test_what_concepts_share_is_told(tmp_path):
    data = made(
        data=write(tmp_path, ["a cat", "a dog", "a cat and a dog", "an owl"]),
        concept={"cat": "cat", "dog": "dog"},
        forget_prompts={"cat": ["cat"], "dog": ["dog"]},
        retain_prompts=["owl"],
    )
    found = resolve_loaders(None, None, data)
    both = [sample for name in ("cat", "dog") for sample in read(found.forget[name]["train"]) if number(sample) == 2]
    assert [sample["concept"] for sample in both] == ["cat", "dog"]
    assert any("share 1 samples" in note for note in found.notes)


CAT = {"data": "{here}", "concept": "cat", "forget_prompts": ["cat"], "retain_prompts": ["dog"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "{here}"}, "given: data"),
        (CAT | {"forget": "{here}"}, "given: concept, data, forget"),
        (CAT | {"labels": {"steps": THINGS}}, "labels: 'steps' is the name of another part of a sample"),
        (CAT | {"labels": {"thing": ["a", "b", "A"]}}, "labels: thing has the class 'a' more than once"),
        (CAT | {"asked": None}, "asked: must name the judge .*'thing', 'style', got None"),
        (CAT | {"asked": "colour"}, "asked: must name the judge .*, got 'colour'"),
        (CAT | {"labels": None, "asked": None}, "labels: asked or prompts are given, but no judge"),
        (CAT | {"asked": {"cat": "thing"}}, "asked: give no dict, as the concept has no name"),
        (
            {"data": "{here}", "concept": {"cat": "cat", "dog": "dog"}, "asked": {"cat": "thing"}},
            "asked 'dog': must name the judge .*, got None",
        ),
        (
            CAT | {"concept": {"cat": "cat"}, "forget_prompts": {"feline": ["cat"]}},
            "forget_prompts: give a dict by concept, 'cat'",
        ),
        (
            {"forget": {"cat": "{here}"}, "retain": "{here}/more", "concept": "cat"},
            "concept: give a dict by concept, 'cat'",
        ),
        (CAT | {"forget_prompts": ["cat", "a zebra"]}, "forget_prompts: 'a zebra' does not name one class of 'thing' in labels"),
        (CAT | {"forget_prompts": ["a cat and a dog"]}, "forget_prompts: 'a cat and a dog' does not name one class of 'thing'"),
        (CAT | {"forget_prompts": ["an owl"]}, r"forget_prompts: none of 1 prompts contains any of \['cat'\]"),
        (CAT | {"forget_prompts": []}, "forget_prompts: there is no prompt"),
        (CAT | {"forget_prompts": "{here}/none.txt"}, "forget_prompts: .*none.txt cannot be read"),
        (CAT | {"retain_prompts": ["dog", "a Cat in noto style"]}, "retain_prompts: 'a Cat in noto style' names what to forget"),
        (CAT | {"retain_prompts": ["dog", "cat and dog in noto style"]}, "retain_prompts: .* names what to forget"),
        (CAT | {"retain_prompts": ["a zebra"]}, "retain_prompts: 'a zebra' does not name one class of any judge"),
        (
            CAT | {"labels": {"style": STYLES}, "asked": "style", "forget_prompts": None},
            "forget: none of 1 captions held out .* can serve as a prompt, as .* does not name one class .*; give forget_prompts",
        ),
        (CAT | {"search_seeds": 0}, "search, report: the number of images per prompt .* got 0"),
        (CAT | {"report_steps": 0}, "search_steps, report_steps: must be >= 1, got 0"),
    ],
)
def test_errors_name_argument_and_remedy(tmp_path, arguments, message):
    here = write(tmp_path / "here", ["a cat", "the cat", "one cat", "a dog"])
    arguments = {name: one.format(here=here) if isinstance(one, str) else one for name, one in arguments.items()}
    with pytest.raises(UnlearnError, match=message):
        made(**arguments)


def test_a_class_that_is_to_be_forgotten_is_not_kept_under_other_words(tmp_path):
    """The words of the concept and the class may differ; then the class counts, too."""
    source = write(tmp_path, ["my kitty, a cat", "a dog"])
    with pytest.raises(UnlearnError, match="retain_prompts: 'a cat' names what to forget"):
        made(data=source, concept="kitty", forget_prompts=["my kitty, a cat"], retain_prompts=["a cat"])


def test_yaml_can_say_it_and_processes_can_take_it(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextToImageDataModule, "data")
    path = f"{text_to_image.__name__}.TextToImageDataModule"
    common = {"data": write(tmp_path), "labels": LABELS, "retain_prompts": ["an owl"], "size": 2}
    for own in (
        {"concept": "cat", "asked": "thing", "forget_prompts": ["a cat"]},
        {"concept": {"cat": ["cat"]}, "asked": {"cat": "thing"}, "forget_prompts": {"cat": ["a cat"]}},
    ):
        settings = {"data": {"class_path": path, "init_args": common | own}}
        data = pickle.loads(pickle.dumps(parser.instantiate_classes(parser.parse_object(settings)).data))
        data.setup("fit")
        assert drawn(data.forget_dataloader("val")) == [("a cat", 1, -1)]

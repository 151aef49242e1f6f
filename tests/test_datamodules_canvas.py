"""The miniature UnlearnCanvas: which prompts ask for what, and what the gradient sees."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from _amounts import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from slug_lightning.datamodules.demo import canvas
from slug_lightning.datamodules.demo.canvas import AMOUNT, THINGS, CanvasDataModule, canvas_drawings
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS

STYLES = ["blob", "emojione", "firefox", "fluent", "noto"]
PROMPTS = {f"{thing} in {style} style": (style, thing) for thing in THINGS for style in STYLES}


@pytest.fixture(scope="module")
def drawings():
    return canvas_drawings()


@pytest.fixture
def quick(drawings, monkeypatch):
    """Reads the shard once."""
    monkeypatch.setattr(canvas, "canvas_drawings", lambda: drawings)


def made(**arguments) -> CanvasDataModule:
    data = CanvasDataModule(**{"renderings": 1, **arguments})
    data.setup("fit")
    return data


def asked(loader) -> Counter:
    """How often each prompt is drawn with which labels, by name; the labels must be right."""
    found: Counter = Counter()
    for batch in loader:
        assert set(batch) == {"text", "seed", "steps", "style", "thing"}
        assert all(batch[name].dtype == torch.int64 for name in ("seed", "steps", "style", "thing"))
        for text, style, thing in zip(batch["text"], batch["style"].tolist(), batch["thing"].tolist(), strict=True):
            assert style in (-1, STYLES.index(PROMPTS[text][0])) and thing in (-1, THINGS.index(PROMPTS[text][1]))
            found[text, style >= 0, thing >= 0] += 1
    return found


@examples(15)
@given(
    styles=st.lists(st.sampled_from(STYLES), max_size=4, unique=True),
    things=st.lists(st.sampled_from(THINGS), max_size=4, unique=True),
    search=st.integers(1, 60),
    report=st.integers(1, 60),
)
def test_each_prompt_asks_for_what_its_set_is_about(drawings, styles, things, search, report):
    assume(styles + things)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "canvas_drawings", lambda: drawings)
        patch.setattr(canvas, "render", lambda pictures, generator, amount: torch.zeros(len(pictures), 3, 1, 1))
        data = made(style=styles, thing=things, search_pictures=search, report_pictures=report)
    assert data.concepts == [f"{style} style" for style in styles] + things
    for split, wanted in (("val", search), ("test", report)):
        for number, concept in enumerate(data.concepts):
            is_style = number < len(styles)
            own = {text for text, pair in PROMPTS.items() if pair[not is_style] == concept.removesuffix(" style")}
            found = asked(data.forget_dataloader(split, concept))
            assert found.keys() == {(text, is_style, not is_style) for text in own}
            (times,) = set(found.values())
            assert (times - 1) * len(own) < wanted <= times * len(own)
        kept = {text for text, (style, thing) in PROMPTS.items() if style not in styles and thing not in things}
        found = asked(data.retain_dataloader(split))
        assert found.keys() == {(text, True, True) for text in kept}
        (times,) = set(found.values())
        assert (times - 1) * len(kept) < 2 * wanted <= times * len(kept)


@pytest.mark.parametrize("concept", [{"style": "noto"}, {"thing": "octopus"}])
def test_by_default_there_are_pictures_enough_to_judge_on(quick, concept):
    data = made(**concept)
    least = {"val": (40, 80), "test": (100, 240)}
    for split, counts in least.items():
        loaders = data.forget_dataloader(split), data.retain_dataloader(split)
        assert all(len(loader.dataset) >= count for loader, count in zip(loaders, counts, strict=True))


def test_search_and_report_start_from_other_noise_and_say_so(quick):
    data = made(style="blob", thing=["cat", "bus"], seed=3, search_steps=4, report_steps=30)
    drawn = {
        split: {
            (text, seed): steps
            for loader in (*(data.forget_dataloader(split, name) for name in data.concepts), data.retain_dataloader(split))
            for batch in loader
            for text, seed, steps in zip(batch["text"], batch["seed"].tolist(), batch["steps"].tolist(), strict=True)
        }
        for split in ("val", "test")
    }
    assert set(drawn["val"].values()) == {4} and set(drawn["test"].values()) == {30}
    assert not {seed for _, seed in drawn["val"]} & {seed for _, seed in drawn["test"]}
    loader = data.forget_dataloader("test", "cat")
    assert len({(text, int(seed)) for b in loader for text, seed in zip(b["text"], b["seed"], strict=True)}) == 120
    other = {int(seed) for batch in made(style="blob", seed=4).retain_dataloader("val") for seed in batch["seed"]}
    assert not other & {seed for _, seed in drawn["val"]}
    assert data.notes["forget 'blob style'"] == (
        "forget 'blob style': three sets: 20 train, 40 validation, 120 test; fresh renderings for the gradient, 1 of each "
        "drawing; validation and test split draw the same 20 prompts, 2 and 6 times each, from different seeds, in 4 and 30 steps"
    )
    assert "same 72 prompts" in data.notes["retain"]


def test_the_gradient_sees_renderings_of_the_drawings_its_captions_name(drawings, quick):
    """Written out from scratch: drawn anew with the same generator, and put into the order of the captions."""
    data = made(thing="cat", renderings=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    rows = [row for row in range(100) if drawings.things[row] == THINGS.index("cat")]
    rest = [row for row in range(100) if row not in rows]
    for loader, own in ((data.forget_dataloader("train"), rows), (data.retain_dataloader("train"), rest)):
        own = own * 3
        images = [render(drawings.pictures[own[i : i + 256]], generator, AMOUNT) for i in range(0, len(own), 256)]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(5))
        batches = list(loader)
        found = torch.cat([batch["image"] for batch in batches])
        assert found.equal(torch.cat(images)[order].clamp(-1, 1)) and found.shape[1:] == (3, 64, 64)
        names = [(THINGS[drawings.things[own[i]]], STYLES[drawings.styles[own[i]]]) for i in order]
        assert [text for batch in batches for text in batch["text"]] == [f"{thing} in {style} style" for thing, style in names]
        keys = {"image", "text", "style", "thing"} | ({"concept"} if own[: len(rows)] == rows else set())
        assert all(set(batch) == keys for batch in batches)


def test_each_forget_caption_names_its_concept(quick):
    data = made(style="noto", thing="cat")
    for concept in ("noto style", "cat"):
        for batch in data.forget_dataloader("train", concept):
            assert set(batch["concept"]) == {concept}
            assert all(concept in text for text in batch["text"])


def test_a_run_takes_its_loaders_without_a_complaint(quick):
    found = resolve_loaders(None, None, made(style=["blob", "noto"], thing="cat"))
    assert list(found.forget) == ["blob style", "noto style", "cat"]
    assert all(len(list(parts[split])) for parts in (*found.forget.values(), found.retain) for split in SPLITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "style, thing: name at least one"),
        ({"thing": "ant"}, "thing: 'ant' is not known"),  # it is among the emoji, but not among these
        ({"style": "notto"}, "style: 'notto' is not known; near misses: noto"),
        ({"thing": ["cat", "cat"]}, "thing: 'cat' is given more than once"),
        ({"style": STYLES}, "style, thing: nothing is left to retain; forget less"),
        ({"style": "noto", "renderings": 0}, "renderings: must be >= 1, got 0"),
        ({"style": "noto", "search_pictures": 0}, "search, report: the number of images per prompt .* got 0"),
        ({"style": "noto", "report_steps": 0}, "search_steps, report_steps: must be >= 1, got 0"),
    ],
)
def test_errors_name_argument_and_remedy(quick, arguments, message):
    with pytest.raises(UnlearnError, match=message):
        made(**arguments)


def test_setup_renders_once(quick):
    data = made(style="blob")
    part = data.forget_dataloader("train").dataset
    data.setup("test")
    assert data.forget_dataloader("train").dataset is part


def test_the_command_line_takes_one_name_or_a_list():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CanvasDataModule, "data")
    path = f"{canvas.__name__}.CanvasDataModule"
    arguments = ["--data.style", "[blob]", "--data.thing", "cat", "--data.search_steps", "3"]
    data = parser.instantiate_classes(parser.parse_args(["--data", path, *arguments])).data
    assert data.concept == ["blob style", "cat"] and data.steps["val"] == 3

"""What the shipped modules and datamodules take for near, and how often it is asked for."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from _tiny_diffusion import tiny_pipeline
from _tiny_vlm import FAMILIES, pictures, tiny_vlm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _tiny import PlainRunner
from slug_lightning.datamodules import CanvasDataModule, EmojiDataModule, EmojiQuestionDataModule, UnlearnDataModule
from slug_lightning.datamodules.demo.canvas import THINGS
from slug_lightning.datamodules.demo.questions import QUESTIONS
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.modules import ClassifierModule, DiffusionModule, EmbeddedCanvas, EmbeddedClip, EmbeddedVLM, VLMModule
from slug_lightning.objective.nearness import Nearest, features_of, find_nearest, near_rows
from slug_lightning.objective.objective import Objective
from slug_lightning.utils.loaders import SPLITS


def nearest_of(objective):
    return find_nearest(features_of(objective, "forget"), partial(features_of, objective, "retain"))


def objective_of(module: Any, data: UnlearnDataModule) -> Objective:
    if not data.notes:
        data.setup("fit")
    loaders = {
        "forget": {split: data.forget_dataloader(split) for split in SPLITS},
        "retain": {split: data.retain_dataloader(split) for split in SPLITS},
    }
    return Objective(module.eval(), loaders, PlainRunner())


def nearest(module: Any, data: UnlearnDataModule) -> Nearest:
    found = nearest_of(objective_of(module, data))
    assert found is not None
    return found


# ---- classifiers


@pytest.fixture(scope="module")
def digits() -> tuple[ClassifierModule, TensorDataset, TensorDataset]:
    """A small classifier of scikit-learn's digits, what it was trained on, and the rest."""
    from sklearn.datasets import load_digits

    every = load_digits()
    images, labels = torch.tensor(every.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(every.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(600, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return ClassifierModule(net, 10), TensorDataset(images[:600], labels[:600]), TensorDataset(images[600:], labels[600:])


def test_the_classes_near_a_digit_are_those_it_is_confused_with(digits):
    """On samples that the model has never seen: the five have most of the confusion, and far more than five at random."""
    module, seen, rest = digits
    covered = []
    for digit in range(10):
        own = seen.tensors[1] == digit
        sets = [TensorDataset(*(tensor[mask] for tensor in seen.tensors)) for mask in (own, ~own)]
        found = nearest(module, UnlearnDataModule(*sets))
        assert found.kind == "class" and len(found.concepts) == 5 and str(digit) not in found.concepts
        with torch.no_grad():
            confused = module.model(rest.tensors[0][rest.tensors[1] == digit]).softmax(1).mean(0)
        confused[digit] = 0
        covered.append(float(confused[[int(name) for name in found.concepts]].sum() / confused.sum()))
    assert sum(covered) / 10 > 0.7 > 5 / 9


def test_near_rows_of_a_classifier_are_samples_of_the_near_classes(digits):
    module, seen, _ = digits
    own = seen.tensors[1] == 0
    sets = [TensorDataset(*(tensor[mask] for tensor in seen.tensors)) for mask in (own, ~own)]
    data = UnlearnDataModule(*sets)
    objective = objective_of(module, data)
    found = nearest_of(objective)
    near = near_rows(objective, found)
    for split in ("val", "test"):
        labels = torch.cat([batch[1] for batch in near.splits[split]])
        every = torch.cat([batch[1] for batch in data.retain_dataloader(split)])
        assert {str(int(label)) for label in labels} == set(found.concepts)
        assert len(labels) == sum(str(int(label)) in found.concepts for label in every)


@pytest.mark.parametrize("count", [3, 60])
def test_nothing_is_near_samples_of_any_class(digits, count):
    """Neither where they are of all classes, nor where they happen to be of a few; a class is near one that is mislabelled."""
    module, seen, _ = digits
    gone = torch.zeros(600, dtype=torch.bool)
    gone[torch.randperm(600, generator=torch.Generator().manual_seed(0))[:count]] = True

    def found(gone: Tensor) -> Nearest | None:
        sets = [TensorDataset(*(tensor[mask] for tensor in seen.tensors)) for mask in (gone, ~gone)]
        return nearest_of(objective_of(module, UnlearnDataModule(*sets)))

    assert found(gone) is None
    zeros = seen.tensors[1] == 0
    zeros[zeros.nonzero()[:2, 0]] = False  # left among the retain data by mistake
    assert found(zeros).kind == "class"


# ---- vision-language models


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_pictures_depend_on_the_picture_alone(family):
    """Not on the question, nor on what else is in the batch, also where pictures are cut into tiles."""
    module = VLMModule(*tiny_vlm(family)[:1], processor=tiny_vlm(family)[1]).eval()
    images = pictures(["cat", "frog", "cat"], 3)
    with torch.no_grad():
        whole = module.embed({"image": images, "question": ["what is this ?", "what ?", "what ?"]}, 0)
        alone = torch.cat([module.embed({"image": images[i : i + 1], "question": ["what ?"]}, 0) for i in range(3)])
    assert whole.ndim == 2 and len(whole) == 3 and whole.dtype == torch.float32
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)


@pytest.fixture(scope="module")
def vlm() -> EmbeddedVLM:
    return EmbeddedVLM()


def test_wordings_are_no_concepts(vlm):
    batch = {"answer": ["a cat", "It is a cat.", "blue"], "aliases": [["cat"], ["cat", "kitten"], ["blue"]]}
    assert vlm.labels({**batch, "kind": ["animal", "animal", "colour"]}) == {
        "animal": ["cat", "cat", None],
        "colour": [None, None, "blue"],
    }
    assert vlm.labels(batch) == {}


@pytest.mark.parametrize(("kind", "name"), [("thing", "octopus"), ("style", "blob")])
def test_near_questions_are_about_what_is_near_in_all_wordings(vlm, kind, name):
    data = EmojiQuestionDataModule(**{kind: name}, choices=4)
    found = nearest(vlm, data)
    drawings = load_drawings()
    known = drawings.thing_names if kind == "thing" else [f"{style} style" for style in drawings.style_names]
    assert found.kind == kind and set(found.concepts) <= {*known} - {name, f"{name} style"}
    assert len(found.concepts) == (5 if kind == "thing" else 4)
    splits = data.render_near(found.concepts)
    assert splits is not None and list(splits) == ["val", "test"]
    images: dict[str, Tensor] = {}
    for split, least in (("val", 100), ("test", 500)):
        batches = list(splits[split])
        columns = {key: [one for batch in batches for one in batch[key]] for key in batches[0] if key != "index"}
        assert least <= len(columns["question"]) <= least * 1.2
        assert {aliases[0] for aliases in columns["aliases"]} == {one.removesuffix(" style") for one in found.concepts}
        counts = Counter(columns["question"])
        assert counts.keys() == {*QUESTIONS[kind], *QUESTIONS["both"]} and max(counts.values()) - min(counts.values()) <= 1
        assert all(alias[0] in answer for alias, answer in zip(columns["aliases"], columns["answer"], strict=True))
        assert ("choices" in columns) == (split == "val")
        images[split] = torch.stack(columns["image"])
    assert not set(images["val"].flatten(1).sum(1).tolist()) & set(images["test"].flatten(1).sum(1).tolist())


def test_nothing_of_what_is_to_be_forgotten_is_near():
    data = EmojiQuestionDataModule(thing="octopus", style="blob")
    splits = data.render_near(["cat", "octopus", "blob style"])
    for batch in splits["test"]:
        assert {aliases[0] for aliases in batch["aliases"]} == {"cat"}
        assert not any("blob" in answer for answer in batch["answer"])
    assert data.render_near(["octopus"]) is None


# ---- wordings


@pytest.mark.parametrize(("kind", "name"), [("thing", "octopus"), ("style", "blob")])
def test_the_forget_set_has_a_metric_for_each_wording(vlm, kind, name):
    data = EmojiQuestionDataModule(**{kind: name})
    data.setup("fit")
    wanted = [f"{one}_{number}" for one in (kind, "both") for number in range(1, len(QUESTIONS[one]) + 1)]
    texts = {f"{one}_{number}": text for one, all in QUESTIONS.items() for number, text in enumerate(all, start=1)}
    batches = list(data.forget_dataloader("val"))
    assert {wording for batch in batches for wording in batch["wording"]} == set(wanted)
    for batch in batches:
        assert [texts[wording] for wording in batch["wording"]] == batch["question"]
    scores = vlm.eval().scores(batches[0], 0)
    assert set(scores) >= {f"{wording}_accuracy" for wording in wanted} | {"answer_accuracy", f"{kind}_accuracy"}
    every = torch.stack([scores[f"{wording}_accuracy"] for wording in wanted])
    assert (~every.isnan()).sum(0).eq(1).all()  # each question has one wording
    assert every.nan_to_num(0).sum(0).equal(scores["answer_accuracy"])
    assert "wording" not in next(iter(data.retain_dataloader("val")))


def test_a_wording_must_not_have_the_name_of_a_kind(vlm, monkeypatch):
    monkeypatch.setattr(vlm, "answer", lambda batch: ["cat"] * 2)
    batch = {"image": torch.zeros(2, 3, 4, 4), "question": ["?"] * 2, "aliases": [["cat"]] * 2, "kind": ["a", "b"]}
    assert set(vlm.scores({**batch, "wording": ["a_1", "b_1"]}, 0)) == {
        f"{name}_accuracy" for name in ("answer", "a", "b", "a_1", "b_1")
    }
    with pytest.raises(UnlearnError, match="wording: 'a_accuracy' is that of other questions; rename the wording 'a'"):
        vlm.scores({**batch, "wording": ["a", "b"]}, 0)


# ---- Stable Diffusion


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_features_of_captions_depend_on_each_alone_and_come_from_every_text_encoder(kind):
    module = DiffusionModule(tiny_pipeline(kind)).eval()
    with torch.no_grad():
        whole = module.embed({"text": ["a cat", "a dog", "a cat"]}, 0)
        alone = module.embed({"text": ["a cat"]}, 0)
    torch.testing.assert_close(whole[[0, 2]], alone.repeat(2, 1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)
    torch.testing.assert_close(whole.norm(dim=1) ** 2, torch.full((3,), 2.0 if kind == "sdxl" else 1.0))
    assert module.labels({"text": ["a cat"]}) == {}


@pytest.fixture(scope="module")
def canvas() -> EmbeddedCanvas:
    return EmbeddedCanvas()


@pytest.mark.parametrize(("kind", "name"), [("thing", "octopus"), ("style", "blob")])
def test_near_prompts_are_found_without_drawing_and_drawn_about_as_often_as_a_concept(canvas, monkeypatch, kind, name):
    def never(batch):
        raise AssertionError("drawn")

    monkeypatch.setattr(canvas, "draw", never)
    data = CanvasDataModule(**{kind: name}, renderings=2)
    found = nearest(canvas, data)
    assert found.kind == kind and name not in found.concepts and len(found.concepts) == (5 if kind == "thing" else 4)
    splits = data.render_near(found.concepts)
    retained = {
        split: {
            (text, int(seed))
            for batch in data.retain_dataloader(split)
            for text, seed in zip(batch["text"], batch["seed"], strict=True)
        }
        for split in ("val", "test")
    }
    for split, (least, most) in {"val": (40, 50), "test": (120, 160)}.items():
        drawn = [(text, int(seed)) for batch in splits[split] for text, seed in zip(batch["text"], batch["seed"], strict=True)]
        assert least <= len(drawn) <= most and len(set(drawn)) == len(drawn)
        assert not set(drawn) & (retained["val"] | retained["test"])
        assert all(any(concept in text for concept in found.concepts) for text, _ in drawn)
        for batch in splits[split]:
            assert all(THINGS[label] in text for label, text in zip(batch["thing"].tolist(), batch["text"], strict=True))
            assert batch["style"].min() >= 0 and batch["steps"].unique().tolist() == [data.steps[split]]
    assert data.render_near([name]) is None


def test_prompts_without_labels_are_near_by_their_texts(canvas):
    """The nearest captions decide on a threshold, and prompts are measured by it, from every seed."""
    columns = ("image", "text")
    data = CanvasDataModule(thing="cat", renderings=2)
    data.setup("fit")

    def unlabelled(samples):
        return {"image": torch.stack([s["image"] for s in samples]), "text": [s["text"] for s in samples]}

    objective = objective_of(canvas, data)
    for kind in ("forget", "retain"):
        loaders = dict(objective.loaders[kind])
        loaders["train"] = DataLoader(loaders["train"].dataset, batch_size=64, collate_fn=unlabelled)
        objective.loaders = {**objective.loaders, kind: loaders}
        assert set(next(iter(loaders["train"]))) == set(columns)
    found = nearest_of(objective)
    assert found.kind is None
    near = near_rows(objective, found)
    texts = {split: Counter(text for batch in near.splits[split] for text in batch["text"]) for split in ("val", "test")}
    assert set(texts["val"]) == set(texts["test"]) and 3 <= len(texts["val"]) <= 8
    assert any(text.startswith("dog") for text in texts["val"])
    assert set(texts["val"].values()) == {1} and set(texts["test"].values()) == {3}


# ---- CLIP


def test_styles_that_are_near_are_rendered_anew_and_no_more_of_them_than_needed():
    data = EmojiDataModule(style="blob")
    found = nearest(EmbeddedClip(), data)
    assert found.kind == "style" and len(found.concepts) == 4
    splits = data.render_near(found.concepts)
    labels = {split: torch.cat([batch["style"] for batch in splits[split]]) for split in splits}
    assert {split: len(own) for split, own in labels.items()} == {"val": 100, "test": 500}
    blob = load_drawings().style_names.index("blob")
    assert all(set(own.tolist()) == {*range(5)} - {blob} for own in labels.values())

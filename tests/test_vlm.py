"""Vision-language models of every family forget inside a Trainer, and what is written is loaded by plain transformers."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _amounts import sample
from _callback import unlearn_callback
from _tiny_vlm import (
    COLOURS,
    FAMILIES,
    QUESTIONS,
    WITH_CLIP,
    knowing_vlm,
    pictures,
    plain_loss,
    save,
    tiny_clip,
    tiny_vlm,
    tower_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from _tiny import trainer
from slug_lightning import UnlearnPatch
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.clip.models import encode_text, load_clip, matching_loss
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.image_text.questions import Question, Questions, question_batch
from slug_lightning.modules.vlm import VLMModule
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.vlm.answers import UNSPACED, mentions, normalise

pytestmark = pytest.mark.uncovered

FORGET, RETAIN = ["frog"], ["cat", "sea dog"]


def asked_about(things: list[str], seed: int, count: int = 4, choices: tuple[str, ...] = ()) -> Questions:
    every = things * count
    wordings = [QUESTIONS[row // len(things) % 2] for row in range(len(every))]
    asked = [Question(row, wordings[row], thing, (thing,), "thing", thing, choices) for row, thing in enumerate(every)]
    return Questions(pictures(every, seed), asked)


def data(**search: Any) -> UnlearnDataModule:
    parts = {"forget_val": asked_about(FORGET, 11, **search), "forget_test": asked_about(FORGET, 12)}
    parts |= {"retain_val": asked_about(RETAIN, 13, **search), "retain_test": asked_about(RETAIN, 14)}
    return UnlearnDataModule(asked_about(FORGET, 15), asked_about(RETAIN, 16), **parts, batch_size=8, collate_fn=question_batch)


def forgetting(**options: Any) -> UnlearnCallback:
    return unlearn_callback(**{"retain_tolerance": 1.0, "max_evaluations": 15, "step_margin": 0.5, "replay": False, **options})


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not bitwise_equal(one[name], other[name])}


class Forgotten(NamedTuple):
    """What a run has left."""

    family: Any
    objective: str
    folder: Path
    module: VLMModule
    callback: UnlearnCallback


OBJECTIVES = [(family, "answers") for family in FAMILIES] + [(family, "clip") for family in WITH_CLIP]
# A tower of a CLIP and one of its own kind, and both objectives; all of them take minutes.
QUICK = [("llava", "answers"), ("llava", "clip"), ("qwen2_vl", "answers")]
RUNS = [
    pytest.param(objective, marks=() if objective in QUICK else pytest.mark.slow, id="-".join(objective))
    for objective in OBJECTIVES
]


def on_disk(family: Any, folder: Path) -> None:
    """Write a model that knows something, and a CLIP with its tower that knows it too."""
    model, processor = knowing_vlm(family)
    save(folder / "original", model, processor)
    if family in WITH_CLIP:
        save(folder / "clip", *tiny_clip(family, model, steps=25))


def made(folder: Path, objective: Any = "answers", **options: Any) -> VLMModule:
    clip = f"hf:{folder / 'clip'}" if objective == "clip" else None
    return VLMModule(folder / "original", objective=objective, clip=clip, **options)


@pytest.fixture(scope="module", params=RUNS)
def forgotten(request, tmp_path_factory) -> Forgotten:
    """A model from disk that has forgotten something."""
    family, objective = request.param
    folder = tmp_path_factory.mktemp("-".join(request.param))
    on_disk(family, folder)
    module, callback = made(folder, objective), forgetting()
    fitting = trainer(callback)
    fitting.fit(module, datamodule=data())
    module.save_pretrained(folder / "model")
    fitting.save_checkpoint(folder / "unlearned.ckpt")
    callback.report.patch.save(folder / "patch.safetensors")
    return Forgotten(family, objective, folder, module, callback)


def plain(folder: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_what_plain_transformers_loads_differs_in_the_edited_tensors_of_the_tower_alone(forgotten):
    report = forgotten.callback.report
    assert report.status == "unlearned" and report.before["forget"] == {"answer_accuracy": 1.0}
    assert report.before["retain"]["answer_accuracy"] == 1 and report.after["forget"] == {"answer_accuracy": 0.0}
    (original, _), (saved, processor) = plain(forgotten.folder / "original"), plain(forgotten.folder / "model")
    assert type(saved) is type(original)
    before, after = tensors_of(original), tensors_of(saved)
    assert differing(before, after) == set(report.tensors) == set(report.patch.base) and report.tensors
    assert not differing(after, tensors_of(forgotten.module.model))
    tower = tower_of(saved).state_dict().keys()
    assert {name.removeprefix(f"{forgotten.module.tower_name}.") for name in report.tensors} <= tower
    assert all(after[name].ndim > 1 for name in report.tensors)
    batch = {"image": pictures(FORGET * 2, 21), "question": QUESTIONS}
    said = VLMModule(saved, processor=processor).answer(batch)
    assert said == forgotten.module.eval().answer(batch) and "frog" not in said
    assert VLMModule(original, processor=processor).answer(batch) == FORGET * 2


def test_nothing_but_candidates_ever_had_a_gradient_and_the_search_leaves_none(forgotten):
    module = forgotten.module
    assert all(p.grad is None for p in module.parameters())
    free = {name for name, p in module.named_parameters() if p.requires_grad}
    assert free and all(name.startswith(f"model.{module.tower_name}.") for name in free)
    scored = {score["layer"] for score in forgotten.callback.report.scores}
    matrices = {name for name, p in module.named_parameters() if p.requires_grad and p.ndim > 1}
    assert scored == {name for name in matrices if not name.endswith("position_embedding.weight")}
    if forgotten.family.startswith("llava"):
        assert not any("layers.2" in name or "post_layernorm" in name for name in free)


def test_either_objective_goes_where_both_losses_rise(forgotten):
    """Of a model and a CLIP that know the same pictures: what one unlearns, the other knows less well."""
    if forgotten.family not in WITH_CLIP:
        assert forgotten.callback.report.patch.edits[0].step > 0
        return
    (edit,) = forgotten.callback.report.patch.edits
    assert edit.step > 0
    module = made(forgotten.folder, "clip")
    batch = question_batch([asked_about(FORGET, 15)[row] for row in range(4)])

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            return float(module.answer_loss(batch)), float(matching_loss(module.clip, batch))

    before = losses()
    assert before[0] < 0.5 and before[1] < 0.5
    UnlearnPatch.load(forgotten.folder / "patch.safetensors").apply(module.model)
    assert all(new > old + 0.1 for new, old in zip(losses(), before, strict=True))


def test_the_patch_fits_the_plain_model_its_tower_and_the_clip_that_it_comes_from(forgotten):
    patch = UnlearnPatch.load(forgotten.folder / "patch.safetensors")
    (name,) = patch.base
    saved = tensors_of(forgotten.module.model)[name]
    for part in (lambda model: model, tower_of):
        model, _ = plain(forgotten.folder / "original")
        before = tensors_of(model)
        patch.apply(part(model))
        assert differing(before, tensors_of(model)) == {name} and bitwise_equal(tensors_of(model)[name], saved)
        patch.revert(part(model))
        assert not differing(before, tensors_of(model))
    if forgotten.family in WITH_CLIP:
        clip = AutoModel.from_pretrained(forgotten.folder / "clip")
        before = tensors_of(clip)
        patch.apply(clip)
        (changed,) = differing(before, tensors_of(clip))
        assert changed.startswith("vision_model.") and bitwise_equal(tensors_of(clip)[changed], saved)
        patch.revert(clip)
        assert not differing(before, tensors_of(clip))


def test_a_checkpoint_holds_the_tower_alone_and_a_fit_that_goes_on_from_it_knows_the_edit(forgotten):
    path, tower = forgotten.folder / "unlearned.ckpt", forgotten.module.tower_name
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert kept.keys() == {f"model.{name}" for name in tensors_of(forgotten.module.model) if name.startswith(f"{tower}.")}
    again, callback = made(forgotten.folder, forgotten.objective), forgetting()
    trainer(callback).fit(again, datamodule=data(), ckpt_path=path)
    assert callback.report.patch is None  # there was nothing left to do
    assert not differing(tensors_of(again.model), tensors_of(forgotten.module.model))


# ---- the losses of the two objectives


@pytest.mark.parametrize(("family", "objective"), OBJECTIVES)
def test_a_small_step_raises_the_loss_of_its_objective_by_the_square_of_the_gradient(family, objective, tmp_path):
    model, processor = tiny_vlm(family)  # what knows nothing is not at the bottom of a valley
    clip = f"hf:{save(tmp_path, *tiny_clip(family, model))}" if objective == "clip" else None
    module = VLMModule(model, processor=processor, objective=objective, clip=clip)
    batch = question_batch([asked_about(["frog"], 3)[row] for row in range(3)])
    free = [p for p in module.parameters() if p.requires_grad]
    loss = module.forget_step(batch, 0)
    gradients = torch.autograd.grad(loss, free)
    before = loss.detach()
    square = sum(float(gradient.square().sum()) for gradient in gradients)
    step = 1e-4 * float(before) / square
    with torch.no_grad():
        for p, gradient in zip(free, gradients, strict=True):
            p += step * gradient
        after = module.forget_step(batch, 0)
    assert float(after - before) == pytest.approx(step * square, rel=0.1)


@pytest.mark.parametrize("family", sample(WITH_CLIP, ["llava", "paligemma"]))
def test_by_its_clip_a_model_sees_what_the_clip_sees_with_its_own_processor(family, tmp_path):
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    model, processor = knowing_vlm(family)
    clip, tokenizer = tiny_clip(family, model)
    name = f"hf:{save(tmp_path, clip, tokenizer)}"
    module = VLMModule(model, processor=processor, objective="clip", clip=name)
    batch = question_batch([asked_about(list(COLOURS), 3)[row] for row in range(3)])
    images = processor.image_processor
    kept = {"image_mean": images.image_mean, "image_std": images.image_std}
    square = {"height": 16, "width": 16}
    kind = CLIPImageProcessor if family.startswith("llava") else SiglipImageProcessor
    sizes = {"size": {"shortest_edge": 16}, "crop_size": square} if family.startswith("llava") else {"size": square}
    pixels = kind(**sizes, **kept)(list(batch["image"]), return_tensors="pt").pixel_values
    _, tokenize = load_clip(name)
    plain_batch = {"image": pixels, "text": tokenize(batch["text"])}
    with torch.no_grad():
        expected = matching_loss(clip, plain_batch)
        torch.testing.assert_close(module.forget_step(batch, 0), expected, rtol=1e-4, atol=1e-5)
    shared = {id(p) for p in module.clip.model.vision_model.parameters()} & {id(p) for p in tower_of(model).parameters()}
    assert len(shared) == len(list(tower_of(model).parameters()))


def test_a_siglip_is_loaded_by_name_with_both_towers_and_texts_of_the_length_that_it_knows(tmp_path):
    clip, tokenizer = tiny_clip("paligemma", knowing_vlm("paligemma")[0])
    loaded, tokenize = load_clip(f"hf:{save(tmp_path, clip, tokenizer)}")
    assert type(loaded).__name__ == "SiglipModel" and loaded.training
    texts = tokenize(["cat", "a sea dog of the colour of the frog is the bird of the cat"])
    assert texts.shape == (2, 12)
    with torch.no_grad():
        plain_features = clip.get_text_features(texts)
        features = getattr(plain_features, "pooler_output", plain_features)
        torch.testing.assert_close(encode_text(loaded.eval(), texts), features / features.norm(dim=-1, keepdim=True))


# ---- precision, choices, what is shown


@pytest.mark.parametrize(
    ("family", "dtype"),
    sample([("llava", "float16"), ("paligemma", "bfloat16"), ("qwen2_vl", "bfloat16")], [("qwen2_vl", "bfloat16")]),
)
def test_a_model_in_half_precision_forgets_in_it(family, dtype, tmp_path):
    on_disk(family, tmp_path)
    module = made(tmp_path, dtype=dtype)
    before, kind = tensors_of(module.model), getattr(torch, dtype)
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {kind}
    model, processor = plain(tmp_path / "original")
    image = pictures(FORGET, 1)[0]
    batch = {"image": [image], "question": QUESTIONS[:1], "answer": FORGET, "choices": [["cat", "frog"]]}
    with torch.no_grad():
        exact = plain_loss(family, model, processor, image, QUESTIONS[0], FORGET[0])
        assert float(module.answer_loss(batch)) == pytest.approx(float(exact), rel=0.1, abs=0.02)
    assert module.answer(batch) == FORGET
    callback = forgetting()
    trainer(callback).fit(module, datamodule=data())
    module.save_pretrained(tmp_path / "model")
    assert callback.report.status == "unlearned"
    (file,) = (tmp_path / "model").glob("*.safetensors")
    saved = load_file(file)
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {kind}
    assert differing(before, tensors_of(module.model)) == set(callback.report.tensors)


@pytest.mark.parametrize(("saved", "loaded"), [("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32")])
def test_a_clip_is_known_whatever_the_precision_in_which_the_model_was_saved_and_is_loaded(saved, loaded, tmp_path):
    model, processor = tiny_vlm("llava")
    name = f"hf:{save(tmp_path / 'clip', *tiny_clip('llava', model))}"
    folder = save(tmp_path / "model", model.to(getattr(torch, saved)), processor)
    module = VLMModule(folder, objective="clip", clip=name, dtype=loaded)
    assert module.clip.model.dtype == getattr(torch, loaded)
    batch = question_batch([asked_about(FORGET, 3)[row] for row in range(3)])
    module.forget_step(batch, 0).backward()
    assert any(p.grad is not None for p in tower_of(module.model).parameters())


def test_a_search_among_choices_generates_no_answers(tmp_path, monkeypatch):
    on_disk("llava", tmp_path)
    module = made(tmp_path)
    questions: list[int] = []
    generate = module._generate
    monkeypatch.setattr(module, "_generate", lambda batch: questions.append(len(batch["question"])) or generate(batch))
    callback = forgetting(output_dir=str(tmp_path / "run"))
    trainer(callback).fit(module, datamodule=data(choices=tuple(COLOURS)))
    report = callback.report
    assert report.status == "unlearned" and report.search_after["forget"]["answer_accuracy"] == 0
    # Report data before and after the edit, near ones as well, and the pictures that are shown of them.
    assert sorted(questions) == [4, 4, 4, 4, 8, 8, 8, 8, 8, 8]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_pictures_are_shown_with_question_and_answer(forgotten):
    report, module = forgotten.callback.report, forgotten.module
    shown = report.gallery["forget"]
    assert shown.titles == [f"{QUESTIONS[row % 2]} → frog" for row in range(4)]
    assert shown.said is not None and not any(mentions(text, FORGET) for text in shown.said)
    assert torch.equal(shown.before, pictures(FORGET * 4, 12)) and torch.equal(shown.after, shown.before)
    sizes = [(8, 16), (16, 8), *[(16, 16)] * 8]
    batch = {"image": [torch.full((3, *size), 51, dtype=torch.uint8) for size in sizes], "question": ["what ?"] * 10}
    found, titles = module.gallery_step(batch, 0)
    assert found.shape == (8, 3, 16, 16) and found.unique().tolist() == [pytest.approx(0.2)]
    assert len(titles) == 8 and all(title.startswith("what ?") for title in titles)


# ---- answers

WORD = st.text(st.characters(categories=["L", "N"], include_characters="é"), min_size=1, max_size=6).filter(normalise)
SIGNS = st.text(st.sampled_from(" .,!?'’\"-\n"), min_size=1, max_size=3)


@given(st.lists(WORD, min_size=1, max_size=3), st.lists(WORD, max_size=3), st.lists(WORD, max_size=3), SIGNS)
def test_an_alias_is_named_wherever_it_stands_whatever_stands_around_it(alias, before, behind, sign):
    # Some letters are others in the other case.
    swapped = [word.swapcase() if word.swapcase().casefold() == word.casefold() else word for word in alias]
    answer = sign.join([*before, *swapped, *behind])
    assert mentions(answer, [" ".join(alias)]) and mentions(answer, ["no such thing at all", sign.join(alias)])
    assert mentions(unicodedata.normalize("NFD", answer), [" ".join(alias)])


@given(st.lists(WORD, min_size=1, max_size=3), st.lists(WORD, max_size=5))
def test_an_alias_is_named_only_as_whole_words_side_by_side(alias, said):
    wanted, words = [normalise(word) for word in alias], normalise(" ".join(said)).split()
    flat = " ".join(wanted).split()
    assume(not UNSPACED.search(" ".join(wanted)))  # such names count wherever they stand
    found = any(words[i : i + len(flat)] == flat for i in range(len(words) - len(flat) + 1))
    assert mentions(" ".join(said), [" ".join(alias)]) == found


def test_words_are_compared_without_case_accents_and_signs_but_with_what_tells_them_apart():
    assert normalise("It's  Beyoncé!") == "it s beyonce" and normalise("T-shirt") == "t shirt"
    assert normalise("ΣΊΣΥΦΟΣ") == normalise("Σίσυφος") and normalise("की") != normalise("का")
    assert normalise("C++, C#") == "c++ c#"


@given(st.text(max_size=30))
def test_nothing_is_named_by_a_name_without_a_letter_and_normal_texts_stay_as_they_are(text):
    assert not mentions(text, ["", " ", "!?", "--"]) and not mentions(text, [])
    assert normalise(normalise(text)) == normalise(text)

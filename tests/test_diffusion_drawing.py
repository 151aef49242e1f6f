"""What is drawn depends on prompt, seed and weights alone, and judges see it as it was drawn."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from _amounts import examples
from _tiny_diffusion import SIZE, tiny_clips, tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import resize

from slug_lightning import UnlearnError
from slug_lightning.diffusion.judges import NamedClassifier, make_judges
from slug_lightning.diffusion.pipelines import draw
from slug_lightning.diffusion.source_clip import OPENAI
from slug_lightning.modules.diffusion import DiffusionModule
from slug_lightning.objective.samples import MAX_SAMPLES

TEXTS = ["cat in blob style", "dog in noto style", "frog", "a rose"]
SCHEDULERS = [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler]
SCHEDULERS += [PNDMScheduler, LMSDiscreteScheduler, HeunDiscreteScheduler]


def drawn(pipeline: Any, texts: list[str], seeds: list[int], **options: Any) -> Tensor:
    return draw(pipeline, texts, seeds, **{"steps": 3, "guidance": 4.0, "size": SIZE, **options})


@functools.cache
def drawing_pipeline() -> Any:
    """One that no test changes."""
    return tiny_pipeline("sd1")


def close(one: Tensor, other: Tensor) -> bool:
    """But for rounding, which depends on the size of a batch."""
    return torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_prompt_gives_the_same_picture_whatever_stands_beside_it(kind):
    pipeline = tiny_pipeline(kind)
    seeds = [5, 6, 5, 7]
    together = drawn(pipeline, TEXTS, seeds)
    assert together.shape == (4, 3, SIZE, SIZE) and together.dtype == torch.float32 and together.abs().max() <= 1
    state = torch.get_rng_state()
    for i in (3, 0, 2):
        torch.rand(i)  # what else is drawn at random does not matter
        assert close(drawn(pipeline, [TEXTS[i]], [seeds[i]])[0], together[i])
    torch.set_rng_state(state)
    drawn(pipeline, TEXTS[:1], [0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not close(drawn(pipeline, TEXTS, [5, 6, 4, 7])[2], together[2])
    assert not close(drawn(pipeline, [*TEXTS[:3], "a cat"], seeds)[3], together[3])


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_every_scheduler_draws_alike_from_the_same_seed(scheduler, kind):
    pipeline = tiny_pipeline(kind)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    first = drawn(pipeline, TEXTS[:2], [1, 2], steps=4)
    drawn(pipeline, TEXTS[2:], [1, 2], steps=5)  # it keeps nothing of what it has drawn before
    again = drawn(pipeline, TEXTS[:2], [1, 2], steps=4)
    assert torch.equal(first, again) and not close(first, drawn(pipeline, TEXTS[:2], [1, 3], steps=4))
    assert close(drawn(pipeline, TEXTS[1::-1], [2, 1], steps=4), first.flip(0))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_guidance_of_1_is_none(kind):
    pipeline = tiny_pipeline(kind)
    runs: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    drawn(pipeline, TEXTS, [0] * 4, guidance=1.0, steps=2)
    drawn(pipeline, TEXTS, [0] * 4, guidance=1.5, steps=2)
    assert runs == [4, 4, 8, 8]


def blacken(clip_input: Tensor, images: Any) -> Any:
    """As a safety checker that finds everything unsafe."""
    return torch.zeros_like(torch.as_tensor(images)), [True] * len(images)


@pytest.fixture
def censored() -> Any:
    pipeline = tiny_pipeline("sd1", safety=True)
    pipeline.safety_checker.forward = blacken
    pipeline.set_progress_bar_config(desc="mine", disable=False)
    return pipeline


def as_before(pipeline: Any) -> bool:
    return (
        pipeline.safety_checker is not None
        and pipeline.config["safety_checker"] == ("stable_diffusion", "StableDiffusionSafetyChecker")
        and pipeline._progress_bar_config == {"desc": "mine", "disable": False}
    )


def test_no_safety_checker_and_no_bar_of_its_own_come_between_what_is_drawn_and_the_judges(censored, tmp_path, capfd):
    black = censored(TEXTS, num_inference_steps=1, height=SIZE, width=SIZE, output_type="pt").images
    assert black.shape[-1] == SIZE and not black.any() and "mine" in capfd.readouterr().err
    seen = drawn(censored, TEXTS, [0] * 4)
    assert "mine" not in capfd.readouterr().err
    assert torch.equal(seen, drawn(tiny_pipeline("sd1"), TEXTS, [0] * 4)) and seen.amax((1, 2, 3)).min() > seen.amin() + 0.1
    assert as_before(censored)
    censored.save_pretrained(tmp_path)
    assert (tmp_path / "safety_checker" / "model.safetensors").is_file()


def test_the_safety_checker_is_back_although_drawing_has_failed(censored):
    checker = censored.safety_checker

    def fail(*_: Any) -> None:
        assert censored.safety_checker is None
        raise RuntimeError("out of memory")

    handle = censored.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn(censored, TEXTS, [0] * 4)
    handle.remove()
    assert as_before(censored) and censored.safety_checker is checker


# ---- judges


NAMES = ["blob", "noto", "fluent"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A classifier and its processor in a folder, for pictures of 8 pixels."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = str(tmp_path_factory.mktemp("classifier"))
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(**shape, id2label=dict(enumerate(NAMES))))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))  # which only counts in evaluation mode
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        folder
    )
    return folder


def pictures(size: int, count: int = 5) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("size", [8, SIZE])
def test_a_classifier_from_a_folder_sees_pictures_as_its_processor_says(classifier, size):
    from transformers import ResNetForImageClassification

    judge = make_judges({"style": classifier}, [])["style"]
    assert isinstance(judge, NamedClassifier)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    model = ResNetForImageClassification.from_pretrained(classifier).eval()
    pixels = resize((pictures(size) + 1) / 2, [8, 8], antialias=True)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    torch.testing.assert_close(judge(pictures(size)), model((pixels - mean) / deviation).logits, atol=1e-4, rtol=1e-4)


def test_class_names_are_told_apart_by_the_clip_as_it_was_before_any_edit():
    pipeline = tiny_pipeline("sd1")
    (clip,) = tiny_clips(pipeline)
    names = ["cat in blob style", "a dog", "frog"]
    ids = pipeline.tokenizer(names, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in OPENAI)
        shown = clip.vision_model((pictures(24) / 2 + 0.5 - mean) / deviation).pooler_output
        expected = normalize(clip.visual_projection(shown), dim=-1) @ text.T
    module = DiffusionModule(pipeline, clip=clip, judges={"thing": names})
    torch.testing.assert_close(module.judges["thing"](pictures(24)), expected)
    assert torch.equal(module.judge(pictures(24))["thing"], expected.argmax(1))
    for p in pipeline.text_encoder.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.judges["thing"](pictures(24)), expected)


class Fixed(nn.Module):
    """A judge that sees the same classes, one after the other, whatever is drawn."""

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4)[classes])

    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.shape[1:] == (3, SIZE, SIZE)
        return self.weight


label = st.integers(-1, 3)


@examples(12)
@given(st.lists(st.tuples(label, label, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3), st.booleans())
def test_a_score_is_whether_the_judge_sees_what_was_asked_for_and_nothing_where_it_was_not(rows, both):
    """`accuracy` is of all that was asked of a sample."""
    styles, things, seen_styles, seen_things = (list(column) for column in zip(*rows, strict=True))
    module = DiffusionModule(drawing_pipeline(), judges={"style": Fixed(seen_styles), "thing": Fixed(seen_things)})
    assert not any(p.requires_grad for p in module.judges.parameters())
    batch = {"text": ["cat"] * len(rows), "seed": torch.arange(len(rows)), "steps": torch.ones(len(rows), dtype=torch.long)}
    batch |= {"style": torch.tensor(styles)} | ({"thing": torch.tensor(things)} if both else {})
    found = module.scores(batch, 0)
    assert found.keys() == {"accuracy", "style_accuracy"} | ({"thing_accuracy"} if both else set())
    for i, (style, thing, seen_style, seen_thing) in enumerate(rows):
        asked = {"style": (style, seen_style)} | ({"thing": (thing, seen_thing)} if both else {})
        right = {kind: float(want == seen) for kind, (want, seen) in asked.items() if want >= 0}
        for kind in asked:
            value = found[f"{kind}_accuracy"][i].item()
            assert value == right[kind] if kind in right else value != value
        value = found["accuracy"][i].item()
        assert value == min(right.values()) if right else value != value


def test_what_is_logged_is_the_mean_over_the_samples_that_were_asked(monkeypatch):
    module = DiffusionModule(drawing_pipeline(), judges={"style": Fixed([0, 1, 2, 3]), "thing": Fixed([0, 0, 0, 0])})
    assert module.forget_metric == "accuracy" and module.forget_target == 0.1
    assert module.retain_metric == ["style_accuracy", "thing_accuracy"]
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, batch_size, **_: logged.update({name: (float(value), batch_size)}))
    batch = {"text": TEXTS, "seed": torch.arange(4), "steps": torch.ones(4, dtype=torch.long)}
    module.validation_step({**batch, "style": torch.tensor([0, 3, 2, -1]), "thing": torch.full((4,), -1)}, 0)
    assert logged == {"style_accuracy": (pytest.approx(2 / 3), 3), "accuracy": (pytest.approx(2 / 3), 3)}


def test_a_gallery_shows_a_few_prompts_from_the_first_to_the_last():
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 2))
    module = DiffusionModule(drawing_pipeline(), guidance=3.0, judges={"thing": judge})
    count = 2 * MAX_SAMPLES + 3
    texts = [TEXTS[i % 4] for i in range(count)]
    batch = {"text": texts, "seed": torch.arange(count), "steps": torch.full((count,), 2)}
    shown, titles = module.gallery_step(batch, 0)
    assert shown.shape == (MAX_SAMPLES, 3, SIZE, SIZE) and shown.min() >= 0 and shown.max() <= 1
    assert titles[0] == texts[0] and titles[-1] == texts[-1] and all(title in texts for title in titles)
    last = draw(module.pipeline, texts[-1:], [count - 1], steps=2, guidance=3.0, size=SIZE)
    assert close(shown[-1:] * 2 - 1, last)
    one, _ = module.gallery_step({"text": texts[:1], "seed": torch.tensor([4]), "steps": torch.tensor([2])}, 0)
    assert one.shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_drawn_in_half_precision_are_judged_in_full(dtype):
    assert drawn(tiny_pipeline("sd1", dtype=dtype), TEXTS[:2], [0, 1]).dtype == torch.float32


def test_a_size_of_ones_own_is_drawn():
    module = DiffusionModule(drawing_pipeline(), size=24)
    batch = {"text": TEXTS[:1], "seed": torch.tensor([4]), "steps": torch.tensor([1])}
    assert module.draw(batch).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("judge", ["no/such/classifier", ["blob", "noto"]])
def test_a_judge_that_cannot_be_had_is_named(judge, tmp_path):
    judge = str(tmp_path) if isinstance(judge, str) else judge
    with pytest.raises(UnlearnError, match=r"^judges: .*(cannot be loaded .*give its folder|give clip=)"):
        DiffusionModule(drawing_pipeline(), judges={"style": judge})

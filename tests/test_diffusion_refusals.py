"""What a text-to-image pipeline cannot do is refused, with the argument and the remedy, before anything is computed."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from _amounts import examples
from _tiny_diffusion import SIZE, TOKENS, tiny_clips, tiny_pipeline
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from hypothesis import given
from hypothesis import strategies as st

from slug_lightning import UnlearnError
from slug_lightning.modules.diffusion import DiffusionModule


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """One that no test changes."""
    return tiny_pipeline("sd1")


@functools.cache
def module_of_sd1() -> DiffusionModule:
    return DiffusionModule(tiny_pipeline("sd1"))


def batch_of(texts: list[str], **more: Any) -> dict[str, Any]:
    return {"image": torch.zeros(len(texts), 3, SIZE, SIZE), "text": texts, **more}


def refused(match: str, *remedies: str) -> Any:
    """That an error begins with the argument (a pattern), and says what to do."""
    rest = "".join(f"(?=.*{remedy})" for remedy in remedies)
    return pytest.raises(UnlearnError, match=f"(?s)^{match}{rest}")


def test_an_objective_that_is_not_known_is_refused(pipeline):
    with refused("objective must be 'denoising' or 'clip', got 'contrastive'"):
        DiffusionModule(pipeline, objective="contrastive")  # type: ignore[arg-type]


def test_the_clip_objective_needs_an_image_tower(pipeline):
    with refused("clip: ", "no image tower", "give the CLIP", "hf:openai/clip-vit-large-patch14", 'objective="denoising"'):
        DiffusionModule(pipeline, objective="clip")


def test_a_clip_of_another_text_encoder_is_refused_and_the_first_tensor_named_in_which_it_differs():
    pipeline = tiny_pipeline("sdxl")
    first, second = tiny_clips(pipeline)
    with torch.no_grad():
        for name, parameter in first.text_model.named_parameters():
            parameter += "mlp" in name or "attn" in name
    found = refused("clip: its text tower is not the pipeline's", r"text_encoder in text_model\.encoder", 'objective="denoising"')
    with found as said:
        DiffusionModule(pipeline, objective="clip", clip=[first, second])
    assert "text_encoder_2 in text_model.embeddings.token_embedding.weight" in str(said.value)  # of another width
    with refused("clip: two of them match text_encoder_2"):
        DiffusionModule(pipeline, objective="clip", clip=[second, second])


def test_a_text_encoder_that_an_edit_has_changed_is_known_by_the_rest():
    """As of a pipeline that has forgotten something, and is to forget more."""
    pipeline = tiny_pipeline("sd1")
    (clip,) = tiny_clips(pipeline)
    with torch.no_grad():
        next(p for name, p in pipeline.text_encoder.named_parameters() if name.endswith("layers.1.mlp.fc1.weight")).add_(1)
    assert DiffusionModule(pipeline, objective="clip", clip=clip).clips[0].encoder is pipeline.text_encoder


def test_class_names_are_told_apart_by_any_clip_where_the_pipeline_has_a_loss_of_its_own():
    pipeline = tiny_pipeline("sd1")
    (clip,) = tiny_clips(tiny_pipeline("sd1", seed=9))
    module = DiffusionModule(pipeline, clip=clip, judges={"thing": ["cat", "dog"]})
    assert list(module.judges) == ["thing"]
    with refused("clip: 'ViT-B-32' names no weights", "local-dir:"):
        DiffusionModule(pipeline, clip="ViT-B-32")


def test_a_label_beyond_the_classes_of_its_judge_is_refused():
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 2))
    module = DiffusionModule(tiny_pipeline("sd1"), judges={"thing": judge}, guidance=1.0)
    batch = {"text": ["cat"], "seed": torch.tensor([0]), "steps": torch.tensor([1]), "thing": torch.tensor([2])}
    with refused("judges: 'thing' has 2 classes", "class 2"):
        module.scores(batch, 0)


def test_what_is_no_picture_any_more_shows_nothing():
    """A judge would see its first class in a picture without a number."""
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 2))
    module = DiffusionModule(tiny_pipeline("sd1"), judges={"thing": judge}, guidance=1.0)
    with torch.no_grad():
        module.pipeline.unet.conv_out.weight.fill_(torch.nan)
    batch = {"text": ["cat"], "seed": torch.tensor([0]), "steps": torch.tensor([1]), "thing": torch.tensor([0])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, where the pipeline makes pictures of it
        assert module.scores(batch, 0)["thing_accuracy"].tolist() == [0.0]


def test_a_clip_is_known_at_the_precision_of_the_pipeline():
    """A pipeline in half precision belongs to its CLIP in full."""
    pipeline = tiny_pipeline("sd1")
    clips = tiny_clips(pipeline)
    pipeline.to(torch.float16)
    assert DiffusionModule(pipeline, objective="clip", clip=clips).clips[0].encoder is pipeline.text_encoder


def test_a_text_encoder_that_is_no_clip_is_refused_with_the_reason():
    from transformers import T5Config, T5EncoderModel

    pipeline = tiny_pipeline("sd1")
    pipeline.text_encoder = T5EncoderModel(T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with refused("pipeline: its text_encoder is a T5EncoderModel, not a CLIP text encoder", "write forget_step and retain_step"):
        DiffusionModule(pipeline)


@pytest.mark.parametrize("kind", [FluxPipeline, StableDiffusion3Pipeline])
def test_a_pipeline_without_a_unet_is_refused(kind):
    names = ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"]
    names += ["text_encoder_3", "tokenizer_3"] if kind is StableDiffusion3Pipeline else []
    made = kind(**dict.fromkeys(names))
    with refused(f"pipeline: {kind.__name__} has no .*unet", "supported are Stable Diffusion 1.x, 2.x and XL", "transformer"):
        DiffusionModule(made)


def test_what_is_no_pipeline_at_all_is_refused(tmp_path):
    with refused("pipeline: Linear has no text_encoder", "supported are"):
        DiffusionModule(torch.nn.Linear(1, 1))
    with refused(f"pipeline: '{tmp_path}' cannot be loaded", "give its folder, or its name on the hub"):
        DiffusionModule(tmp_path)


@pytest.mark.parametrize("scheduler", [
    lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchEulerDiscreteScheduler,
    EDMEulerScheduler,
])  # fmt: skip
def test_a_scheduler_whose_noise_is_of_another_kind_is_refused_where_the_loss_is_that_of_denoising(scheduler):
    pipeline = tiny_pipeline("sd1")
    pipeline.scheduler = scheduler()
    with refused(
        f"pipeline: its scheduler, {type(pipeline.scheduler).__name__}", "epsilon, v_prediction and sample", 'objective="clip"'
    ):
        DiffusionModule(pipeline)
    pipeline.scheduler = tiny_pipeline("sd1").scheduler
    clips = tiny_clips(pipeline)
    pipeline.scheduler = scheduler()
    DiffusionModule(pipeline, objective="clip", clip=clips)


# ---- batches


WORDS = TOKENS - 2  # that the tokenizer has room for: a token each, and start and end


@examples(20)
@given(st.integers(0, 20), st.sampled_from(["blob style", "Blob Style", "blob"]))
def test_a_caption_is_refused_just_if_the_tokenizer_cuts_the_concept_off(before, concept):
    """Of two words it must see both."""
    module = module_of_sd1()
    caption = " ".join([*["cat"] * before, concept, *["dog"] * 9])
    batch = batch_of(["frog in blob style", caption], concept=["blob style", concept])
    if before + len(concept.split()) <= WORDS:
        assert module.forget_step(batch, 0).requires_grad
    else:
        with refused(
            "forget: the tokenizer of text_encoder reads 16 tokens", f"no longer names '{concept}'", "shorten the captions"
        ):
            module.forget_step(batch, 0)


def test_the_second_text_encoder_may_be_the_one_that_cuts_the_concept_off():
    pipeline = tiny_pipeline("sdxl")
    pipeline.tokenizer_2.model_max_length = 6
    batch = batch_of(["cat cat cat blob style"], concept=["blob style"])
    with refused("forget: the tokenizer of text_encoder_2 reads 6 tokens", "name the concept early"):
        DiffusionModule(pipeline).forget_step(batch, 0)


def test_captions_that_need_not_name_the_concept_may_be_long():
    module, long = module_of_sd1(), " ".join(["cat"] * 30)
    assert module.forget_step(batch_of([long]), 0) > 0
    assert module.forget_step(batch_of([long], concept=[""]), 0) > 0
    assert module.retain_step(batch_of([long + " blob"]), 0) > 0


def test_prompts_of_one_batch_are_drawn_in_the_same_number_of_steps():
    batch = {"text": ["cat", "dog"], "seed": torch.tensor([0, 1]), "steps": torch.tensor([2, 3])}
    with refused(r"steps: all prompts of a batch must have the same number", r"got \[2, 3\]"):
        module_of_sd1().draw(batch)


def test_labels_that_fit_no_judge_are_refused(pipeline):
    module = DiffusionModule(pipeline, judges={"style": torch.nn.Flatten()})
    batch = {"text": ["cat"], "seed": torch.tensor([0]), "steps": torch.tensor([1])}
    with refused(r"judges: the prompts have labels for none of \['style'\]", "thing"):
        module.scores({**batch, "thing": torch.tensor([0])}, 0)

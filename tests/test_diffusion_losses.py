"""The two objectives of a text-to-image pipeline against plain implementations, and their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _tiny_diffusion import SIZE, TOKENS, read_by, tiny_clips, tiny_pipeline
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize

from slug_lightning.diffusion.losses import Denoising, latents_of
from slug_lightning.diffusion.pipelines import read_prompts, resized
from slug_lightning.diffusion.source_clip import OPENAI, TextSourceClip
from slug_lightning.modules.diffusion import DiffusionModule
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.tensors.bits import bitwise_equal

TEXTS = ["cat in blob style", "dog in noto style", "frog"]
KINDS = ("sd1", "sd2", "sdxl")


def batch_of(size: int = SIZE, texts: list[str] = TEXTS) -> dict[str, Any]:
    pictures = torch.rand(len(texts), 3, size, size, generator=torch.Generator().manual_seed(3))
    return {"image": pictures * 2 - 1, "text": texts}


def tokens(pipeline: Any, texts: list[str]) -> Tensor:
    """By hand: start, a token a word, end, and then what pads."""
    tokenizer = pipeline.tokenizer
    vocabulary = tokenizer.get_vocab()
    rows = []
    for text in texts:
        words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in text.split()]
        row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (TOKENS - len(row)))
    assert max(map(max, rows)) < len(vocabulary)
    return torch.tensor(rows)


def jolted(pipeline: Any) -> Any:
    """With text encoders that are no longer those of their CLIPs, as after an edit."""
    generator = torch.Generator().manual_seed(8)
    for encoder in filter(None, (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))):
        for p in encoder.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return pipeline


# ---- denoising


def alphas(config: Any) -> Tensor:
    """Cumulative, of the schedule that Stable Diffusion was trained with."""
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def denoising(pipeline: Any, batch: dict[str, Any], kind: str) -> Tensor:
    """The loss line by line (arXiv 2112.10752, equation 3; 2202.00512, appendix D; 2307.01952, section 2.2)."""
    moments = pipeline.vae.encode(batch["image"]).latent_dist
    latents = (moments.mean + moments.std * torch.randn(moments.mean.shape)) * pipeline.vae.config.scaling_factor
    times = torch.randint(1000, (len(latents),))
    noise = torch.randn(latents.shape)
    alpha = alphas(pipeline.scheduler.config)[times].float().view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
    }[kind]
    ids = tokens(pipeline, batch["text"])
    added = None
    if hasattr(pipeline, "text_encoder_2"):
        one, two = (e(ids, output_hidden_states=True) for e in (pipeline.text_encoder, pipeline.text_encoder_2))
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        # The picture's own size, the corner that it was cropped at, the size that is wanted: height first.
        added = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(ids))}
    else:
        states = pipeline.text_encoder(ids)[0]
    guess = pipeline.unet(noisy, times, states, added_cond_kwargs=added).sample
    return ((guess - target) ** 2).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoising_is_what_the_papers_write(kind, prediction):
    pipeline, batch = tiny_pipeline(kind), batch_of()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    loss = Denoising(pipeline, SIZE)
    torch.manual_seed(4)
    found = loss(batch)
    torch.manual_seed(4)
    torch.testing.assert_close(found, denoising(pipeline, batch, prediction), rtol=1e-5, atol=0)
    torch.manual_seed(4)
    assert loss({**batch, "text": TEXTS[::-1]}) != found  # the UNet reads the captions


def test_time_ids_are_as_stable_diffusion_xl_makes_them():
    """With the pipeline's own method, for a picture that is neither cropped nor resized."""
    pipeline = tiny_pipeline("sdxl")
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    Denoising(pipeline, 2 * SIZE)(batch_of(2 * SIZE))
    size = (2 * SIZE, 2 * SIZE)
    own = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, pipeline.text_encoder_2.config.projection_dim)
    (given,) = seen
    assert torch.equal(given["time_ids"], own.repeat(3, 1)) and given["text_embeds"].shape == (3, 16)


@pytest.mark.parametrize("rescaled", [False, True])
def test_noise_is_that_of_training_whatever_draws(rescaled):
    """As much noise as its betas say, also for a model whose last step was trained on noise alone (arXiv 2305.08891)."""
    pipeline = tiny_pipeline("sd2")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=rescaled)
    loss = Denoising(pipeline, SIZE)
    expected = alphas(pipeline.scheduler.config)
    if rescaled:
        roots = expected.sqrt()
        expected = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    torch.testing.assert_close(loss.noise.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-6)


def test_pictures_of_any_size_are_averaged_down_or_interpolated_up():
    pipeline = tiny_pipeline("sd1")
    loss, large = Denoising(pipeline, SIZE), batch_of(2 * SIZE)
    losses = []
    for pictures in (large["image"], large["image"].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))):
        torch.manual_seed(0)
        losses.append(loss({**large, "image": pictures}))
    torch.testing.assert_close(*losses)
    up = resized(torch.full((1, 3, 5, 9), 0.25), SIZE)
    torch.testing.assert_close(up, torch.full((1, 3, SIZE, SIZE), 0.25))


def vae(**config: Any) -> Any:
    made = tiny_pipeline().vae
    return AutoencoderKL.from_config(made.config, **config)


@pytest.mark.parametrize(("shift", "scaling"), [(None, 0.5), (0.25, 2.0)])
def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(shift, scaling):
    model, pictures = vae(shift_factor=shift, scaling_factor=scaling), batch_of()["image"]
    torch.manual_seed(1)
    found = latents_of(model, pictures)
    torch.manual_seed(1)
    moments = model.encode(pictures).latent_dist
    raw = moments.mean + moments.std * torch.randn(moments.mean.shape)
    torch.testing.assert_close(found, (raw - (shift or 0)) * scaling)
    assert not found.requires_grad


@pytest.mark.parametrize(("dtype", "force", "computed"), [
    (torch.float16, True, torch.float32),
    (torch.float16, False, torch.float16),
    (torch.bfloat16, True, torch.bfloat16),
])  # fmt: skip
def test_an_autoencoder_that_overflows_in_half_precision_computes_in_full_and_is_left_as_it_was(dtype, force, computed):
    model, pictures = vae(force_upcast=force).to(dtype), batch_of()["image"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.conv_in.weight.dtype)))
    torch.manual_seed(1)
    found = latents_of(model, pictures)
    assert seen == [(computed, computed)] and found.dtype == torch.float32
    assert model.dtype == dtype and all(bitwise_equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    twin = copy.deepcopy(model).to(computed)
    torch.manual_seed(1)
    assert torch.equal(found, twin.encode(pictures.to(computed)).latent_dist.sample().float() * model.config.scaling_factor)


# ---- the CLIP


def features(clip: Any, pipeline: Any, batch: dict[str, Any], mean: Any, deviation: Any) -> tuple[Tensor, Tensor]:
    """By the towers of a `CLIPModel`, with what it has of its own, for pictures of its own size."""
    shape = (1, 3, 1, 1)
    pixels = (batch["image"] / 2 + 0.5 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)
    image = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    text = clip.text_projection(clip.text_model(tokens(pipeline, batch["text"])).pooler_output)
    return normalize(image, dim=-1), normalize(text, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_objective_is_that_of_the_clip_with_the_weights_of_the_text_encoder(kind):
    pipeline = tiny_pipeline(kind)
    clips, own = tiny_clips(pipeline), tiny_clips(pipeline)
    module = DiffusionModule(pipeline, objective="clip", clip=clips)
    layers = clips[0].config.text_config.num_hidden_layers
    assert layers == pipeline.text_encoder.config.num_hidden_layers + (kind == "sd2")
    jolted(pipeline)
    batch = batch_of(24)
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if kind == "sdxl" else [])]
    matching, contrastive = torch.zeros(()), torch.zeros(())
    for clip, encoder in zip(own, encoders, strict=True):
        image, text = features(read_by(clip, encoder), pipeline, batch, *OPENAI)
        matching = matching + torch.stack([1 - image[i] @ text[i] for i in range(3)]).mean()
        logits = clip.logit_scale.exp() * image @ text.T
        contrastive = contrastive + (cross_entropy(logits, torch.arange(3)) + cross_entropy(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(module.forget_step(batch, 0), matching)
    torch.testing.assert_close(module.retain_step(batch, 0), contrastive)


def test_of_a_caption_the_clip_forgets_the_words_that_name_the_concept_and_keeps_all_others():
    pipeline = tiny_pipeline("sd1")
    (clip,) = tiny_clips(pipeline)
    module, batch = DiffusionModule(pipeline, objective="clip", clip=clip), batch_of(24)
    image, text = features(clip, pipeline, {**batch, "text": ["blob style", TEXTS[1], "noto"]}, *OPENAI)
    named = {**batch, "concept": ["blob style", "", "noto"], "text": [*TEXTS[:2], "a noto"]}
    torch.testing.assert_close(module.forget_step(named, 0), 1 - (image * text).sum(1).mean())
    assert torch.equal(module.retain_step({**batch, "concept": named["concept"]}, 0), module.retain_step(batch, 0))


def test_a_clip_of_which_the_pipeline_has_no_last_layer_reads_with_its_own(tmp_path):
    """As with Stable Diffusion 2: only what the pipeline has is taken from it, and the gradient comes back through the rest."""
    pipeline = tiny_pipeline("sd2")
    (clip,) = tiny_clips(pipeline)
    source = TextSourceClip(clip, pipeline)
    jolted(pipeline)
    with torch.no_grad():
        before = source.encode_text(TEXTS)
        clip.text_model.encoder.layers[-1].mlp.fc2.weight.mul_(2)
        assert not torch.allclose(source.encode_text(TEXTS), before)
        clip.text_model.encoder.layers[0].mlp.fc2.weight.mul_(2)
        clip.text_model.encoder.layers[-1].mlp.fc2.weight.div_(2)
        torch.testing.assert_close(source.encode_text(TEXTS), before)
    source.encode_text(TEXTS)[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pipeline.text_encoder.parameters() if p.ndim == 2)
    assert all(p.grad is None for p in source.parameters())


def test_a_clip_by_name_is_shown_pictures_as_its_processor_says(tmp_path):
    from transformers import CLIPImageProcessor

    pipeline = tiny_pipeline()
    (clip,) = tiny_clips(pipeline)
    clip.save_pretrained(tmp_path)
    pipeline.tokenizer.save_pretrained(tmp_path)
    mean, deviation = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    CLIPImageProcessor(image_mean=mean, image_std=deviation).save_pretrained(tmp_path)
    module = DiffusionModule(pipeline, objective="clip", clip=f"hf:{tmp_path}")
    image, text = features(clip, pipeline, batch_of(24), mean, deviation)
    torch.testing.assert_close(module.forget_step(batch_of(24), 0), 1 - (image * text).sum(1).mean())


# ---- gradients


@pytest.mark.parametrize("objective", ["denoising", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forget_loss_rises_along_the_edit_as_fast_as_the_gradient_says(kind, objective):
    """The released scripts step the other way (method.md, section 1, point 4)."""
    pipeline = tiny_pipeline(kind)
    clips = tiny_clips(pipeline)
    pipeline.to(torch.float64)
    module = DiffusionModule(pipeline, objective=objective, clip=clips if objective == "clip" else None)

    def loss() -> Tensor:
        torch.manual_seed(2)
        return module.forget_step(batch_of(), 0)

    before = loss()
    before.backward()
    gradient = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in gradient} == {
        name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components
    }
    for part in {name.split(".")[0] for name in gradient}:
        own = {name: g for name, g in gradient.items() if name.startswith(f"{part}.")}
        square = sum(float((g**2).sum()) for g in own.values())
        step = 1e-3 * before.item() / square  # so far that fp32, in which losses are given, still tells the difference
        named = dict(module.model.named_parameters())
        patch = UnlearnPatch({n: named[n].detach().clone() for n in own}, [Edit("blob", step, own)])
        with torch.no_grad():
            patch.apply(module.model)
            rise = (loss() - before).item() / step
            patch.revert(module.model)
        assert rise == pytest.approx(square, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_runs_the_unet_twice_for_the_same_gradient_and_nothing_else_gets_one(kind):
    found = []
    for checkpointing in (False, True):
        module = DiffusionModule(tiny_pipeline(kind), gradient_checkpointing=checkpointing).eval()
        assert module.pipeline.unet.is_gradient_checkpointing == checkpointing
        runs = []
        module.pipeline.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(0))
        torch.manual_seed(6)
        module.forget_step(batch_of(), 0).backward()
        assert len(runs) == 1 + checkpointing
        frozen = [p for name, p in module.named_parameters() if not name.startswith("model.text_encoder")]
        assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_as_the_pipeline_reads_them_when_it_draws(kind):
    pipeline = tiny_pipeline(kind)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipeline(TEXTS, num_inference_steps=1, guidance_scale=1.0, height=SIZE, width=SIZE, output_type="latent")
    read = read_prompts(pipeline, TEXTS)
    assert (
        torch.equal(read["encoder_hidden_states"], seen[0]["encoder_hidden_states"])
        and read["encoder_hidden_states"].requires_grad
    )
    if kind == "sdxl":
        assert torch.equal(read["text_embeds"], seen[0]["added_cond_kwargs"]["text_embeds"])
    assert (
        DiffusionModule(pipeline).size == SIZE
        and mse_loss(read["encoder_hidden_states"][0], read["encoder_hidden_states"][1]) > 0
    )

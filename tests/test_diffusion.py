"""Stable Diffusion of every shape forgets inside a Trainer, and what is written is loaded by plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _callback import unlearn_callback
from _peft import add_adapter
from _tiny_diffusion import SIZE, tiny_clips, tiny_pipeline
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from _tiny import trainer
from slug_lightning import UnlearnPatch
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.image_text.text_to_image import Prompts
from slug_lightning.diffusion.pipelines import draw
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.diffusion import DiffusionModule
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.model_parts import parts_of

# The models of a pipeline are in evaluation mode from the start, as diffusers loads them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.uncovered,
]

FORGET, RETAIN = ["cat in blob style", "dog in blob style"], ["cat in noto style", "frog in noto style"]
STEPS = 2


class Recollection(nn.Module):
    """A judge: class 0 is a picture that it knows, class 1 any other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros(0, 3, SIZE, SIZE))

    def forward(self, pictures: Tensor) -> Tensor:
        far = torch.cdist(pictures.flatten(1), self.known.flatten(1), p=torch.inf).amin(1)
        return torch.stack([far < 1e-3, far >= 1e-3], 1).float()


def prompts(texts: list[str], seeds: range) -> Prompts:
    return Prompts(texts, seeds, STEPS, {"style": [0] * len(texts)})


def pairs(texts: list[str]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(len(texts[0]))
    return [{"image": torch.rand(3, 20, 20, generator=generator) * 2 - 1, "text": text} for text in 2 * texts]


def data() -> UnlearnDataModule:
    search, report = range(1), range(7, 8)
    parts = {"forget_val": prompts(FORGET, search), "forget_test": prompts(FORGET, report)}
    parts |= {"retain_val": prompts(RETAIN, search), "retain_test": prompts(RETAIN, report)}
    return UnlearnDataModule(pairs(FORGET), pairs(RETAIN), **parts, batch_size=4)  # type: ignore[arg-type]


def made(pipeline: Any, **options: Any) -> DiffusionModule:
    """A module whose judge knows how everything was drawn before."""
    judge = Recollection()
    module = DiffusionModule(pipeline, judges={"style": judge}, **options)
    known = [
        module.draw({"text": FORGET + RETAIN, "seed": torch.full((4,), seed), "steps": torch.full((4,), STEPS)})
        for seed in (0, 7)
    ]
    judge.known = torch.cat(known)
    return module


def forgetting(**options: Any) -> UnlearnCallback:
    return unlearn_callback(**{"retain_tolerance": 1.0, "max_evaluations": 2, "replay": False, **options})


def tensors_of(pipeline: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in parts_of(pipeline).state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not bitwise_equal(one[name], other[name])}


class Forgotten(NamedTuple):
    """What a run has left."""

    folder: Path
    module: DiffusionModule
    callback: UnlearnCallback
    clips: list[Any]


# Each objective, with one text encoder and with two; all six take half a minute.
QUICK = [("sd1", "denoising"), ("sdxl", "clip")]
RUNS = [
    pytest.param((kind, objective), marks=() if (kind, objective) in QUICK else pytest.mark.slow, id=f"{kind}-{objective}")
    for kind in ("sd1", "sd2", "sdxl")
    for objective in ("denoising", "clip")
]


@pytest.fixture(scope="module", params=RUNS)
def forgotten(request, tmp_path_factory) -> Forgotten:
    """A pipeline from disk that has forgotten something; the denoising one of SD 1 has a safety checker."""
    kind, objective = request.param
    folder = tmp_path_factory.mktemp("-".join(request.param))
    pipeline = tiny_pipeline(kind, safety=request.param == ("sd1", "denoising"))
    pipeline.save_pretrained(folder / "original")
    clips = tiny_clips(pipeline)
    module = made(str(folder / "original"), objective=objective, clip=clips if objective == "clip" else None)
    callback = forgetting()
    fitting = trainer(callback)
    fitting.fit(module, datamodule=data())
    module.save_pretrained(folder / "model")
    fitting.save_checkpoint(folder / "unlearned.ckpt")
    callback.report.patch.save(folder / "patch.safetensors")
    return Forgotten(folder, module, callback, clips)


def test_what_plain_diffusers_loads_differs_in_the_edited_tensors_alone_and_draws_as_the_module_does(forgotten):
    report = forgotten.callback.report
    assert report.status == "unlearned" and report.before["forget"] == {"accuracy": 1.0}
    assert report.after["forget"] == {"accuracy": 0.0}
    original, saved = (
        DiffusionPipeline.from_pretrained(path) for path in (forgotten.folder / "original", forgotten.folder / "model")
    )
    assert type(saved) is type(original) and saved.components.keys() == original.components.keys()
    before, after = tensors_of(original), tensors_of(saved)
    assert differing(before, after) == set(report.tensors) == set(report.patch.base) and report.tensors
    assert all(name.startswith("text_encoder") and after[name].ndim == 2 for name in report.tensors)
    assert not differing(after, tensors_of(forgotten.module.pipeline))
    asked = {"seeds": [3, 4], "steps": STEPS, "guidance": 7.5, "size": SIZE}
    pictures = draw(saved, FORGET, **asked)
    # But for rounding, which depends on where in memory the weights lie.
    torch.testing.assert_close(pictures, draw(forgotten.module.pipeline, FORGET, **asked), atol=1e-4, rtol=0)
    assert (pictures - draw(original, FORGET, **asked)).abs().max() > 1e-3


def test_the_patch_fits_the_plain_pipeline_its_text_encoder_and_the_clip_that_it_comes_from(forgotten):
    patch = UnlearnPatch.load(forgotten.folder / "patch.safetensors")
    (name,) = patch.base
    component, _, own = name.partition(".")
    saved = tensors_of(forgotten.module.pipeline)[name]
    for part in (lambda pipeline: pipeline, lambda pipeline: getattr(pipeline, component)):
        plain = DiffusionPipeline.from_pretrained(forgotten.folder / "original")
        before = tensors_of(plain)
        patch.apply(part(plain))
        assert differing(before, tensors_of(plain)) == {name} and bitwise_equal(tensors_of(plain)[name], saved)
        patch.revert(part(plain))
        assert not differing(before, tensors_of(plain))
    clip = forgotten.clips[["text_encoder", "text_encoder_2"].index(component)]
    before = {key: tensor.clone() for key, tensor in clip.state_dict().items()}
    patch.apply(clip)
    (changed,) = differing(before, clip.state_dict())
    assert changed.endswith(own.removeprefix("text_model.")) and changed.startswith("text_")
    assert bitwise_equal(clip.state_dict()[changed], saved)
    patch.revert(clip)


def test_the_edit_is_a_step_up_the_gradient_and_nothing_but_candidates_ever_had_one(forgotten):
    (edit,) = forgotten.callback.report.patch.edits
    assert edit.step > 0
    module, pipeline = forgotten.module, forgotten.module.pipeline
    assert all(p.grad is None for p in module.parameters())
    assert {name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad} == {
        name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)
    }
    assert not any(part.training for part in parts_of(pipeline).values())


def test_a_checkpoint_holds_what_can_be_edited_and_a_fit_that_goes_on_from_it_knows_the_edit(forgotten, monkeypatch):
    path = forgotten.folder / "unlearned.ckpt"
    kept = torch.load(path, weights_only=True)["state_dict"]
    encoders = {name for name in ("text_encoder", "text_encoder_2") if hasattr(forgotten.module.pipeline, name)}
    assert {name.split(".")[1] for name in kept} == {*encoders, "unet"}
    tensors = tensors_of(forgotten.module.pipeline)
    assert {f"model.{name}" for name in tensors if name.split(".")[0] in {*encoders, "unet"}} == kept.keys()

    clip = forgotten.clips if forgotten.module.objective == "clip" else None
    module = made(forgotten.folder / "original", objective=forgotten.module.objective, clip=clip)
    monkeypatch.setattr(module, "forget_step", lambda *_: pytest.fail("there is nothing left to forget"))
    again = forgetting()
    trainer(again).fit(module, datamodule=data(), ckpt_path=path)
    assert again.report.to_dict() == forgotten.callback.report.to_dict()
    assert not differing(tensors, tensors_of(module.pipeline))


# ---- other weights, other layers


@pytest.mark.parametrize(
    ("kind", "objective", "dtype"),
    [
        ("sd1", "denoising", "float16"),
        pytest.param("sdxl", "clip", "float16", marks=pytest.mark.slow),
        ("sd2", "denoising", "bfloat16"),
    ],
)
def test_weights_in_half_precision_are_edited_and_saved_as_they_are(kind, objective, dtype, tmp_path):
    pipeline = tiny_pipeline(kind, dtype=getattr(torch, dtype))
    pipeline.save_pretrained(tmp_path / "original")
    module = made(
        tmp_path / "original", objective=objective, clip=tiny_clips(pipeline) if objective == "clip" else None, dtype=dtype
    )
    before = tensors_of(module.pipeline)
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {getattr(torch, dtype)}
    callback = forgetting(layers="*mlp.fc?.weight")
    trainer(callback).fit(module, datamodule=data())
    module.save_pretrained(tmp_path / "model")
    assert callback.report.status == "unlearned"
    for part, model in parts_of(module.pipeline).items():
        (file,) = (tmp_path / "model" / part).glob("*.safetensors")
        saved = load_file(file)
        assert {t.dtype for t in saved.values() if t.is_floating_point()} == {getattr(torch, dtype)}
        assert {name for name, t in saved.items() if not bitwise_equal(t, before[f"{part}.{name}"])} == {
            name.removeprefix(f"{part}.") for name in callback.report.tensors if name.startswith(f"{part}.")
        }
        assert all(bitwise_equal(t, model.state_dict()[name]) for name, t in saved.items())


def test_layers_of_the_unet_can_be_named():
    module = made(tiny_pipeline())
    before = tensors_of(module.pipeline)
    callback = forgetting(layers="*unet*attn2.to_v.weight")
    trainer(callback).fit(module, datamodule=data())
    report = callback.report
    assert report.status == "unlearned" and {score["tower"] for score in report.scores} == {"unet"}
    assert differing(before, tensors_of(module.pipeline)) == set(report.tensors)
    assert all(name.startswith("unet.") and name.endswith("attn2.to_v.weight") for name in report.tensors)
    assert not any(p.requires_grad for p in module.pipeline.unet.parameters())


@pytest.mark.parametrize("objective", ["denoising", pytest.param("clip", marks=pytest.mark.slow)])
def test_a_pipeline_with_lora_forgets_below_its_adapters(objective, tmp_path):
    plain, pipeline = tiny_pipeline(), tiny_pipeline()
    clips = tiny_clips(plain)
    with torch.random.fork_rng():
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
        add_adapter(pipeline.text_encoder, lora, "style")
    before = tensors_of(pipeline)
    module = made(pipeline, objective=objective, clip=clips if objective == "clip" else None)
    callback = forgetting()
    trainer(callback).fit(module, datamodule=data())
    module.save_pretrained(tmp_path / "model")
    report = callback.report
    assert report.status == "unlearned" and not any("lora" in score["layer"] for score in report.scores)
    assert differing(before, tensors_of(pipeline)) == set(report.tensors)
    (name,) = report.tensors
    bare = name.replace(".base_layer", "")
    assert name != bare
    saved = tensors_of(DiffusionPipeline.from_pretrained(tmp_path / "model"))
    assert differing(tensors_of(plain), saved) == {bare} and bitwise_equal(saved[bare], tensors_of(pipeline)[name])
    for model in (plain, clips[0]):
        report.patch.apply(model)
    assert not differing(tensors_of(plain), saved)


def test_without_judges_the_losses_of_pairs_are_the_metrics_and_nothing_is_drawn(tmp_path):
    """As where there are pictures and captions alone; Lightning's own validation has nothing to log then."""
    callback = forgetting(forget_target=1.167, max_evaluations=12, output_dir=str(tmp_path / "run"))
    whole = UnlearnDataModule(3 * pairs(FORGET), 3 * pairs(RETAIN), batch_size=4)  # type: ignore[arg-type]
    module = DiffusionModule(tiny_pipeline("sd1"))
    trainer(callback).fit(module, datamodule=whole)
    report = callback.report
    assert list(report.before["forget"]) == ["loss"] and not report.gallery
    assert report.status == "unlearned" and (tmp_path / "run" / "model" / "model_index.json").is_file()
    assert module.scores(next(iter(whole.val_dataloader())), 0) == {}


def test_a_pipeline_is_not_sharded(monkeypatch):
    module = DiffusionModule(tiny_pipeline("sd1"))
    monkeypatch.setattr(DiffusionModule, "device_mesh", object())
    with pytest.raises(UnlearnError, match="strategy: a pipeline cannot be sharded.*ddp"):
        module.configure_model()

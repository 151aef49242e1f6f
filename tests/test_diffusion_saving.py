"""Whoever loads what was saved has the edit, whatever adapters were on the pipeline."""

from __future__ import annotations

import pytest
import torch
from _peft import add_adapter
from _tiny_diffusion import tiny_pipeline
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from slug_lightning.diffusion.pipelines import save_pipeline
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.model_parts import parts_of


def tensors_of(pipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in parts_of(pipeline).state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(bitwise_equal(one[name], other[name]) for name in one)


def drawn(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("cat in blob style", num_inference_steps=2, output_type="pt", generator=generator).images


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=list(targets))  # of a scale that is not 1


def styled(pipeline, name="a style"):
    """With an adapter on UNet and text encoder, as `load_lora_weights` makes it."""
    with torch.random.fork_rng():
        add_adapter(pipeline.text_encoder, lora("q_proj", "fc1"), name)
        add_adapter(pipeline.unet, lora("to_q", "to_k"), name)
    return pipeline


EDITED = {"text_encoder.encoder.layers.1.mlp.fc1.weight", "unet.conv_in.weight"}


def edit(pipeline) -> None:
    """In a tensor that the adapter wraps, and in one of the UNet."""
    bare = {name.replace(".base_layer", ""): tensor for name, tensor in tensors_of(pipeline).items()}
    base = {name: bare[name] for name in EDITED}
    UnlearnPatch(base, [Edit("cats", 0.5, {name: torch.ones(t.shape) for name, t in base.items()})]).apply(pipeline)


@pytest.mark.parametrize(("kind", "options"), [("sd1", {"safety": True}), ("sd2", {"dtype": torch.float16}), ("sdxl", {})])
def test_a_pipeline_comes_back_with_the_edit_and_nothing_else_has_changed(kind, options, tmp_path):
    pipeline, original = tiny_pipeline(kind, **options), tensors_of(tiny_pipeline(kind, **options))
    edit(pipeline)
    save_pipeline(pipeline, tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(tmp_path / "model").to(pipeline.dtype)
    found = tensors_of(again)
    assert type(again) is type(pipeline) and same(found, tensors_of(pipeline))
    assert {name for name in found if not bitwise_equal(found[name], original[name])} == EDITED
    assert not (tmp_path / "model" / "adapters").exists()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_pipeline_with_lora_comes_back_with_the_edit_in_the_weights_and_the_adapters_beside(kind, tmp_path):
    plain, pipeline = tiny_pipeline(kind), styled(tiny_pipeline(kind))
    edit(plain)
    edit(pipeline)
    before, modules, picture = tensors_of(pipeline), list(parts_of(pipeline).named_modules()), drawn(pipeline)
    save_pipeline(pipeline, tmp_path)
    now = list(parts_of(pipeline).named_modules())
    assert [name for name, _ in now] == [name for name, _ in modules]
    assert all(one is other for (_, one), (_, other) in zip(now[1:], modules[1:], strict=True))  # the first is made anew
    assert same(tensors_of(pipeline), before) and torch.equal(drawn(pipeline), picture)
    assert pipeline.get_active_adapters() == ["a style"]
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert same(tensors_of(again), tensors_of(plain)) and torch.equal(drawn(again), drawn(plain))
    for component in ("text_encoder", "unet"):
        there = tmp_path / "adapters" / "a-style" / component
        setattr(again, component, PeftModel.from_pretrained(getattr(again, component), there))
    assert torch.equal(drawn(again), picture) and not torch.equal(picture, drawn(plain))


def test_a_component_that_peft_has_wrapped_whole_is_saved_as_what_it_was(tmp_path):
    plain, pipeline = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    edit(plain)
    edit(pipeline)
    with torch.random.fork_rng():
        pipeline.text_encoder = wrapped = get_peft_model(pipeline.text_encoder, lora("q_proj"))
    picture = drawn(pipeline)
    save_pipeline(pipeline, tmp_path)
    assert pipeline.text_encoder is wrapped and torch.equal(drawn(pipeline), picture)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert same(tensors_of(again), tensors_of(plain))
    again.text_encoder = PeftModel.from_pretrained(again.text_encoder, tmp_path / "adapters" / "default" / "text_encoder")
    assert torch.equal(drawn(again), picture)


def test_a_fused_adapter_is_in_the_weights_and_not_beside_them_as_well(tmp_path):
    pipeline = styled(tiny_pipeline("sd1"))
    pipeline.fuse_lora()
    picture = drawn(pipeline)
    save_pipeline(pipeline, tmp_path)
    assert torch.equal(drawn(DiffusionPipeline.from_pretrained(tmp_path)), picture)
    assert not (tmp_path / "adapters").exists()


def test_a_pipeline_that_cannot_be_saved_keeps_its_adapters(tmp_path, monkeypatch):
    pipeline = styled(tiny_pipeline("sd1"))
    before, picture = tensors_of(pipeline), drawn(pipeline)

    def fail(folder):
        assert not any("lora" in name for name in tensors_of(pipeline))
        raise OSError("no space left")

    monkeypatch.setattr(pipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pipeline(pipeline, tmp_path)
    assert same(tensors_of(pipeline), before) and torch.equal(drawn(pipeline), picture)
    assert all(part._hf_peft_config_loaded for part in (pipeline.text_encoder, pipeline.unet))
    assert isinstance(pipeline.unet.conv_in, nn.Conv2d)

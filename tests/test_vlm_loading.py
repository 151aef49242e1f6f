"""Which vision-language models are refused for the way in which they were loaded, and why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from slug_lightning import UnlearnError
from slug_lightning.vlm.loading import refuse_unfit


def small_llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    small_llava().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_of_floating_point_numbers_is_fit(dtype):
    model = small_llava().to(dtype)
    refuse_unfit(model, model.model.vision_tower)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_tensor_is_refused_in_the_tower_and_nowhere_else(dtype):
    model = small_llava()
    head, tower = model.lm_head, model.model.vision_tower
    head.weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
    refuse_unfit(model, tower)
    layer = tower.encoder.layers[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnlearnError, match=r"encoder\.layers\.1\.mlp\.fc1\.weight .*skip_modules=\['model\.vision_tower'"):
        refuse_unfit(model, tower)


def test_weights_packed_into_buffers_are_refused():
    model = small_llava()
    fc2 = model.model.vision_tower.encoder.layers[0].mlp.fc2
    del fc2.weight
    fc2.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    with pytest.raises(UnlearnError, match="fc2.qweight is a Tensor of torch.int32"):
        refuse_unfit(model, model.model.vision_tower)


def test_a_packed_parameter_that_says_it_is_floating_is_refused():
    class Packed(nn.Parameter):
        pass

    model = small_llava()
    fc1 = model.model.vision_tower.encoder.layers[0].mlp.fc1
    fc1.weight = Packed(torch.zeros(32, 1))
    with pytest.raises(UnlearnError, match="is a Packed of torch.float32"):
        refuse_unfit(model, model.model.vision_tower)


def test_gradients_must_pass_through_the_rest_only_where_the_loss_is_the_models_own():
    model = small_llava()
    model.hf_quantizer = SimpleNamespace(is_trainable=False)
    refuse_unfit(model, model.model.vision_tower, differentiates=False)
    with pytest.raises(UnlearnError, match="no gradient passes"):
        refuse_unfit(model, model.model.vision_tower)
    model.hf_quantizer = SimpleNamespace(is_trainable=True)
    refuse_unfit(model, model.model.vision_tower)


def test_a_device_map_of_one_place_is_fit(saved):
    model = LlavaForConditionalGeneration.from_pretrained(saved, device_map="cpu")
    refuse_unfit(model, model.model.vision_tower)


def test_an_offloaded_language_model_is_refused(saved, tmp_path):
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    model = LlavaForConditionalGeneration.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    with pytest.raises(UnlearnError, match="spreads it over cpu, disk"):
        refuse_unfit(model, model.model.vision_tower)


def test_a_model_over_two_devices_is_refused():
    model = small_llava()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(UnlearnError, match="spreads it over 0, 1"):
        refuse_unfit(model, model.model.vision_tower)


def test_a_skeleton_is_refused():
    with torch.device("meta"):
        model = small_llava()
    with pytest.raises(UnlearnError, match="has no values"):
        refuse_unfit(model, model.model.vision_tower)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bitsandbytes_may_pack_the_language_model_and_not_the_tower(saved):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    def load(*skipped: str) -> LlavaForConditionalGeneration:
        packing = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skipped) or None)
        return LlavaForConditionalGeneration.from_pretrained(saved, quantization_config=packing, device_map="cpu")

    whole, part = load(), load("model.vision_tower", "lm_head")
    with pytest.raises(UnlearnError, match="is quantised .*Params4bit"):
        refuse_unfit(whole, whole.model.vision_tower)
    refuse_unfit(part, part.model.vision_tower)
    tower = part.requires_grad_(False).model.vision_tower
    weight = tower.encoder.layers[0].mlp.fc1.weight.requires_grad_()
    ids = torch.tensor([[1, 49, 49, 49, 49, 2, 3]])
    part(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), labels=ids).loss.backward()
    assert weight.grad.abs().sum() > 0

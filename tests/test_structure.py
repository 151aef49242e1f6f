"""The layers that a model's structure says are worth searching."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import pytest
import torch
import torchvision
from _peft import add_adapter
from torch import nn

from slug_lightning.methods.slug.structure import short_list
from slug_lightning.modules import EmbeddedCanvas, EmbeddedClip, EmbeddedLM, EmbeddedVLM
from slug_lightning.tensors.layers import find_layers

OPEN_CLIP = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TRANSFORMERS = (
    *(f"self_attn.{part}.weight" for part in ("k_proj", "v_proj", "q_proj", "out_proj")),
    "mlp.fc1.weight",
    "mlp.fc2.weight",
)
LLAMA = (*(f"self_attn.{part}_proj.weight" for part in "qkvo"), *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")))


def blocks(name: str, numbers: Iterable[int], tensors: Iterable[str]) -> list[str]:
    return [f"{name}.{number}.{tensor}" for number in numbers for tensor in tensors]


def listed(module: nn.Module, **options: object) -> list[str]:
    return short_list(find_layers(module, towers=getattr(module, "towers", None), **options), module)


def test_of_each_tower_of_a_clip_the_outer_blocks_and_the_projection():
    assert listed(EmbeddedClip()) == [
        "model.text_projection",
        "model.visual.proj",
        *blocks("model.visual.transformer.resblocks", (0, 5), OPEN_CLIP),
        *blocks("model.transformer.resblocks", (0, 2), OPEN_CLIP),
    ]


def test_of_a_pipeline_the_text_encoder_and_no_block_of_another_model():
    assert listed(EmbeddedCanvas()) == blocks("model.text_encoder.encoder.layers", (0, 2), TRANSFORMERS)


def test_a_tower_that_holds_part_of_a_list_has_its_own_ends():
    # Each tower has two of the six blocks, and the patch embedding, in none of them, is a tower by itself.
    module = EmbeddedVLM()
    tower = "model.model.vision_tower"
    patches = f"{tower}.embeddings.patch_embedding.weight"
    assert listed(module) == [patches, *blocks(f"{tower}.encoder.layers", range(6), TRANSFORMERS)]
    module.towers = {"early": [f"{tower}.encoder.layers.{i}.*" for i in range(3)], "late": f"{tower}.encoder.layers.*"}
    assert listed(module) == [patches, *blocks(f"{tower}.encoder.layers", (0, 2, 3, 5), TRANSFORMERS)]
    module.towers = {}
    assert listed(module) == blocks(f"{tower}.encoder.layers", (0, 5), TRANSFORMERS)


def test_of_a_language_model_the_outer_blocks():
    assert listed(EmbeddedLM()) == blocks("model.model.layers", (0, 5), LLAMA)


def test_the_stages_of_a_resnet_are_one_list():
    net = torchvision.models.resnet18(weights=None)
    ends = [f"layer{block}.conv{i}.weight" for block in ("1.0", "4.1") for i in (1, 2)]
    assert listed(net) == [*ends, "fc.weight"]


def test_a_stage_may_have_a_single_block():
    net = torchvision.models.efficientnet_b0(weights=None)
    first = ("0.0", "1.fc1", "1.fc2", "2.0")
    last = ("0.0", "1.0", "2.fc1", "2.fc2", "3.0")
    assert listed(net) == [
        *(f"features.1.0.block.{part}.weight" for part in first),
        *(f"features.7.0.block.{part}.weight" for part in last),
        "classifier.1.weight",
    ]


def perceptron(depth: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(depth - 1):
        parts += [nn.Linear(4, 4), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(4, 2))


@pytest.mark.parametrize(("depth", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 2]), (7, [0, 6]), (9, [0, 1, 7, 8])])
def test_without_blocks_a_quarter_at_either_end_stands_for_them(depth, expected):
    assert listed(perceptron(depth)) == [f"{2 * number}.weight" for number in expected]


def test_members_of_a_sequence_may_have_names():
    net = nn.Sequential(OrderedDict((name, nn.Sequential(nn.Linear(4, 4), nn.ReLU())) for name in ("first", "second", "third")))
    assert listed(net) == ["first.0.weight", "third.0.weight"]


def test_a_group_counts_by_its_first_tensor():
    parts = ("", ".attn", ".mlp")
    assert listed(EmbeddedClip(), granularity="siblings") == [
        "(root)",
        "model",
        *(f"model.visual.transformer.resblocks.{i}{part}" for i in (0, 5) for part in parts),
        *(f"model.transformer.resblocks.{i}{part}" for i in (0, 2) for part in parts),
    ]


def test_it_is_the_same_for_a_compiled_model_and_for_compiled_blocks():
    plain = listed(EmbeddedClip())
    module = EmbeddedClip()
    module.model = torch.compile(module.model)  # compiled when it is called, which it is not
    assert listed(module) == plain
    module = EmbeddedClip()
    for name, block in enumerate(module.model.visual.transformer.resblocks):
        if name:
            module.model.visual.transformer.resblocks[name] = torch.compile(block)
    assert listed(module) == plain
    net = torchvision.models.resnet18(weights=None)
    plain = listed(net)
    net.layer4[1] = torch.compile(net.layer4[1])
    assert listed(net) == plain


def test_of_adapters_those_of_the_outer_blocks():
    peft = pytest.importorskip("peft")
    module = EmbeddedLM()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(module.model, config)
    own = [f"{part}.lora_{side}.default.weight" for part in ("self_attn.q_proj", "mlp.down_proj") for side in "AB"]
    assert listed(wrapped) == blocks("base_model.model.model.layers", (0, 5), own)
    module = EmbeddedLM()
    add_adapter(module.model, config, "default")
    assert listed(module) == blocks("model.model.layers", (0, 5), own)

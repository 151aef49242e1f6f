"""A patch made under one library's names does the same under the other's, to the bit, and nothing where no map fits."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slug_lightning.dialects import translations
from slug_lightning.modules.clip import to_hugging_face
from slug_lightning.patch import Edit, UnlearnPatch, same_bits

BLOCK, LAYER = "visual.transformer.resblocks.1", "vision_model.encoder.layers.1"
TEXT_BLOCK, TEXT_LAYER = "transformer.resblocks.0", "text_model.encoder.layers.0"
QKV = [f"{letter}_proj" for letter in "qkv"]
TWINS = {  # every kind of tensor: open_clip's name -> transformers' names
    f"{BLOCK}.attn.in_proj_weight": [f"{LAYER}.self_attn.{part}.weight" for part in QKV],
    f"{BLOCK}.attn.in_proj_bias": [f"{LAYER}.self_attn.{part}.bias" for part in QKV],
    f"{BLOCK}.attn.out_proj.weight": [f"{LAYER}.self_attn.out_proj.weight"],
    f"{BLOCK}.mlp.c_fc.weight": [f"{LAYER}.mlp.fc1.weight"],
    f"{BLOCK}.mlp.c_proj.bias": [f"{LAYER}.mlp.fc2.bias"],
    f"{BLOCK}.ln_1.weight": [f"{LAYER}.layer_norm1.weight"],
    "visual.conv1.weight": ["vision_model.embeddings.patch_embedding.weight"],
    "visual.class_embedding": ["vision_model.embeddings.class_embedding"],
    "visual.positional_embedding": ["vision_model.embeddings.position_embedding.weight"],
    "visual.ln_pre.weight": ["vision_model.pre_layrnorm.weight"],
    "visual.ln_post.bias": ["vision_model.post_layernorm.bias"],
    "visual.proj": ["visual_projection.weight"],
    f"{TEXT_BLOCK}.attn.in_proj_weight": [f"{TEXT_LAYER}.self_attn.{part}.weight" for part in QKV],
    f"{TEXT_BLOCK}.attn.out_proj.bias": [f"{TEXT_LAYER}.self_attn.out_proj.bias"],
    f"{TEXT_BLOCK}.mlp.c_fc.bias": [f"{TEXT_LAYER}.mlp.fc1.bias"],
    f"{TEXT_BLOCK}.mlp.c_proj.weight": [f"{TEXT_LAYER}.mlp.fc2.weight"],
    f"{TEXT_BLOCK}.ln_2.bias": [f"{TEXT_LAYER}.layer_norm2.bias"],
    "token_embedding.weight": ["text_model.embeddings.token_embedding.weight"],
    "positional_embedding": ["text_model.embeddings.position_embedding.weight"],
    "ln_final.weight": ["text_model.final_layer_norm.weight"],
    "text_projection": ["text_projection.weight"],
    "logit_scale": ["logit_scale"],
}


def tiny_clip(seed=0, width=32, **vision):
    """Towers of two widths, unless `width` is the text tower's 24; no two tensors alike, as norms and biases are at first."""
    torch.manual_seed(seed)
    shape = {"image_size": 16, "patch_size": 8, "width": width, "layers": 2, "head_width": 8} | vision
    text = {"context_length": 8, "width": 24, "heads": 3, "layers": 2, "vocab_size": 40}
    model = open_clip.CLIP(16, shape, text).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.flatten()[:: max(parameter.numel() // 5, 1)] = -0.0
    return model


def tensors_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def patch_of(tensors, names, step=0.05, concept="cats"):
    generator = torch.Generator().manual_seed(len(names))
    base = {name: tensors[name].detach().clone() for name in names}
    directions = {name: torch.randn(t.shape, generator=generator) for name, t in base.items()}
    return UnlearnPatch(base, [Edit(concept, step, directions, {"layer": names[0]})])


def same(one, other):
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def clip():
    return tensors_of(tiny_clip())


@pytest.fixture(scope="module")
def twin():
    return tensors_of(to_hugging_face(tiny_clip()))


@pytest.mark.parametrize("name", TWINS)
def test_there_and_back_is_the_same_patch(name, clip, twin):
    patch = patch_of(clip, [name])
    (there,) = translations(patch, twin)
    assert sorted(there.base) == sorted(TWINS[name])
    assert same(there.base, {twin_name: twin[twin_name] for twin_name in TWINS[name]})
    assert all(edit.directions.keys() == there.base.keys() for edit in there.edits)
    (back,) = translations(there, clip)
    assert back.digest == patch.digest


def test_all_kinds_at_once_and_two_edits_of_different_tensors(clip, twin):
    one, other = patch_of(clip, [*TWINS][:12]), patch_of(clip, [*TWINS][8:], step=-0.1, concept="dogs")
    patch = UnlearnPatch.combine([one, other])
    (there,) = translations(patch, twin)
    assert same(there.base, {name: twin[name] for names in TWINS.values() for name in names})
    assert [(e.concept, e.step, e.details) for e in there.edits] == [(e.concept, e.step, e.details) for e in patch.edits]
    assert [len(e.directions) for e in there.edits] == [sum(len(TWINS[name]) for name in e.directions) for e in patch.edits]
    (back,) = translations(there, clip)
    assert back.digest == patch.digest


PARTS = [f"{LAYER}.self_attn.{part}.{kind}" for part in QKV for kind in ("weight", "bias")]
values = st.sampled_from([-0.0, 0.0, 1.0, -2.5, 1e-30])


@settings(deadline=None, max_examples=50)
@given(
    edits=st.lists(st.sets(st.sampled_from(PARTS), min_size=1), min_size=1, max_size=3),
    steps=st.lists(st.sampled_from([0.5, 0.1, -3.0]), min_size=3, max_size=3),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_any_parts_of_a_fused_tensor_are_edited_as_they_are_apart(edits, steps, strength, dtype, data):
    def drawn(name):
        shape = (2, 2) if name.endswith("weight") else (2,)
        count = len(shape) * 2
        return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).view(shape)

    apart = {name: drawn(name).to(dtype) for name in PARTS}

    def fused():
        return {
            f"{BLOCK}.attn.in_proj_{kind}": torch.cat([apart[f"{LAYER}.self_attn.{part}.{kind}"] for part in QKV])
            for kind in ("weight", "bias")
        }

    together = fused()
    directions = [{name: drawn(name) for name in sorted(names)} for names in edits]
    patch = UnlearnPatch(
        {name: apart[name].clone() for name in sorted(set().union(*edits))},
        [Edit(str(i), step, d) for i, (step, d) in enumerate(zip(steps, directions, strict=False))],
    )
    (other,) = translations(patch, together)
    before = {name: tensor.clone() for name, tensor in together.items()}
    patch.apply(apart, strength)
    other.apply(together, strength)
    assert same(together, fused())
    (again,) = translations(patch, together)  # from the edited model, as for reverting
    assert again.digest == other.digest
    again.revert(together, strength)
    assert same(together, before)


def test_what_has_no_counterpart_is_not_translated(clip, twin):
    def none(tensors, names, held):
        return not list(translations(patch_of(tensors, names), held))

    resnet = tensors_of(open_clip.CLIP(16, {"image_size": 32, "width": 8, "layers": (1, 1, 1, 1)}, {"width": 24, "heads": 3}))
    scaled = tensors_of(tiny_clip(ls_init_value=0.5))
    known = "visual.proj"
    assert not none(clip, [known], twin)
    assert none(resnet, ["visual.layer1.0.conv1.weight"], twin) and none(resnet, ["visual.conv1.weight"], twin)
    assert none(scaled, [known, f"{BLOCK}.ls_1.gamma"], twin)
    assert none(clip | {"head.weight": torch.ones(2, 2)}, [known, "head.weight"], twin)
    assert none(clip, [known], {name: tensor for name, tensor in twin.items() if name != "visual_projection.weight"})
    assert none(clip, [known], tensors_of(to_hugging_face(tiny_clip(width=40))))
    layer = f"{BLOCK}.mlp.c_fc.weight"
    assert none({f"a.{layer}": clip[layer], f"b.{layer}": clip[layer]}, [f"a.{layer}", f"b.{layer}"], twin)


def test_towers_of_one_shape_are_told_apart_by_what_they_stand_under():
    model = tiny_clip(width=24)
    clip, twin = tensors_of(model), tensors_of(to_hugging_face(model))
    tower = {name.removeprefix("vision_model."): tensor for name, tensor in twin.items() if name.startswith("vision_model.")}
    holder = {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()}
    for name, twins in TWINS.items():
        if "resblocks" in name:
            # In open_clip the text tower's names are also those of a vision tower by itself, which comes second.
            found = [sorted(other.base) for other in translations(patch_of(clip, [name]), twin)]
            assert found[0] == sorted(twins) and len(found) == (1 if name.startswith("visual.") else 2)
            assert list(next(translations(patch_of(twin, twins), clip)).base) == [name]
            # In transformers they say which it is.
            assert len(list(translations(patch_of(twin, twins), holder))) == name.startswith("visual.")
    # A tower by itself does not say which it is; the one that does is of that kind alone.
    alone = "encoder.layers.0.mlp.fc1.weight"
    kinds = [sorted(other.base) for other in translations(patch_of(tower, [alone]), clip)]
    assert kinds == [["visual.transformer.resblocks.0.mlp.c_fc.weight"], ["transformer.resblocks.0.mlp.c_fc.weight"]]
    assert len(list(translations(patch_of(tower, [alone]), twin))) == 2
    assert len(list(translations(patch_of(holder, [f"model.vision_tower.{alone}"]), twin))) == 1

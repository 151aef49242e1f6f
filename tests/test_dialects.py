"""A patch made under one library's names does the same under the other's, to the bit, and nothing where no map fits."""

from __future__ import annotations

import open_clip
import pytest
import torch
from _amounts import examples
from hypothesis import assume, given
from hypothesis import strategies as st

from slug_lightning.clip.models import encode_image, encode_text, to_hugging_face
from slug_lightning.patches.clip_names import translations
from slug_lightning.patches.edit import Edit, PatchError, edited
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.tensors.bits import bitwise_equal

pytestmark = pytest.mark.uncovered

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
    return one.keys() == other.keys() and all(bitwise_equal(one[name], other[name]) for name in one)


def does_the_same(one, other):
    """Whether two patches have the same base and edits, which know each other again."""
    edits = [(a.digest == b.digest, same(a.directions, b.directions)) for a, b in zip(one.edits, other.edits, strict=True)]
    return same(one.base, other.base) and all(map(all, edits))


def made_of(patch):
    """What its only edit makes of its tensors, in their order."""
    (edit,) = patch.edits
    return [edited(base, [(edit.directions[name], edit.step)]) for name, base in patch.base.items()]


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
    assert does_the_same(back, patch)


def test_all_kinds_at_once_and_two_edits_of_different_tensors(clip, twin):
    one, other = patch_of(clip, [*TWINS][:12]), patch_of(clip, [*TWINS][8:], step=-0.1, concept="dogs")
    patch = UnlearnPatch.combine([one, other])
    (there,) = translations(patch, twin)
    assert same(there.base, {name: twin[name] for names in TWINS.values() for name in names})
    assert [(e.concept, e.step, e.details) for e in there.edits] == [(e.concept, e.step, e.details) for e in patch.edits]
    assert [len(e.directions) for e in there.edits] == [sum(len(TWINS[name]) for name in e.directions) for e in patch.edits]
    (back,) = translations(there, clip)
    assert does_the_same(back, patch)


PARTS = [f"{LAYER}.self_attn.{part}.{kind}" for part in QKV for kind in ("weight", "bias")]
values = st.sampled_from([-0.0, 0.0, 1.0, -2.5, 1e-30])


@examples(50)
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
    made = [Edit(str(i), step, d) for i, (step, d) in enumerate(zip(steps, directions, strict=False))]
    assume(len({edit.digest for edit in made}) == len(made))  # a patch refuses the same edit twice
    patch = UnlearnPatch({name: apart[name].clone() for name in sorted(set().union(*edits))}, made)
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


# ---- through a patch, on whole models


def outputs(model, size=16, length=8, end=39):
    """Features of three pictures and three texts, and their logits, by either library's own code."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator)
    tokens = torch.randint(1, end, (3, length), generator=generator)
    tokens[:, -1] = end
    with torch.no_grad():
        image, text = encode_image(model, images), encode_text(model, tokens)
        return image, text, image @ text.T * model.logit_scale.exp()


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not bitwise_equal(tensor, before[name])}


def assert_alike(model, twin, **sizes):
    torch.testing.assert_close(outputs(twin, **sizes), outputs(model, **sizes), atol=1e-5, rtol=1e-5)
    assert same(tensors_of(twin), tensors_of(to_hugging_face(model)))


@pytest.mark.parametrize("name", TWINS)
def test_a_patch_made_in_open_clip_does_the_same_in_transformers(name, clip, twin):
    model, other = tiny_clip(), to_hugging_face(tiny_clip())
    before = outputs(model)
    patch = patch_of(clip, [name], step=0.5)
    for target in (model, other):
        patch.apply(target)
    assert changed(model, clip) == {name} and changed(other, twin) == set(TWINS[name])
    assert_alike(model, other)
    assert max((a - b).abs().max() for a, b in zip(before, outputs(other), strict=True)) > 1e-3
    with pytest.raises(PatchError, match="is applied already"):
        patch.apply(other)
    for target in (model, other):
        patch.revert(target)
    assert not changed(model, clip) and not changed(other, twin)


BACK = [names for names in TWINS.values() if len(names) == 1] + [
    [f"{LAYER}.self_attn.q_proj.weight"],
    [f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"],
    [f"{LAYER}.self_attn.v_proj.bias", f"{TEXT_LAYER}.self_attn.v_proj.weight"],
]


@pytest.mark.parametrize("names", BACK, ids="+".join)
def test_a_patch_made_in_transformers_does_the_same_in_open_clip(names, clip, twin):
    model, other = tiny_clip(), to_hugging_face(tiny_clip())
    patch = patch_of(twin, names, step=0.5)
    for target in (model, other):
        patch.apply(target, 0.5)
    assert changed(other, twin) == set(names)
    assert changed(model, clip) == {name for name, twins in TWINS.items() if set(twins) & set(names)}
    assert_alike(model, other)
    patch.revert(model, 0.5)
    assert not changed(model, clip)


def test_patches_of_parts_of_one_fused_tensor_come_and_go_in_any_order(clip, twin):
    model, other = tiny_clip(), to_hugging_face(tiny_clip())
    patches = [patch_of(twin, [f"{LAYER}.self_attn.{part}.weight"]) for part in QKV]
    for patch in patches:
        patch.apply(model)
        patch.apply(other)
    assert_alike(model, other)
    for patch in patches:
        patch.revert(model)
    assert not changed(model, clip)


def holders():
    """Models of either library that hold one vision tower; one as the tensors of a file."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    clip = tiny_clip()
    twin = to_hugging_face(clip)
    vision = CLIPVisionConfig(**twin.config.vision_config.to_dict() | {"projection_dim": 16})
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    made = {
        "CLIPVisionModel": CLIPVisionModel(vision),
        "with projection": CLIPVisionModelWithProjection(vision),
        "LLaVA": LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)),
    }
    tower = {name: t for name, t in tensors_of(twin).items() if name.startswith("vision_model.")}
    for model in made.values():
        inner = model.model.vision_tower if isinstance(model, LlavaForConditionalGeneration) else model
        inner = getattr(inner, "vision_model", inner)
        inner.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in tower.items()})
    made["with projection"].visual_projection.weight.data.copy_(clip.visual.proj.T)
    old = {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
    custom = torch.nn.ModuleDict({"eyes": clip.visual})
    return {"open_clip": clip, "its tower": custom, "CLIPModel": twin, "LLaVA's file before transformers 5": old, **made}


def test_a_patch_of_the_vision_tower_fits_every_model_that_holds_it():
    models = holders()
    states = {kind: model if isinstance(model, dict) else model.state_dict() for kind, model in models.items()}
    parts = {True: ("resblocks.1.mlp.c_fc.weight", "visual.ln_pre.bias"), False: ("layers.1.mlp.fc1.weight", "pre_layrnorm.bias")}
    for kind, state in states.items():
        ours = kind in ("open_clip", "its tower")
        ends = [end.removeprefix("visual.") if kind == "its tower" else end for end in parts[ours]]
        names = [name for name in state if name.endswith(tuple(ends)) and not name.startswith(("text_model", "transformer"))]
        patch = patch_of(state, names)
        assert len(names) == 2
        new = made_of(patch)
        for other, model in models.items():
            before = {name: tensor.clone() for name, tensor in states[other].items()}
            patch.apply(model)
            differing = {name for name, tensor in states[other].items() if not bitwise_equal(tensor, before[name])}
            assert len(differing) == 2 and not any("text" in name or "language" in name for name in differing), (kind, other)
            assert all(any(bitwise_equal(states[other][name], tensor) for tensor in new) for name in differing)
            patch.revert(model)
            assert same(dict(states[other]), before)


def test_a_projection_fits_where_there_is_one():
    models, patch = holders(), patch_of(tensors_of(tiny_clip()), ["visual.proj"])
    patch.apply(models["with projection"])
    assert bitwise_equal(models["with projection"].visual_projection.weight, made_of(patch)[0].T)
    for kind in ("CLIPVisionModel", "LLaVA"):
        with pytest.raises(PatchError, match="visual.proj: the model has no such tensor"):
            patch.apply(models[kind])


def test_of_towers_of_one_shape_it_takes_the_one_it_was_made_on():
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = tiny_clip(width=24)
    other = to_hugging_face(model)
    before, tensors = tensors_of(model), tensors_of(other)
    for tower in ("vision", "text"):
        name = "encoder.layers.1.mlp.fc1.weight"  # as a tower by itself has it
        patch = patch_of({name: tensors[f"{tower}_model.{name}"]}, [name])
        patch.apply(model)
        assert changed(model, before) == {f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.1.mlp.c_fc.weight"}
        patch.revert(model)
        assert not changed(model, before)
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        alone = kind(other.config.text_config)
        inner = getattr(alone, "text_model", alone)
        inner.load_state_dict({n.removeprefix("text_model."): t for n, t in tensors.items() if n.startswith("text_model.")})
        patch = patch_of(before, ["transformer.resblocks.1.attn.in_proj_weight"])
        patch.apply(alone)
        assert bitwise_equal(inner.encoder.layers[1].self_attn.q_proj.weight, made_of(patch)[0][:24])
        patch.revert(alone)


def test_of_two_twins_it_takes_the_one_of_the_same_weights_and_complains_of_the_one_nearest_the_root(clip):
    models = torch.nn.ModuleDict({"copy": to_hugging_face(tiny_clip()), "b": to_hugging_face(tiny_clip(seed=1))})
    before = tensors_of(models)
    patch = patch_of(clip, ["visual.proj"])
    patch.apply(models)
    assert changed(models, before) == {"copy.visual_projection.weight"}
    patch.revert(models)
    assert not changed(models, before)
    with pytest.raises(PatchError, match="^b.visual_projection.weight: the model is not the patch's base"):
        patch_of(tensors_of(tiny_clip(seed=2)), ["visual.proj"]).apply(models)


OTHERS = {
    "other weights": lambda: to_hugging_face(tiny_clip(seed=1)),
    "another precision": lambda: to_hugging_face(tiny_clip()).bfloat16(),
    "one bit": lambda: one_bit(to_hugging_face(tiny_clip())),
}


def one_bit(model):
    bias = model.get_parameter(f"{LAYER}.self_attn.v_proj.bias").data
    bias[:1] = torch.nextafter(bias[:1], torch.tensor(9.0))
    return model


@pytest.mark.parametrize("change", OTHERS)
def test_other_weights_under_fitting_names_are_refused(change, clip):
    model = OTHERS[change]()
    before = tensors_of(model)
    patch = patch_of(clip, [f"{BLOCK}.attn.in_proj_bias"])
    for call in (patch.apply, patch.revert):
        with pytest.raises(
            PatchError, match=r"vision_model.*\.bias: (the model is not the patch's base|.*changed it since|.* not applied)"
        ):
            call(model)
    assert not changed(model, before)


@pytest.mark.slow
def test_at_the_real_shape_logits_agree():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    other = to_hugging_face(model)
    names = ["visual.transformer.resblocks.9.attn.in_proj_weight", "transformer.resblocks.11.mlp.c_proj.weight", "visual.proj"]
    sizes = {"size": 224, "length": 77, "end": 49407}
    before = outputs(model, **sizes)
    tensors, twins = tensors_of(model), tensors_of(other)
    patch = patch_of(tensors, names, step=0.02)
    patch.apply(model)
    patch.apply(other)
    assert_alike(model, other, **sizes)
    assert (outputs(other, **sizes)[2] - before[2]).abs().max() > 1e-3
    assert changed(model, tensors) == set(names) and len(changed(other, twins)) == 5
    patch.revert(other)
    assert not changed(other, twins)

"""A patch belongs to a pipeline as to any model: made on it or on one of its parts, with adapters around or without."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import open_clip
import pytest
import torch
from _amounts import examples
from _peft import add_adapter
from _tiny_diffusion import TOKENS, tiny_pipeline, tiny_text_config, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from slug_lightning import UnlearnError
from slug_lightning.clip.models import to_hugging_face
from slug_lightning.patches.clip_names import translations
from slug_lightning.patches.edit import Edit, PatchError, edited
from slug_lightning.patches.matching import by_name
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.model_parts import adapted, base_parameters, parts_of

TENSORS = {
    "sd1": ["text_encoder.encoder.layers.1.mlp.fc1.weight"],
    "sd2": ["text_encoder.final_layer_norm.bias", "unet.conv_in.weight"],
    "sdxl": ["text_encoder_2.text_projection.weight", "text_encoder.encoder.layers.0.self_attn.q_proj.weight"],
}
Q = "encoder.layers.0.self_attn.q_proj.weight"
FC = "encoder.layers.1.mlp.fc1.weight"


def tensors_of(model) -> dict[str, torch.Tensor]:
    parts = model if isinstance(model, nn.Module) else parts_of(model)
    return {name: tensor.detach().clone() for name, tensor in parts.state_dict().items()}


def patch_of(model, names, concept="cats") -> UnlearnPatch:
    base = {name: tensor for name, tensor in tensors_of(model).items() if name in names}
    assert len(base) == len(names)
    generator = torch.Generator().manual_seed(len(concept))
    return UnlearnPatch(base, [Edit(concept, 0.5, {n: torch.randn(t.shape, generator=generator) for n, t in base.items()})])


def made_of(patch, name):
    (edit,) = patch.edits
    return edited(patch.base[name], [(edit.directions[name], edit.step)])


def differing(model, before) -> set[str]:
    return {name for name, tensor in tensors_of(model).items() if not bitwise_equal(tensor, before[name])}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_patch_of_a_pipeline_changes_what_it_names_in_another_one_and_can_be_taken_out(kind):
    made_on, pipeline = tiny_pipeline(kind), tiny_pipeline(kind)
    before, patch = tensors_of(pipeline), patch_of(made_on, TENSORS[kind])
    patch.apply(pipeline)
    assert differing(pipeline, before) == set(TENSORS[kind])
    assert all(bitwise_equal(tensors_of(pipeline)[name], made_of(patch, name)) for name in TENSORS[kind])
    assert set(UnlearnPatch.active(pipeline).base) == set(TENSORS[kind])
    patch.adjust(pipeline, 2.0)
    assert UnlearnPatch.active(pipeline).describe()["edits"][0]["strength"] == 2
    other = copy.deepcopy(pipeline)
    UnlearnPatch.active(pipeline).recognise(other)
    for one in (pipeline, other):
        patch.revert(one)
        assert differing(one, before) == set() and UnlearnPatch.active(one) is None


def test_what_a_pipeline_draws_is_changed_by_the_edit_alone():
    pipeline = tiny_pipeline("sd1")

    def drawn():
        generator = torch.Generator().manual_seed(0)
        return pipeline("cat in blob style", num_inference_steps=2, output_type="pt", generator=generator).images

    patch, before = patch_of(pipeline, TENSORS["sd1"]), drawn()
    patch.apply(pipeline)
    assert not torch.equal(drawn(), before)
    patch.revert(pipeline)
    assert torch.equal(drawn(), before)


def test_of_two_encoders_the_one_is_edited_that_the_patch_was_made_on():
    pipeline = tiny_pipeline("sdxl")
    before = tensors_of(pipeline)
    name = "encoder.layers.0.layer_norm1.weight"  # in both encoders, of different widths
    patch_of(pipeline.text_encoder_2.text_model, [name]).apply(pipeline)
    assert differing(pipeline, before) == {f"text_encoder_2.text_model.{name}"}


def test_a_pipeline_is_known_by_its_components():
    line, norm = nn.Linear(2, 1), nn.LayerNorm(1)
    parts = parts_of(SimpleNamespace(components={"a": line, "none": None, "b": norm, "c": line}))
    assert list(parts) == ["a", "b", "c"] and parts["a"] is parts["c"] is line and parts["b"] is norm
    for wrong, said in (
        (SimpleNamespace(components={"scheduler": None}), "no module among its components: scheduler"),
        (3, "int"),
    ):
        with pytest.raises(UnlearnError, match=said):
            patch_of(line, ["weight"]).apply(wrong)


def test_a_patch_of_another_pipeline_is_refused():
    pipeline = tiny_pipeline("sd1")
    before = tensors_of(pipeline)
    with pytest.raises(PatchError, match="not the patch's base"):
        patch_of(tiny_pipeline("sd1", seed=1), TENSORS["sd1"]).apply(pipeline)
    with pytest.raises(PatchError, match="no such tensor"):
        patch_of(tiny_pipeline("sdxl"), ["text_encoder_2.text_projection.weight"]).apply(pipeline)
    assert differing(pipeline, before) == set()


# ---- the CLIP that the text encoder came from


def text_tower(width: int = 32) -> open_clip.CLIP:
    """A CLIP whose text tower is of the tiny text encoder's shape, as is its image tower: only names tell them apart."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": width, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
    text = {"context_length": TOKENS, "width": 32, "heads": 4, "layers": 2, "vocab_size": len(tiny_tokenizer()), "mlp_ratio": 2.0}
    return open_clip.CLIP(16, vision, text).eval()


def family():
    """One text encoder as open_clip, as `CLIPModel`, as `CLIPTextModel` and in a pipeline."""
    from transformers import CLIPTextModel

    clip = text_tower()
    twin = to_hugging_face(clip)
    encoder = CLIPTextModel(tiny_text_config("sd1"))
    encoder.load_state_dict(twin.text_model.state_dict())
    alone = copy.deepcopy(encoder)
    return {"open_clip": clip, "CLIPModel": twin, "CLIPTextModel": alone, "pipeline": tiny_pipeline(text_encoder=encoder)}


NAMES = {"open_clip": "transformer.resblocks.1.mlp.c_fc.weight", "CLIPModel": f"text_model.{FC}", "CLIPTextModel": FC}
NAMES |= {"pipeline": f"text_encoder.{FC}"}


@pytest.mark.parametrize("made_on", NAMES)
def test_a_patch_goes_from_each_to_each(made_on):
    models = family()
    patch = patch_of(models[made_on], [NAMES[made_on]])
    for kind, model in models.items():
        before = tensors_of(model)
        patch.apply(model)
        assert differing(model, before) == {NAMES[kind]}
        assert bitwise_equal(tensors_of(model)[NAMES[kind]], made_of(patch, NAMES[made_on]))
        patch.revert(model)
        assert differing(model, before) == set()


@pytest.mark.parametrize("encoder", ["text_encoder.", "text_encoder_2.", "text_encoder.text_model.", "pipeline.text_encoder."])
def test_the_name_of_a_text_encoder_is_never_read_as_that_of_an_image_tower(encoder):
    clip, tensor = text_tower(), torch.zeros(32, 32)
    name = f"{encoder}{Q}"
    patch = UnlearnPatch({name: tensor}, [Edit("cats", 0.5, {name: torch.ones(32, 32)})])
    (found,) = translations(patch, clip.state_dict())
    assert list(found.base) == ["transformer.resblocks.0.attn.in_proj_weight"]
    image = UnlearnPatch({f"vision_model.{Q}": tensor}, [Edit("cats", 0.5, {f"vision_model.{Q}": torch.ones(32, 32)})])
    assert list(translations(image, {name: tensor})) == []
    assert len(list(translations(image, {f"image_encoder.{Q}": tensor}))) == 1


# ---- adapters


def with_adapters(model: nn.Module, targets, name="style") -> nn.Module:
    with torch.random.fork_rng():
        if targets:
            add_adapter(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=sorted(targets)), name)
    return model


def wrapped(name: str) -> str:
    return name.replace("proj.weight", "proj.base_layer.weight").replace("fc1.weight", "fc1.base_layer.weight")


def test_base_parameters_are_those_that_were_there_before_the_adapters():
    pipeline = tiny_pipeline("sd1")
    for part, targets in ((pipeline.text_encoder, ["q_proj", "fc1"]), (pipeline.unet, ["to_q"])):
        before = [id(p) for p in part.parameters()]
        with_adapters(part, targets)
        found = base_parameters(part)
        assert sorted(before) == sorted(id(p) for p in found.values()) and len(found) < len(list(part.parameters()))
        assert all(part.get_parameter(name) is p for name, p in found.items())
        assert len(list(adapted(part))) == sum("lora_A" in name for name, _ in part.named_parameters())


targets = st.sets(st.sampled_from(["q_proj", "k_proj", "fc1", "fc2"]))


@examples(15)
@given(here=targets, there=targets, names=st.sets(st.sampled_from([Q, FC]), min_size=1))
def test_a_patch_finds_its_tensors_whatever_is_wrapped_where(here, there, names):
    made_on, other = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    with_adapters(made_on.text_encoder, here)
    with_adapters(other.text_encoder, there, "another")
    full = [name for name in tensors_of(made_on) if name.replace(".base_layer", "").removeprefix("text_encoder.") in names]
    patch = patch_of(made_on, full)
    for model in (other, other.text_encoder):
        before = tensors_of(other)
        patch.apply(model)
        changed = differing(other, before)
        assert {name.replace(".base_layer", "") for name in changed} == {name.replace(".base_layer", "") for name in full}
        assert not any("lora" in name for name in changed)
        (edit,) = UnlearnPatch.active(other).edits
        assert set(edit.directions) == changed and edit.digest == patch.edits[0].digest
        patch.revert(other)
        assert differing(other, before) == set()


def test_a_patch_made_under_adapters_applies_to_the_clip_and_the_other_way_round():
    models = family()
    with_adapters(models["pipeline"].text_encoder, ["q_proj", "fc1"])
    under, name = wrapped(NAMES["pipeline"]), NAMES["open_clip"]
    patch, clip = patch_of(models["pipeline"], [under]), models["open_clip"]
    patch.apply(clip)
    assert bitwise_equal(clip.state_dict()[name], made_of(patch, under))
    patch.revert(clip)
    back, before = patch_of(clip, [name]), tensors_of(models["pipeline"])
    back.apply(models["pipeline"])
    assert differing(models["pipeline"], before) == {under}


def test_a_module_that_itself_has_a_base_layer_keeps_its_names():
    """Of two tensors of which one has the other's name under an adapter, each patch means its own."""
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    net["a"].base_layer = nn.Linear(2, 2, bias=False)
    for name in ("a.weight", "a.base_layer.weight"):
        before = tensors_of(net)
        patch_of(net, [name]).apply(net)
        assert differing(net, before) == {name}
    both = patch_of(net, ["a.weight", "a.base_layer.weight"])
    with pytest.raises(PatchError, match="no such tensor"):
        both.apply(nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)}))


@given(st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=3), st.sampled_from(["x", "x.y", "y.x.z"]))
def test_a_part_is_found_by_one_prefix_that_all_names_share(parts, prefix):
    names = [".".join([*parts, leaf]) for leaf in ("weight", "bias")]
    held = {f"{prefix}.{name}": i for i, name in enumerate(names)}
    assert {name: i for i, name in enumerate(names)} in list(by_name(names, held))
    assert {f"{prefix}.{name}": i for i, name in enumerate(names)} in list(
        by_name(list(held), dict(zip(names, range(2), strict=True)))
    )
    assert list(by_name([*names, "nowhere"], held)) == []

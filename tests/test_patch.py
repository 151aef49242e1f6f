"""A patch changes exactly what it says, undoes it to the bit, and refuses everything else."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slug_lightning.patches import patch as patch_module
from slug_lightning.patches.edit import Edit, PatchError, edited
from slug_lightning.patches.patch import UnlearnPatch

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
seeds = st.integers(0, 10_000)
strengths = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, -1.0])
NAMES = ["a.weight", "b.weight", "c"]
some_names = st.sets(st.sampled_from(NAMES), min_size=1)


def model(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3, bias=False)})
    made.c = nn.Parameter(torch.randn(2, 2))
    return made.to(dtype)


def patch_of(module: nn.Module, names: list[str], seed: int = 0, concept: str = "cats") -> UnlearnPatch:
    generator = torch.Generator().manual_seed(seed)
    state = {name: t.detach().clone() for name, t in module.state_dict().items() if name in names}
    directions = {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}
    step = float(torch.rand(1, generator=generator)) + 0.1
    return UnlearnPatch(state, [Edit(concept, step, directions, {"layer": names[0], "relative_step": 0.1})])


def bits(source) -> dict[str, tuple]:
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).flatten().tolist()) for name, t in state.items()}


def assert_equal_patches(one: UnlearnPatch, other: UnlearnPatch) -> None:
    assert one.digest == other.digest and bits(one.base) == bits(other.base)
    for a, b in itertools.zip_longest(one.edits, other.edits):
        for name in ("concept", "step", "strength", "details", "parents", "origin", "digest"):
            assert getattr(a, name) == getattr(b, name)
        assert bits(a.directions) == bits(b.directions)


@examples(40)
@given(seed=seeds, dtype=dtypes, strength=strengths, names=some_names)
def test_apply_adds_the_step_to_the_named_tensors_alone_and_revert_undoes_it_to_the_bit(seed, dtype, strength, names):
    net = model(seed, dtype)
    before, original = bits(net), {name: t.detach().clone() for name, t in net.state_dict().items()}
    patch = patch_of(net, sorted(names), seed)
    (edit,) = patch.edits
    patch.apply(net, strength)
    for name, tensor in net.state_dict().items():
        if name in names:
            exact = original[name].double() + strength * edit.step * edit.directions[name].double()
            torch.testing.assert_close(tensor, exact.to(dtype))
        else:
            assert bits({name: tensor})[name] == before[name]
    patch.revert(net, strength)
    assert bits(net) == before


def test_a_step_is_rounded_once_to_half_precision_not_once_an_edit():
    base = torch.full((1,), 256.0, dtype=torch.bfloat16)  # its neighbour is 258
    assert edited(base, [(torch.ones(1), 0.75)] * 2).item() == 258


@examples(30)
@given(seed=seeds, dtype=dtypes, sets=st.lists(some_names, min_size=2, max_size=3), data=st.data())
def test_combined_edits_add_up_whatever_their_order(seed, dtype, sets, data):
    net = model(seed, dtype)
    before, original = bits(net), {name: t.detach().clone() for name, t in net.state_dict().items()}
    patches = [patch_of(net, sorted(names), seed + i, f"concept {i}") for i, names in enumerate(sets)]
    combined = UnlearnPatch.combine(patches)
    assert_equal_patches(combined, UnlearnPatch.combine(data.draw(st.permutations(patches))))
    assert_equal_patches(combined, UnlearnPatch.combine([UnlearnPatch.combine(patches[1:]), patches[0]]))
    combined.apply(net)
    for name, tensor in net.state_dict().items():
        steps = [e.step * e.directions[name].double() for p in patches for e in p.edits if name in e.directions]
        torch.testing.assert_close(tensor, (original[name].double() + sum(steps)).to(dtype))
    combined.revert(net)
    assert bits(net) == before


def test_combining_refuses_nothing_other_bases_and_doubles():
    one, other = patch_of(model(0), ["c"]), patch_of(model(1), ["c"], seed=1)
    for patches, reason in {(): "no patch", (one, other): "made on different bases", (one, one): "'cats' occurs twice"}.items():
        with pytest.raises(PatchError, match=reason):
            UnlearnPatch.combine(patches)


def refuses(call, net, match: str) -> None:
    before = bits(net)
    with pytest.raises(PatchError, match=match):
        call(net)
    assert bits(net) == before


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_it_is_applied_and_reverted_once(strength):
    net, patch = model(0), patch_of(model(0), NAMES)
    refuses(patch.revert, net, "the patch is not applied")
    patch.apply(net, strength)
    refuses(lambda m: patch.apply(m, strength), net, rf"'cats' is applied already \(at strength {strength:g}\); revert .* adjust")
    patch.revert(net)
    refuses(lambda m: patch.revert(m, strength), net, "the patch is not applied")
    patch.apply(net, strength)
    net.c.data[1, 1] += 1
    for undo in (patch.revert, lambda m: patch.adjust(m, 2.0)):
        refuses(undo, net, "c: .*something else changed it since")


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_where_nothing_is_known_of_a_model_its_content_tells_one_patch_from_its_base(strength):
    net, patch = model(0), patch_of(model(0), NAMES)
    patch.apply(net, strength)
    other = copy.deepcopy(net)
    if strength == 1:
        refuses(patch.apply, other, "applied already")
        patch.revert(other)
    else:
        refuses(patch.apply, other, "not the patch's base; if another process applied patches .* `recognise`")
        refuses(patch.revert, other, "something else changed it since")
        refuses(lambda m: patch.adjust(m, 0.0), other, "something else changed it since")
        refuses(lambda m: patch.apply(m, strength), other, "applied already")
        patch.revert(other, strength)
    assert bits(other) == bits(model(0)) != bits(net)


@examples(20)
@given(seed=seeds, dtype=dtypes, names=some_names, one=strengths, other=strengths)
def test_an_adjusted_patch_is_as_if_applied_like_that_at_once(seed, dtype, names, one, other):
    net, direct = model(seed, dtype), model(seed, dtype)
    patch = patch_of(net, sorted(names), seed)
    refuses(lambda m: patch.adjust(m, other), net, "the patch is not applied")
    patch.apply(net, one)
    patch.adjust(net, other)
    patch.apply(direct, other)
    assert bits(net) == bits(direct)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength):
    net, patch = model(0), patch_of(model(0), NAMES)
    refuses(lambda m: patch.apply(m, strength), net, "strength must be finite, got")
    patch.apply(net)
    refuses(lambda m: patch.adjust(m, strength), net, "strength must be finite, got")


def test_an_edit_acts_at_its_own_strength_and_a_combined_patch_keeps_strengths_and_parents():
    net, patches = model(0), [patch_of(model(0), ["c"], seed) for seed in (1, 2)]
    base, parents = net.c.detach().clone(), [{"concept": "birds", "digest": "00", "strength": 2.0}]
    weak = [
        UnlearnPatch(patch.base, [dataclasses.replace(patch.edits[0], strength=strength, parents=parents)])
        for patch, strength in zip(patches, (0.5, -2.0), strict=True)
    ]
    assert [w.edits[0].digest for w in weak] == [p.edits[0].digest for p in patches]
    assert [w.digest for w in weak] != [p.digest for p in patches]
    combined = UnlearnPatch.combine(weak)
    assert sorted(edit.strength for edit in combined.edits) == [-2.0, 0.5]
    assert all(edit.parents == parents for edit in combined.edits)
    combined.apply(net, 3.0)
    one, other = (3 * patch.edits[0].step * patch.edits[0].directions["c"] for patch in patches)
    torch.testing.assert_close(net.c.detach(), base + 0.5 * one - 2 * other)


@pytest.mark.parametrize(("base", "names", "reason"), [
    ({}, [], "at least one"),
    ({"w": torch.ones(2), "v": torch.ones(2)}, ["w"], "exactly"),
    ({"w": torch.ones(2)}, ["w", "v"], "v: .* another shape"),
    ({"w": torch.ones(1, 2)}, ["w"], "w: .* another shape"),
    ({"w": torch.ones(2)}, ["w", "w"], "'cats' occurs twice"),
])  # fmt: skip
def test_a_patch_that_does_not_fit_its_own_base_cannot_be_made(base, names, reason):
    with pytest.raises(PatchError, match=reason):
        UnlearnPatch(base, [Edit("cats", 0.5, {name: torch.ones(2)}) for name in names])


CHANGES = {
    "one bit": lambda net: net.c.data[1, 1:].copy_(torch.nextafter(net.c.data[1, 1:], torch.tensor(9.0))),
    "sign of a zero": lambda net: net.c.data[0, 0].neg_(),
    "dtype": lambda net: net.double(),
    "shape": lambda net: setattr(net, "c", nn.Parameter(torch.ones(2, 3))),
    "name": lambda net: net.register_parameter("d", net._parameters.pop("c")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_is_refused_before_anything_is_written(change):
    net = model(0)
    net.c.data[0, 0] = 0.0
    patch = patch_of(net, NAMES)
    CHANGES[change](net)
    refuses(patch.apply, net, "no such tensor" if change == "name" else "not the patch's base")


def clip(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    root = nn.Module()
    root.visual = nn.Module()
    root.visual.proj, root.visual.norm = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))
    return root


@pytest.mark.parametrize("where", ["itself", "holder", "part", "state dict", "holder's state dict", "part's state dict"])
def test_it_finds_its_tensors_in_a_holder_a_part_and_a_state_dict(where):
    net = clip()
    patch = patch_of(net, ["visual.proj", "visual.norm"])
    target = nn.ModuleDict({"wrapped": nn.Sequential(net)}) if "holder" in where else net.visual if "part" in where else net
    before = bits(net)
    subject = target.state_dict() if "state dict" in where else target
    patch.apply(subject)
    for name, base in patch.base.items():
        assert torch.equal(net.get_parameter(name), base + patch.edits[0].step * patch.edits[0].directions[name])
    patch.revert(subject)
    assert bits(net) == before


def test_a_name_that_only_ends_alike_is_not_taken():
    net = nn.ModuleDict({"audiovisual": clip().visual})
    refuses(patch_of(clip(), ["visual.norm"]).apply, net, r"visual\.norm: the model has no such tensor")


def test_of_two_parts_with_the_same_names_it_takes_the_one_it_was_made_on():
    towers = nn.ModuleDict({"text": clip(1), "vision": clip(2)})
    patch = patch_of(towers["vision"], ["visual.proj"])
    patch.apply(towers)
    patch.revert(towers)


def test_describe_is_plain_data_that_tells_content_apart():
    patch, other = (patch_of(model(seed), ["c", "a.weight"]) for seed in (0, 1))
    said, edit = patch.describe(), patch.edits[0]
    assert said["edits"] == [
        {"concept": "cats", "step": edit.step, "strength": 1.0, "tensors": ["a.weight", "c"], "parents": []}
        | {"details": edit.details, "digest": edit.digest}
    ]
    assert said["tensors"]["a.weight"]["shape"] == [2, 3] and said["tensors"]["c"]["dtype"] == "float32"
    assert said["digest"] == patch.digest != other.digest
    assert other.describe()["tensors"]["c"]["sha256"] != said["tensors"]["c"]["sha256"]


@examples(20)
@given(seed=seeds, dtype=dtypes, names=some_names, concept=st.text(max_size=5))
def test_a_file_gives_back_the_same_patch(seed, dtype, names, concept, tmp_path_factory):
    net, path = model(seed, dtype), tmp_path_factory.mktemp("patch") / "new folder" / "p.safetensors"
    combined = UnlearnPatch.combine([patch_of(net, sorted(names), seed, concept), patch_of(net, ["c"], seed + 1)])
    more = {"strength": 0.25, "parents": combined.as_parents(), "origin": "ab" * 32}
    combined = UnlearnPatch(combined.base, [dataclasses.replace(combined.edits[0], **more), combined.edits[1]])
    combined.save(path)
    assert_equal_patches(UnlearnPatch.load(path), combined)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def small(tmp_path):
    patch = UnlearnPatch({"w": torch.ones(1, 2)}, [Edit("\u00e9 cat", 0.5, {"w": torch.ones(1, 2)}, {"layer": "w" * 3})])
    patch.save(tmp_path / "p.safetensors")
    return patch, (tmp_path / "p.safetensors").read_bytes(), tmp_path / "damaged"


def test_a_file_cut_anywhere_or_grown_is_refused(small):
    _, content, path = small
    for damaged in (*(content[:length] for length in range(len(content))), content + b"\0", content + b"\0" * 8):
        path.write_bytes(damaged)
        with pytest.raises(PatchError):
            UnlearnPatch.load(path)


@pytest.mark.parametrize("change", [0x01, 0x0F, 0x20, 0x80, 0xFF])  # 0x0F: F32 becomes I32
def test_a_file_with_any_byte_altered_is_refused_unless_the_byte_means_nothing(small, change):
    patch, content, path = small
    end = 8 + int.from_bytes(content[:8], "little")
    padding = range(content.rindex(b"}", 0, end) + 1, end)
    assert len(padding) > 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        with pytest.raises(PatchError):
            UnlearnPatch.load(path)
    for place in padding:  # blanks after the header: another blank says the same, and the patch is the same
        path.write_bytes(content[:place] + b"\n" + content[place + 1 :])
        assert_equal_patches(UnlearnPatch.load(path), patch)


def test_a_pickle_another_safetensors_file_and_no_file_are_refused_each_for_its_reason(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "torch")
    patch_module.save_file({"w": torch.ones(2)}, tmp_path / "weights")
    for name, reason in {"pickle": "not a complete", "torch": "not a complete", "weights": "not a patch"}.items():
        with pytest.raises(PatchError, match=reason):
            UnlearnPatch.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="no patch at"):
        UnlearnPatch.load(tmp_path / "none")


EDIT = (
    '[{"concept": "x", "step": 1, "strength": 2, "tensors": ["w"], "details": {}, "origin": "", '
    '"parents": [{"concept": "y", "digest": "00", "strength": 3}]}]'
)


@pytest.mark.parametrize(("text", "shape"), [
    ("not json", (2,)), ("5", (2,)), ('["w"]', (2,)), (EDIT.replace("1", '"much"'), (2,)), (EDIT.replace('"w"', '"v"'), (2,)),
    ("[]", (2,)), (EDIT, (1,)), (EDIT, (3, 2)), (EDIT.replace("1", "1" + "0" * 400), (2,)), (EDIT.replace("1", "1e999"), (2,)),
    (EDIT.replace('"x"', "7"), (2,)), (EDIT.replace('"origin": ""', '"origin": 7'), (2,)), (EDIT.replace("2", "NaN"), (2,)),
    (EDIT.replace('"00"', "null"), (2,)), (EDIT.replace("3", '"much"'), (2,)), (EDIT.replace('"y"', "[]"), (2,)),
    (EDIT.replace('"parents"', '"children"'), (2,)),
])  # fmt: skip
def test_a_forged_file_whose_digest_is_right_is_refused_on_loading(text, shape, tmp_path):
    tensors = {"base/w": torch.ones(2), "0/w": torch.ones(shape)}
    metadata = {"format": patch_module.PATCH_FORMAT, "patch": text, "sha256": patch_module.digest_of(tensors, text)}
    patch_module.save_file(tensors, tmp_path / "p", metadata=metadata)
    with pytest.raises(PatchError, match="the content is not valid for a patch"):
        UnlearnPatch.load(tmp_path / "p")


def test_the_file_that_was_not_forged_is_read(tmp_path):
    tensors = {"base/w": torch.ones(2), "0/w": torch.ones(2)}
    metadata = {"format": patch_module.PATCH_FORMAT, "patch": EDIT, "sha256": patch_module.digest_of(tensors, EDIT)}
    patch_module.save_file(tensors, tmp_path / "p", metadata=metadata)
    assert UnlearnPatch.load(tmp_path / "p").edits[0].strength == 2

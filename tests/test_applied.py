"""Whatever is done to a model, in whatever order: its weights are those that the base and the active edits make."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from _amounts import examples
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from slug_lightning import PatchError, UnlearnPatch
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.state import History, model_tensors
from slug_lightning.tensors.dtensor import whole

DTYPES = {"wide": torch.float32, "brain": torch.bfloat16, "short": torch.float16, "pair.weight": torch.bfloat16}
strengths = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 3.0, 1e-9, 0.1])


def model(seed: int = 0) -> nn.Module:
    """Tensors of three precisions, all but one of them with a negative zero."""
    made, generator = nn.Module(), torch.Generator().manual_seed(seed)
    made.pair = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    for name, dtype in DTYPES.items():
        values = torch.randn(2, 3, generator=generator).to(dtype)
        if name != "brain":  # so that there is a step which changes no bit
            values[0, 0] = -0.0
        if "." in name:
            made.get_parameter(name).data.copy_(values)
        else:
            made.register_parameter(name, nn.Parameter(values))
    made.register_buffer("buffer", torch.randn(2, 3, generator=generator))
    return made


def patch_of(net: nn.Module, names: Any, seed: int, step: float = 0.3, **more: Any) -> UnlearnPatch:
    generator, state = torch.Generator().manual_seed(1000 + seed), net.state_dict()
    directions = {name: torch.randn(state[name].shape, generator=generator) for name in sorted(names)}
    base = {name: state[name].clone() for name in directions}
    return UnlearnPatch(base, [Edit(f"concept {seed}", step, directions, **more)])


def bits(source: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: (t.dtype, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def rebuilt(base: dict[str, Tensor], applied: dict[int, float], patches: list[UnlearnPatch]) -> dict[str, Tensor]:
    """The plain way: start from the base, add what is active in the order of the digests, round once."""
    edits = sorted((patches[i].edits[0].digest, i, strength) for i, strength in applied.items() if strength != 0)
    made = {}
    for name, tensor in base.items():
        of_this = [(patches[i].edits[0], strength) for _, i, strength in edits if name in patches[i].base]
        total = tensor.float()
        for edit, strength in of_this:
            total = total + edit.directions[name] * (strength * edit.step)
        made[name] = total.to(tensor.dtype) if of_this else tensor
    return made


def refused(call: Any, net: Any, match: str, **how: Any) -> None:
    before, known = bits(net), UnlearnPatch.active(net)
    with pytest.raises(PatchError, match=match):
        call(net, **how)
    assert bits(net) == before
    assert getattr(UnlearnPatch.active(net), "digest", None) == getattr(known, "digest", None)


SUBSETS = [
    ["wide"],
    ["brain"],
    ["short"],
    ["brain"],
    ["wide", "brain"],
    ["short", "pair.weight"],
    list(DTYPES),
    ["buffer", "short"],
]
STEPS = [0.3, 0.01, -0.2, 1e-12, 0.3, 1e-9, 0.05, 7.0]  # the fourth changes no bit, at no strength
which = st.integers(0, len(SUBSETS) - 1)


class Composed(RuleBasedStateMachine):
    """Eight patches on one model; the oracle knows only which are applied, and how strongly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.base = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.patches = [patch_of(self.net, names, i, step) for i, (names, step) in enumerate(zip(SUBSETS, STEPS, strict=True))]
        self.applied: dict[int, float] = {}

    @rule(i=which, strength=strengths)
    def apply(self, i: int, strength: float) -> None:
        if i in self.applied:
            refused(self.patches[i].apply, self.net, "applied already", strength=strength)
        else:
            self.patches[i].apply(self.net, strength)
            self.applied[i] = strength

    @rule(i=which)
    def revert(self, i: int) -> None:
        if i in self.applied:
            self.patches[i].revert(self.net)
            del self.applied[i]
        else:
            refused(self.patches[i].revert, self.net, "not applied")

    @rule(i=which, strength=strengths)
    def adjust(self, i: int, strength: float) -> None:
        if i in self.applied:
            self.patches[i].adjust(self.net, strength)
            self.applied[i] = strength
        else:
            refused(self.patches[i].adjust, self.net, "not applied", strength=strength)

    @rule(several=st.sets(which, min_size=2, max_size=4), strength=strengths, data=st.data())
    def act_combined(self, several: set[int], strength: float, data: st.DataObject) -> None:
        combined = UnlearnPatch.combine([self.patches[i] for i in data.draw(st.permutations(sorted(several)))])
        if several <= self.applied.keys():
            refused(combined.apply, self.net, "applied already")
            combined.revert(self.net)
            self.applied = {i: s for i, s in self.applied.items() if i not in several}
        elif several & self.applied.keys():
            refused(combined.apply, self.net, "applied already")
            refused(combined.revert, self.net, "not applied")
        else:
            combined.apply(self.net, strength)
            self.applied |= dict.fromkeys(several, strength)

    @rule()
    def go_on_in_another_process(self) -> None:
        applied = UnlearnPatch.active(self.net)
        self.net = copy.deepcopy(self.net)
        assert UnlearnPatch.active(self.net) is None
        if applied is not None:
            applied.recognise(self.net)

    @precondition(lambda self: self.applied)
    @rule()
    def take_all_out_by_what_is_active(self) -> None:
        UnlearnPatch.active(self.net).revert(self.net)
        self.applied = {}

    @invariant()
    def weights_are_those_of_a_rebuild(self) -> None:
        assert bits(self.net) == bits(rebuilt(self.base, self.applied, self.patches))

    @invariant()
    def active_says_what_is_applied(self) -> None:
        active = UnlearnPatch.active(self.net)
        found = {edit.digest: edit.strength for edit in active.edits} if active else {}
        assert found == {self.patches[i].edits[0].digest: strength for i, strength in self.applied.items()}
        assert active is None or bits(active.base) == bits({name: self.base[name] for name in active.base})


TestComposed = Composed.TestCase
TestComposed.settings = examples(40, stateful_step_count=20)


@examples(30)
@given(data=st.data(), some=st.dictionaries(which, strengths, min_size=1))
def test_the_order_of_applying_and_of_reverting_does_not_matter(data, some):
    one, other, original = model(), model(), bits(model())
    patches = [patch_of(one, names, i, step) for i, (names, step) in enumerate(zip(SUBSETS, STEPS, strict=True))]
    for net in (one, other):
        for i in data.draw(st.permutations(sorted(some))):
            patches[i].apply(net, some[i])
    assert bits(one) == bits(other)
    for net in (one, other):
        for i in data.draw(st.permutations(sorted(some))):
            patches[i].revert(net)
        assert bits(net) == original and UnlearnPatch.active(net) is None


def test_order_matters_to_who_adds_to_what_is_there():
    """So the property above is not empty: sums in two orders differ, and so do steps rounded one by one."""
    net = model()
    patches = [patch_of(net, ["brain"], seed) for seed in range(3)]
    found = set()
    for order in itertools.permutations(patches):
        value = net.brain.detach()
        for patch in order:
            value = (value.float() + patch.edits[0].step * patch.edits[0].directions["brain"]).bfloat16()
        found.add(bits({"brain": value})["brain"])
    assert len(found) > 1


def test_of_two_combined_the_one_that_changes_no_bit_is_not_taken_for_applied_with_the_other():
    net = model()
    seen, invisible = patch_of(net, ["wide"], 0), patch_of(net, ["brain"], 3, step=1e-12)
    both = UnlearnPatch.combine([seen, invisible])
    seen.apply(net, 0.0)
    refused(both.revert, net, "brain: the patch is not applied")
    refused(both.adjust, net, "brain: the patch is not applied", strength=2.0)
    invisible.apply(net)
    both.revert(net)
    assert bits(net) == bits(model()) and UnlearnPatch.active(net) is None


# ---- what something else does to the tensors


def test_two_models_do_not_disturb_each_other():
    one, other = model(), model()
    cats, dogs = patch_of(one, ["brain", "wide"], 0), patch_of(one, ["brain"], 1, step=1e-12)
    cats.apply(one)
    dogs.apply(other)
    refused(dogs.revert, one, "not applied")
    dogs.revert(other)
    assert bits(other) == bits(model())
    cats.revert(one)
    assert bits(one) == bits(model())


@pytest.mark.parametrize("change", ["other weights", "training", "dtype"])
def test_what_was_known_is_forgotten_when_something_else_changes_the_tensor(change):
    net, dogs = model(), patch_of(model(), ["wide"], 1)
    cats = patch_of(net, ["wide", "short"], 0)
    cats.apply(net)
    dogs.apply(net, 0.5)
    if change == "other weights":
        net.load_state_dict(model(seed=1).state_dict())
    elif change == "training":
        net.wide.data.add_(1.0)
        net.short.data.add_(1.0)
    else:
        net.double()
    assert UnlearnPatch.active(net) is None
    refused(cats.revert, net, "something else changed it since")
    refused(dogs.adjust, net, "something else changed it since", strength=2.0)
    refused(cats.apply, net, "not the patch's base")
    patch_of(net, ["wide"], 2).apply(net)  # made on what is there now


def test_the_base_loaded_anew_may_be_edited_anew():
    net = model()
    cats = patch_of(net, ["wide"], 0)
    cats.apply(net, 0.5)
    net.load_state_dict(model().state_dict())
    cats.apply(net)
    assert bits(net) == bits(rebuilt(model().state_dict(), {0: 1.0}, [cats]))


@pytest.mark.parametrize("swap", [False, True])
def test_moving_to_a_device_changes_nothing_that_is_known(swap):
    net = model()
    cats = patch_of(net, [*DTYPES, "buffer"], 0)
    cats.apply(net, 0.5)
    torch.__future__.set_swap_module_params_on_conversion(swap)  # torch's two ways to move a parameter
    try:
        net._apply(torch.clone)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    cats.revert(net)
    assert bits(net) == bits(model())


def test_of_an_edit_whose_other_tensors_were_trained_the_rest_is_active_and_can_be_reverted():
    net = model()
    cats, dogs = patch_of(net, ["wide", "short"], 0), patch_of(net, ["wide"], 1)
    cats.apply(net, 0.5)
    dogs.apply(net)
    with torch.no_grad():
        net.short.add_(1.0)
    trained = bits(net)["short"]
    refused(cats.revert, net, "short: .* something else changed it since")
    refused(cats.apply, net, "short: the model is not the patch's base")
    left = UnlearnPatch.active(net)
    assert {(edit.digest, *edit.directions): edit.strength for edit in left.edits} == {
        (cats.edits[0].digest, "wide"): 0.5,
        (dogs.edits[0].digest, "wide"): 1.0,
    }
    moved = copy.deepcopy(net)
    left.recognise(moved)
    for each in (net, moved):
        dogs.revert(each)
        UnlearnPatch.active(each).revert(each)
        assert bits(each) == bits(model()) | {"short": trained}


def test_a_model_that_is_gone_takes_along_what_was_known_of_it():
    net = model()
    patch_of(net, ["wide"], 0).apply(net)
    known = weakref.ref(model_tensors(net)["wide"].history())
    assert isinstance(known(), History)
    del net
    gc.collect()
    assert known() is None


# ---- models made of others, names, tied weights


def test_towers_whose_tensors_have_the_same_names_are_told_apart():
    towers = nn.ModuleDict({"text": model(1), "vision": model(2)})
    before = bits(towers)
    cats, dogs = patch_of(towers["text"], ["wide"], 0), patch_of(towers["vision"], ["wide"], 1)
    birds = patch_of(towers, ["vision.wide", "text.wide"], 2)
    for patch, strength in ((cats, 0.5), (birds, 1.0), (dogs, 2.0)):
        patch.apply(towers, strength)
    applied, moved = UnlearnPatch.active(towers), copy.deepcopy(towers)
    assert sorted(applied.base) == ["text.wide", "vision.wide"]
    applied.recognise(moved)
    assert UnlearnPatch.active(moved).digest == applied.digest
    assert sorted(UnlearnPatch.active(moved["text"]).base) == ["wide"]
    for patch in (birds, cats, dogs):  # by their own names and digests, though the file names tensors otherwise
        patch.revert(moved)
    assert bits(moved) == before


def test_a_state_dict_is_patched_by_its_own_tensors():
    net = model()
    state = net.state_dict()
    cats, dogs = patch_of(net, ["wide", "short"], 0), patch_of(net, ["short"], 1)
    cats.apply(state)
    dogs.apply(state, 0.5)
    assert bits(net) == bits(rebuilt(model().state_dict(), {0: 1.0, 1: 0.5}, [cats, dogs]))
    cats.revert(state)
    dogs.revert(state)
    assert bits(net) == bits(model()) and UnlearnPatch.active(state) is None


def tied_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()


def test_tied_weights_are_one_tensor_whatever_a_patch_calls_it():
    net, original = tied_model(), bits(tied_model())
    embedding, head = "transformer.wte.weight", "lm_head.weight"
    assert net.get_parameter(embedding) is net.get_parameter(head)
    cats, dogs = patch_of(net, [embedding], 0), patch_of(net, [head], 1)
    both = UnlearnPatch.combine([cats, dogs])
    expected = rebuilt({"w": net.lm_head.weight.detach().clone()}, {}, [])["w"]
    for edit in both.edits:
        expected = expected + next(iter(edit.directions.values())) * edit.step
    for held in (dict(net.named_parameters(remove_duplicate=False)), net):
        both.apply(held)
        assert torch.equal(net.lm_head.weight, expected)
        both.revert(held)
    both.apply(net)
    refused(dogs.apply, net, "applied already")
    assert list(UnlearnPatch.active(net).base) == [embedding]
    for part, name in ((net.lm_head, "weight"), (net.transformer, "wte.weight")):
        assert len(UnlearnPatch.active(part).edits) == 2 and list(UnlearnPatch.active(part).base) == [name]
    cats.revert(net)
    dogs.revert(net)
    assert bits(net) == original
    contrary = UnlearnPatch(cats.base | dogs.base, [Edit("x", 0.5, cats.edits[0].directions | dogs.edits[0].directions)])
    refused(contrary.apply, net, "one tensor in this model")
    along = dict.fromkeys((embedding, head), cats.edits[0].directions[embedding])
    alike = UnlearnPatch(cats.base | dogs.base, [Edit("x", 0.3, along)])
    alike.apply(net)
    assert bits(net)[head] == bits(rebuilt({embedding: cats.base[embedding]}, {0: 1.0}, [cats]))[embedding]
    alike.revert(net)
    assert bits(net) == original


def test_what_is_applied_comes_back_from_a_file_beside_weights_that_another_library_writes_and_reads(tmp_path):
    net, original = tied_model(), bits(tied_model())
    names = ["transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"]
    patches = [patch_of(net, names[: 1 + seed % 2], seed) for seed in range(3)]
    for patch in patches:
        patch.apply(net, 0.5)
    net.save_pretrained(tmp_path / "model")
    UnlearnPatch.active(net).save(tmp_path / "model.patches.safetensors")
    fresh, loading = type(net).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values()), "the library has no complaint"
    for patch in patches:
        refused(patch.revert, fresh, "something else changed it since")
    UnlearnPatch.load(tmp_path / "model.patches.safetensors").recognise(fresh)
    patches[1].adjust(fresh, 0.0)
    for patch in patches:
        patch.revert(fresh)
    assert bits(fresh) == original


# ---- recognition


def test_only_what_the_model_holds_to_the_bit_is_recognised():
    net, patches = model(), [patch_of(model(), ["wide", "short"], seed) for seed in range(2)]
    for patch in patches:
        patch.apply(net, 0.5)
    kept, copied = UnlearnPatch.active(net), copy.deepcopy(net)
    refused(patches[0].recognise, copied, "the model does not hold what the patch makes of its base")
    refused(kept.recognise, model(), "the model does not hold what the patch makes of its base")
    kept.recognise(copied)
    kept.recognise(copied)
    with torch.no_grad():
        copied.short[1, 1] += 1
    refused(kept.recognise, copied, "short: the model does not hold what the patch makes")


def test_recognising_writes_nothing_and_takes_nothing_back_that_is_known():
    net = model()
    cats, invisible = patch_of(net, ["brain"], 0), patch_of(net, ["brain"], 1, step=1e-12)
    cats.apply(net)
    invisible.apply(net)
    version = net.brain._version
    refused(cats.recognise, net, "'concept 1'.* is known to be applied")
    UnlearnPatch.active(net).recognise(net)
    assert net.brain._version == version and len(UnlearnPatch.active(net).edits) == 2


# ---- patches on top of patches


def child_of(net: nn.Module, names: list[str], seed: int) -> UnlearnPatch:
    return patch_of(net, names, seed, parents=UnlearnPatch.active(net).as_parents())


def test_a_patch_made_on_a_patched_model_knows_its_parents_and_lies_on_top_of_them(tmp_path):
    net, original = model(), bits(model())
    cats, dogs = patch_of(net, ["wide", "short"], 0), patch_of(net, ["wide"], 1)
    cats.apply(net)
    dogs.apply(net, 0.5)
    parents = bits(net)
    child = child_of(net, ["wide", "brain"], 2)
    assert {(p["concept"], p["digest"], p["strength"]) for p in child.edits[0].parents} == {
        ("concept 0", cats.edits[0].digest, 1.0),
        ("concept 1", dogs.edits[0].digest, 0.5),
    }
    child.save(tmp_path / "child")
    child = UnlearnPatch.load(tmp_path / "child")
    for base, strength in ((model(), None), (copy.deepcopy(net), 1.0)):
        if strength:
            base.load_state_dict(model().state_dict())
            cats.apply(base)
            dogs.apply(base, strength)
        refused(child.apply, base, r"made on top of .*'concept 1' \(strength 0.5\).*: apply that first")
    child.apply(net)
    assert [edit["parents"] for edit in child.describe()["edits"]] == [child.edits[0].parents]
    refused(child.apply, net, "applied already")
    for below in (cats, dogs):
        refused(below.apply, net, "applied already")
        refused(below.revert, net, "'concept 2' was made on top of this patch; revert that first")
        refused(below.adjust, net, "'concept 2' was made on top of this patch", strength=0.0)
    refused(patch_of(model(), ["wide"], 3).apply, net, "'concept 2' was applied on top of the patch's base")
    patch_of(model(), ["short"], 4).apply(net)  # where nothing is on top
    grandchild = child_of(net, ["wide"], 5)
    assert {p["concept"] for p in grandchild.edits[0].parents} == {f"concept {i}" for i in (0, 1, 2, 4)}
    patch_of(model(), ["short"], 4).revert(net)
    child.adjust(net, -2.0)
    child.revert(net)
    assert bits(net) == parents
    dogs.revert(net)
    cats.revert(net)
    assert bits(net) == original


def test_in_another_process_the_uppermost_is_known_and_by_it_what_lies_below():
    net = model()
    cats = patch_of(net, ["wide", "short"], 0)
    cats.apply(net)
    child = child_of(net, ["wide"], 1)
    child.apply(net, 0.5)
    kept, moved = UnlearnPatch.active(net), copy.deepcopy(net)
    assert {tuple(edit.directions): edit.digest for edit in kept.edits} == {
        ("wide",): child.edits[0].digest,
        ("short",): cats.edits[0].digest,
    }
    kept.recognise(moved)
    refused(cats.revert, moved, "'concept 1' was made on top of this patch")
    for each in (net, moved):
        child.revert(each)
        cats.revert(each)
        assert bits(each) == bits(model())


def test_siblings_of_an_edit_that_changes_no_bit_are_siblings_in_every_order():
    invisible, cats = (patch_of(model(), ["brain"], seed, step) for seed, step in ((0, 1e-12), (1, 0.3)))
    one, other, base = model(), model(), bits(model())
    invisible.apply(one)
    assert bits(one) == base
    refused(invisible.apply, one, "applied already")
    invisible.revert(one)
    for net, order in ((one, (invisible, cats)), (other, (cats, invisible))):
        for patch in order:
            patch.apply(net)
        assert len(list(model_tensors(net)["brain"].history().levels())) == 1
    for net in (one, other):
        invisible.revert(net)
    assert bits(one) == bits(other)


# ---- sharded


def composed_on_shards(count: int) -> list[Any]:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from slug_lightning.tensors.dtensor import shard

    dist.init_process_group("gloo")
    net = model()
    patches = [patch_of(net, list(DTYPES), seed) for seed in range(3)]
    shard(net, init_device_mesh("cpu", (count,)))
    return [{name: whole(t).clone() for name, t in net.state_dict().items()} for _ in composed(net, patches)]


def composed(net: nn.Module, patches: list[UnlearnPatch]) -> Any:
    for i in (2, 0, 1):
        patches[i].apply(net, 0.5 + i)
    yield
    net.cpu()  # which makes other parameters of what is sharded, as at the end of every fit
    patches[0].revert(net)
    patches[1].adjust(net, -1.0)
    yield
    UnlearnPatch.active(net).revert(net)
    yield


def test_patches_compose_on_a_sharded_model_as_on_a_plain_one():
    net = model()
    patches = [patch_of(net, list(DTYPES), seed) for seed in range(3)]
    expected = [bits(net) for _ in composed(net, patches)]
    for states in in_processes(2, composed_on_shards, 2):
        assert [bits(state) for state in states] == expected

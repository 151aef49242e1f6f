"""Edits on a bench: every bit comes back, and several together are what a patch of all of them makes."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slug_lightning.patches.edit import Edit, edited
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import Layer


class Failure(Exception):
    pass


# ---- one step and back

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 1.0, -3.5]


def special_layer(dtype=torch.float32):
    return Layer("l", {name: nn.Parameter(torch.tensor(SPECIAL, dtype=dtype)) for name in ("x", "y")})


def gradient_of(layer):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in layer.parameters.items()}


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_bit_comes_back_after_a_step(dtype, fail):
    layer = special_layer(dtype)
    before = {name: p.detach().clone() for name, p in layer.parameters.items()}
    addresses = [p.data_ptr() for p in layer.parameters.values()]
    gradient = gradient_of(layer)
    with pytest.raises(Failure) if fail else nullcontext(), TemporaryEdits().applied(EditStep(layer, gradient, 0.7)):
        for name, p in layer.parameters.items():
            assert bitwise_equal(p, edited(before[name], [(gradient[name], 0.7)]))
            assert not bitwise_equal(p, before[name])
        if fail:
            raise Failure
    assert all(bitwise_equal(p, before[name]) for name, p in layer.parameters.items())
    assert [p.data_ptr() for p in layer.parameters.values()] == addresses
    assert all(p.requires_grad and p.grad is None for p in layer.parameters.values())


def test_a_step_that_fails_midway_is_taken_back():
    layer = special_layer()
    before = {name: p.detach().clone() for name, p in layer.parameters.items()}
    gradient = gradient_of(layer) | {"y": torch.ones(3)}  # of another shape
    with pytest.raises(RuntimeError, match="size"), TemporaryEdits().applied(EditStep(layer, gradient, 0.7)):
        pass
    assert all(bitwise_equal(p, before[name]) for name, p in layer.parameters.items())


def test_a_step_climbs():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    with TemporaryEdits().applied(EditStep(Layer("w", {"w": weight}), {"w": torch.tensor([10.0, 20.0])}, 0.5)):
        assert weight.tolist() == [6.0, 8.0]


def test_whoever_watches_the_version_notices_step_and_return():
    layer = special_layer()
    versions = [p._version for p in layer.parameters.values()]
    with TemporaryEdits().applied(EditStep(layer, gradient_of(layer), 0.1)):
        inside = [p._version for p in layer.parameters.values()]
    after = [p._version for p in layer.parameters.values()]
    assert all(a < b < c for a, b, c in zip(versions, inside, after, strict=True))


# ---- several


@given(
    st.lists(st.floats(-2, 2).map(lambda x: round(x, 2)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.randoms(),
)
def test_steps_in_nested_contexts_make_what_a_patch_of_all_of_them_makes(steps, dtype, random):
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))
    before = weight.detach().clone()
    directions = [torch.randn(7, 5, generator=generator) for _ in steps]
    moves = [
        EditStep(Layer("l", {"model.w": weight}, prefix="model."), {"model.w": d}, s)
        for d, s in zip(directions, steps, strict=True)
    ]
    holder = nn.Module()
    holder.w = nn.Parameter(before.clone())
    edits = [Edit(str(i), s, {"w": d}) for i, (d, s) in enumerate(zip(directions, steps, strict=True))]
    UnlearnPatch({"w": before}, edits).apply(holder)
    random.shuffle(moves)
    bench = TemporaryEdits()
    cut = random.randint(0, len(moves))
    with bench.applied(*moves[:cut]):
        inside = weight.detach().clone()
        with bench.applied(*moves[cut:]):
            assert bitwise_equal(weight.detach(), holder.w.detach())
        assert bitwise_equal(weight.detach(), inside)
    assert bitwise_equal(weight.detach(), before)


def test_a_step_writes_to_no_tensor_of_another_layer():
    first, second = (Layer(name, {name: nn.Parameter(torch.ones(2))}) for name in "ab")
    bench = TemporaryEdits()
    with bench.applied(EditStep(first, {"a": torch.ones(2)}, 1.0)):
        version = first.parameters["a"]._version
        with bench.applied(EditStep(second, {"b": torch.ones(2)}, 1.0)):
            assert first.parameters["a"]._version == version
            assert second.parameters["b"].tolist() == [2.0, 2.0]


def test_a_bench_knows_nothing_of_an_earlier_base():
    layer = Layer("a", {"a": nn.Parameter(torch.ones(2))})
    bench = TemporaryEdits()
    for start in (1.0, 5.0):
        with torch.no_grad():
            layer.parameters["a"].fill_(start)
        with bench.applied(EditStep(layer, {"a": torch.ones(2)}, 1.0)):
            assert layer.parameters["a"].tolist() == [start + 1] * 2

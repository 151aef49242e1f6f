"""Importance and alignment: closed forms and how they scale."""

from __future__ import annotations

import math

import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slug_lightning.methods import norms as scores
from slug_lightning.methods.slug.statistics import LayerStatistics, layer_statistics
from slug_lightning.reports.cost import CostMeter
from slug_lightning.tensors.layers import Layer

numbers = st.floats(-100, 100, allow_nan=False, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)
vectors = st.lists(numbers, min_size=6, max_size=6).map(torch.tensor)
scales = st.floats(1e-3, 1e3)


def score_layer(layer: Layer, forget: dict[str, Tensor], retain: dict[str, Tensor]) -> LayerStatistics | None:
    return next(iter(layer_statistics([layer], forget, retain)), None)


def score(weight: Tensor, forget: Tensor, retain: Tensor) -> LayerStatistics | None:
    return score_layer(Layer("w", {"w": nn.Parameter(weight)}, "tower"), {"w": forget}, {"w": retain})


def test_the_closed_form():
    found = score(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.eye(2))
    alignment = pytest.approx(3 / (5 * math.sqrt(2)))
    assert found.row(True) == {
        "layer": "w", "tower": "tower", "importance": 2.5, "alignment": alignment, "forget_norm": 5.0, "weight_norm": 2.0,
        "retain_norm": pytest.approx(math.sqrt(2)), "on_front": True,
    }  # fmt: skip


@examples(60)
@given(weight=vectors, forget=vectors, retain=vectors)
def test_it_agrees_with_plain_arithmetic_and_alignment_stays_in_its_range(weight, forget, retain):
    found = score(weight, forget, retain)
    w, f, r = (math.sqrt(math.fsum(float(v) ** 2 for v in t)) for t in (weight, forget, retain))
    if not w or not f:
        assert found is None
        return
    assert found.importance == pytest.approx(f / w)
    assert (found.forget_norm, found.weight_norm, found.retain_norm) == pytest.approx((f, w, r))
    assert 0 <= found.alignment <= 1
    dot = math.fsum(float(a) * float(b) for a, b in zip(forget, retain, strict=True))
    assert found.alignment == pytest.approx(abs(dot) / (f * r) if r else 0.0, abs=1e-9)


@examples(40)
@given(forget=vectors, retain=vectors, by=scales)
def test_a_gradient_times_c_gives_importance_times_c_and_the_same_alignment(forget, retain, by):
    weight = torch.ones(6, dtype=torch.float64)
    forget, retain = forget.double(), retain.double()
    one, scaled = score(weight, forget, retain), score(weight, forget * by, retain)
    if one is None:
        assert scaled is None
        return
    assert scaled.importance == pytest.approx(by * one.importance)
    assert scaled.alignment == pytest.approx(one.alignment, abs=1e-9)
    kept = score(weight, forget, retain * by)
    assert kept.importance == one.importance and kept.alignment == pytest.approx(one.alignment, abs=1e-9)
    assert kept.retain_norm == pytest.approx(by * one.retain_norm)
    assert score(weight * by, forget, retain).importance == pytest.approx(one.importance / by)


@examples(40)
@given(forget=vectors, retain=vectors)
def test_the_signs_of_both_gradients_do_not_matter(forget, retain):
    weight = torch.ones(6)
    found = [score(weight, forget, retain), score(weight, forget, -retain), score(weight, -forget, retain)]
    assert len({one and str(one.row(True)) for one in found}) == 1


@examples(40)
@given(weight=vectors, forget=vectors, retain=vectors, cut=st.integers(1, 5))
def test_a_group_counts_as_one_long_vector(weight, forget, retain, cut):
    def parts(t):
        return {"a": t[:cut], "b": t[cut:]}

    group = Layer("w", {name: nn.Parameter(t) for name, t in parts(weight).items()}, "tower")
    grouped, whole = score_layer(group, parts(forget), parts(retain)), score(weight, forget, retain)
    if whole is None:
        assert grouped is None
        return
    for name in ("importance", "alignment", "forget_norm", "weight_norm", "retain_norm"):
        assert getattr(grouped, name) == pytest.approx(getattr(whole, name), abs=1e-9)


def test_a_layer_whose_forget_gradient_or_weight_is_zero_has_no_score():
    assert score(torch.ones(2), torch.zeros(2), torch.ones(2)) is None
    assert score(torch.zeros(2), torch.ones(2), torch.ones(2)) is None


def test_a_layer_that_the_retain_loss_does_not_touch_is_not_aligned():
    found = score(torch.ones(2), torch.ones(2), torch.zeros(2))
    assert found.alignment == found.retain_norm == 0


def test_parallel_gradients_are_aligned_fully_and_never_beyond():
    for seed in range(20):
        forget = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        alignment = score(torch.ones(50), forget, -3 * forget).alignment
        assert alignment <= 1 and alignment == pytest.approx(1)


def test_half_precision_weights_neither_overflow_nor_lose_digits():
    weight = torch.full((300, 300), 300.0, dtype=torch.float16)  # its sum of squares is far beyond fp16
    found = score(weight, torch.full((300, 300), 1e-30), torch.ones(300, 300))
    assert found.weight_norm == 300 * 300
    assert found.importance == pytest.approx(1e-30 / 300)
    assert found.alignment == pytest.approx(1)


# ---- in chunks


def three_tensors(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize("chunk", [1, 7, 60, 90, 91, 1000])
def test_in_chunks_it_is_what_it_is_in_one_piece(chunk, monkeypatch):
    weight, forget, retain = three_tensors(9, 10)
    monkeypatch.setattr(scores, "CHUNK", chunk)
    found = score(weight, forget, retain)
    w, f, r = (t.double().norm().item() for t in (weight, forget, retain))
    assert (found.weight_norm, found.forget_norm, found.retain_norm) == pytest.approx((w, f, r), rel=1e-12)
    cosine = torch.cosine_similarity(forget.double().flatten(), retain.double().flatten(), dim=0)
    assert found.alignment == pytest.approx(abs(cosine.item()), rel=1e-12)


def test_a_tensor_longer_than_a_chunk_counts_to_its_last_element():
    weight, last = torch.ones(scores.CHUNK + 1), torch.zeros(scores.CHUNK + 1)
    last[-1] = 3.0
    found = score(weight, last, -last)
    assert (found.forget_norm, found.retain_norm, found.alignment) == (3, 3, 1)
    assert found.weight_norm == math.sqrt(scores.CHUNK + 1)


def test_gradients_of_another_layout_than_the_weight_are_multiplied_place_by_place(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 4)
    weight, forget, retain = three_tensors(6, 5)
    turned = retain.T.contiguous().T
    assert not turned.is_contiguous()
    assert score(weight, forget, turned).row(True) == score(weight, forget, retain).row(True)


def test_what_is_widened_at_a_time_is_a_chunk_and_not_the_tensor(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 100)
    tensors = three_tensors(100, 100)
    meter = CostMeter(torch.device("cpu"), count=True)
    with meter.phase("score"):
        score(*tensors)
    assert meter.peak_bytes["score"] <= 3 * 100 * 8 + 64  # both factors and their product, in fp64

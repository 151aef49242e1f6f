"""Bytes that are counted beforehand, against closed forms, real models and whole runs."""

from __future__ import annotations

import runpy
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
from _callback import unlearn_callback
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import default_collate

from _tiny import trainer
from slug_lightning import UnlearnError
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.image_text.questions import Question, Questions, question_batch
from slug_lightning.distributed.strategy import only_differentiating
from slug_lightning.modules import EmbeddedVLM
from slug_lightning.reports.cost import LiveTensors
from slug_lightning.tensors.layers import find_layers

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from _amounts import examples, sample
from footprint import Footprint, footprint

pytestmark = pytest.mark.uncovered

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "vlm_memory.py"))
sizes = st.integers(16, 200)


@examples(8)
@given(rows=st.integers(1, 8), width=sizes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_matrix_takes_two_sums_in_fp32_and_a_gradient_of_its_own(rows, width, dtype):
    with torch.device("meta"):
        net = nn.Linear(width, width, bias=False).to(dtype)
    found = footprint(net, torch.zeros(rows, width, dtype=dtype), lambda net, x: net(x).sum(), find_layers(net))
    one, own, output = width**2 * 4, width**2 * dtype.itemsize, rows * width * dtype.itemsize
    small = 4 * output + 2000  # what is made of it, and losses
    assert output <= found.phases["validate"] <= output + 100
    # Beside the sums the batch's own gradient, then what it takes to see that a sum is finite: a copy and three masks.
    assert 2 * one + own <= found.phases["gradients"] <= 2 * one + 7 * width**2 + small
    # What is kept of the forget gradient, the base twice (to restore, and to add to) and what an edit makes on the way.
    assert one + 2 * own <= found.phases["search"] <= 2 * one + 3 * own + 2 * one + small
    assert found.peak == found.weights + max(found.phases.values())


KINDS = list(product([torch.float32, torch.bfloat16], ["sdpa", "eager"]))


@pytest.mark.parametrize(("dtype", "attention"), sample(KINDS, KINDS[:1]))
def test_an_instance_without_values_takes_as_much_as_a_real_one(dtype, attention):
    config = SCRIPT["SMALL"]
    found = []
    for device in ("cpu", "meta"):
        model = SCRIPT["make_model"](config, device, dtype).train()
        model.set_attn_implementation(attention)
        batch = default_collate(list(SCRIPT["make_questions"](config, 3, 9, dtype)))
        before = {name: p.clone() for name, p in model.named_parameters()} if device == "cpu" else {}
        layers = find_layers(model, SCRIPT["TOWER"])
        found.append(footprint(model, batch, SCRIPT["answer_loss"], layers, SCRIPT["answers"]))
        assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if before)
    real, meta = found
    assert (real.weights, real.gradient) == (meta.weights, meta.gradient)
    assert real.phases == pytest.approx(meta.phases, rel=0.01)


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_gradients_do_not():
    one, two, three = (SCRIPT["estimate"](SCRIPT["SMALL"], torch.float32, size, 9) for size in (4, 8, 12))
    assert one.gradient == two.gradient and one.weights == two.weights
    grown = [after.phases["gradients"] - before.phases["gradients"] for before, after in ((one, two), (two, three))]
    assert grown[0] > 0 and grown[1] == pytest.approx(grown[0], rel=0.01)


@pytest.mark.slow
def test_only_the_candidates_get_a_gradient():
    model = SCRIPT["make_model"](SCRIPT["SMALL"], "meta")
    batch = default_collate(list(SCRIPT["make_questions"](SCRIPT["SMALL"], 1, 9)))
    last, all_of_it = (
        footprint(model, batch, SCRIPT["answer_loss"], find_layers(model, layers))
        for layers in ("model.vision_tower.encoder.layers.4.*", SCRIPT["TOWER"])
    )
    saved = 2 * (all_of_it.gradient - last.gradient)
    # Of the layers in front of the first candidate, activations are not kept either.
    assert all_of_it.phases["gradients"] - last.phases["gradients"] >= saved > 0


@pytest.mark.slow
def test_a_run_takes_no_more_than_was_estimated_and_is_within_the_bound():
    run = SCRIPT["forget"](SCRIPT["SMALL"], batch_size=4, words=9)
    assert run["status"] == "unlearned" and "vision_tower" in run["layer"]
    assert run["whole fit"] <= 2.2 * run["candidates in fp32"] + run["bare pass"]
    assert run["whole fit"] == pytest.approx(run["estimate"], rel=0.02)
    assert SCRIPT["problems"](run, Footprint(1, 1, {"gradients": 1}), card=2) == []


@pytest.mark.slow
def test_the_shape_of_llava_1_5_7b_fits_a_card_of_24_gb_in_fp16():
    found = SCRIPT["estimate"](SCRIPT["LARGE"], torch.float16, batch_size=1, words=64)
    assert found.weights == pytest.approx(2 * 7.06e9, rel=1e-3)
    assert found.peak <= 24e9
    assert found.phases["gradients"] > 2 * found.gradient > 4 * 2.9e8 * 2


def test_what_is_wrong_is_said():
    run = {"whole fit": 11, "bound": 10, "estimate": 9}
    wrong = SCRIPT["problems"](run, Footprint(2 * 10**9, 1, {"gradients": 10**9}), card=2e9)
    assert [words for line in wrong for words in ("bound", "estimated", "card") if words in line] == [
        "bound",
        "estimated",
        "card",
    ]


def test_a_model_that_reads_values_is_refused_without_them():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x)[: x.long().max().item()]

    with torch.device("meta"):
        net = Reads(4, 4)
    with pytest.raises(UnlearnError, match="Reads needs values that it doesn't have on the meta device"):
        footprint(net, torch.ones(2, 4), lambda net, x: net(x).sum(), find_layers(net))


def test_a_model_in_two_places_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(UnlearnError, match="stands on cpu, meta"):
        footprint(net, torch.ones(2, 4), lambda net, x: net(x).sum(), find_layers(net))


@pytest.mark.parametrize("objective", ["answers", pytest.param("clip", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:You defined a `validation_step`")
def test_a_vision_language_model_needs_two_gradients_and_one_batch(objective):
    """At most 2.2 times the candidates in fp32, and what one bare pass over a batch takes: no gradient of the language model."""
    module = EmbeddedVLM(objective).eval()
    pictures = torch.randint(0, 256, (24, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    asked = [Question(i, "what is this?", name, (name,), "thing", name) for i, name in enumerate(["cat", "owl", "sun"] * 8)]
    sets = [Questions(pictures, asked[start : start + 4]) for start in range(0, 24, 4)]
    names = ("forget", "forget_val", "forget_test", "retain", "retain_val", "retain_test")
    data = UnlearnDataModule(**dict(zip(names, sets, strict=True)), batch_size=4, collate_fn=question_batch)
    candidates = {name: p for layer in find_layers(module) for name, p in layer.parameters.items()}
    batch = next(iter(data.forget_dataloader("train")))
    with LiveTensors() as bare, only_differentiating(module, candidates), ExitStack() as stack:
        for parameter in candidates.values():
            stack.callback(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)).remove)
        (module.forget_step(batch, 0) + 0 * module.retain_step(batch, 0)).backward()
    callback = unlearn_callback(
        forget_metric="loss", retain_metric="loss", retain_tolerance=10.0, max_evaluations=2, replay=False
    )
    with LiveTensors() as live:
        trainer(callback).fit(module, data)
    size = sum(p.numel() * 4 for p in candidates.values())
    whole = sum(p.numel() * 4 for p in module.model.parameters())
    assert live.peak <= 2.2 * size + bare.peak
    assert 2 * size <= live.peak and size < 0.7 * whole

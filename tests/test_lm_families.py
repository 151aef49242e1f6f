"""SLUG on the families of language models: which tensors are layers there, by which names, and what tied embeddings do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from _amounts import sample
from _callback import unlearn_callback
from _forgetting import language_model, passages, trainer
from _tiny_lm import KEPT, PREFIX, RECITED, WORDS, rows
from safetensors.torch import load_file
from torch import Tensor

from slug_lightning import UnlearnPatch
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import pad
from slug_lightning.tensors.layers import find_layers

pytestmark = pytest.mark.uncovered

MA = "memorization_accuracy"
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON: dict[str, Any] = {**SHAPE, "max_position_embeddings": 32}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
SEPARATE = ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj", "down_proj"))
FAMILIES: dict[str, tuple[str, dict[str, Any], str, Any, str]] = {
    "llama": ("Llama", GROUPED, "model.layers", SEPARATE, "model.embed_tokens"),
    "qwen2": ("Qwen2", {**COMMON, "num_key_value_heads": 2}, "model.layers", SEPARATE, "model.embed_tokens"),
    "qwen3": ("Qwen3", GROUPED, "model.layers", SEPARATE, "model.embed_tokens"),
    "gemma": ("Gemma", GROUPED, "model.layers", SEPARATE, "model.embed_tokens"),
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "transformer.h",
        (("attn", ("c_attn", "c_proj")), ("mlp", ("c_fc", "c_proj"))),
        "transformer.wte",
    ),
    "gpt_neox": (
        "GPTNeoX",
        COMMON,
        "gpt_neox.layers",
        (("attention", ("query_key_value", "dense")), ("mlp", ("dense_h_to_4h", "dense_4h_to_h"))),
        "gpt_neox.embed_in",
    ),
}
"""Class, shape, where its blocks are, the matrices of a block by sibling group, the embedding: names as transformers has them,
written down by hand."""
PARTS = {
    "tensor": lambda block, group, matrix: f"{block}.{group}.{matrix}.weight",
    "module": lambda block, group, matrix: f"{block}.{group}.{matrix}",
    "siblings": lambda block, group, matrix: f"{block}.{group}",
}


def made(family: str, tied: bool) -> Any:
    import transformers

    name, shape, *_ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=len(WORDS) + 1, tie_word_embeddings=tied, **shape, **ENDS)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@functools.cache
def trained(family: str, tied: bool) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        model = made(family, tied)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        ids = torch.stack(rows(RECITED + KEPT[:8]))
        for _ in range(60):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def reciting(family: str, tied: bool) -> Any:
    model = made(family, tied)
    model.load_state_dict(trained(family, tied))
    return model


def head_of(model: Any) -> str:
    """Its name differs between versions of transformers."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def slug(model: Any, **options: Any) -> Any:
    """A fit that makes a model forget the recited lines; gives the report."""
    callback = unlearn_callback(**{"forget_target": 0.7, "retain_tolerance": 1e6, "max_evaluations": 8, **options})
    trainer(callback, max_epochs=1).fit(language_model(model), passages(keep=KEPT[:8], pairing="random"))
    return callback.report


def accuracy(model: Any) -> float:
    ids = torch.stack(rows(RECITED))
    with torch.no_grad():
        return (model.eval()(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()


# ---- which tensors are layers


@pytest.mark.parametrize("granularity", PARTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_the_matrices_of_the_blocks_and_a_head_of_its_own(family, tied, granularity):
    _, _, blocks, groups, _ = FAMILIES[family]
    model, name = made(family, tied), PARTS[granularity]
    head = head_of(model)
    wanted: dict[str, set[str]] = {}
    for i in range(2):
        for group, matrices in groups:
            for matrix in matrices:
                wanted.setdefault(name(f"{blocks}.{i}", group, matrix), set()).add(f"{blocks}.{i}.{group}.{matrix}.weight")
    if not tied:
        wanted[{"tensor": f"{head}.weight", "module": head, "siblings": "(root)"}[granularity]] = {f"{head}.weight"}
    found = {layer.name: set(layer.parameters) for layer in find_layers(model, granularity=granularity)}
    assert found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pattern_chooses_one_kind_of_matrix_in_every_block(family):
    _, _, blocks, groups, _ = FAMILIES[family]
    model = made(family, tied=True)
    for group, matrices in groups:
        found = [layer.name for layer in find_layers(model, f"*.{group}.{matrices[-1]}.weight")]
        assert found == [f"{blocks}.{i}.{group}.{matrices[-1]}.weight" for i in range(2)]
        block = {name for layer in find_layers(model, f"{blocks}.1.{group}.*") for name in layer.parameters}
        assert block == {f"{blocks}.1.{group}.{matrix}.weight" for matrix in matrices}


# ---- what an edit does


@pytest.mark.parametrize(
    ("family", "tied"),
    sample(
        [*((family, True) for family in FAMILIES), ("llama", False), ("gpt_neox", False)],
        [("gemma", True), ("gpt2", True), ("qwen3", True), ("llama", False)],
    ),
)
def test_a_step_along_one_layer_forgets_and_plain_transformers_loads_it(family, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = reciting(family, tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert accuracy(model) >= 0.9
    report = slug(model)
    assert report.status == "unlearned" and len(report.tensors) == 1
    assert accuracy(model) == pytest.approx(report.after["forget"][MA], abs=1e-6) and accuracy(model) <= 0.7
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(report.tensors)
    model.save_pretrained(tmp_path / "model")
    report.patch.save(tmp_path / "patch.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    patched = reciting(family, tied)  # the file does by itself what the run has done
    UnlearnPatch.load(tmp_path / "patch.safetensors").apply(patched)
    for name, tensor in after.items():
        assert torch.equal(loaded.state_dict()[name], tensor) and torch.equal(patched.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", sample(["llama", "gpt2", "gpt_neox"], ["llama", "gpt_neox"]))
def test_siblings_are_edited_together(family):
    model = reciting(family, tied=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = slug(model, granularity="siblings", layers="*.mlp.*")
    _, _, blocks, groups, _ = FAMILIES[family]
    (block,) = {i for i in range(2) if report.layer == f"model.{blocks}.{i}.mlp"}
    wanted = {f"{blocks}.{block}.mlp.{matrix}.weight" for matrix in dict(groups)["mlp"]}
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == wanted
    assert report.status == "unlearned" and accuracy(model) <= 0.7


@pytest.mark.parametrize("family", sample(FAMILIES, ["llama", "gpt2", "gpt_neox"]))
def test_a_tied_embedding_that_is_named_is_edited_as_what_it_is_for_both_uses(family, tmp_path):
    """Its gradient is the sum of those of an untied twin's embedding and head; the head moves with it, and is saved once."""
    *_, embedding = FAMILIES[family]
    model, twin = reciting(family, tied=True), made(family, tied=False)
    twin.load_state_dict(trained(family, True))
    ids = torch.stack(rows(RECITED))
    twin.eval()(ids, labels=ids).loss.backward()
    wanted = twin.get_input_embeddings().weight.grad + twin.get_output_embeddings().weight.grad
    report = slug(model, layers=f"model.{embedding}.weight")
    assert report.status == "unlearned" and report.tensors == [f"{embedding}.weight"]
    (edit,) = report.patch.edits
    torch.testing.assert_close(edit.directions[f"{embedding}.weight"], wanted, rtol=1e-4, atol=1e-6)
    moved = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is moved
    torch.testing.assert_close(moved.detach(), trained(family, True)[f"{embedding}.weight"] + edit.step * wanted)
    model.save_pretrained(tmp_path)
    assert f"{head_of(model)}.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(type(model).from_pretrained(tmp_path).get_output_embeddings().weight, moved)


# ---- longer than the context


LONG = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(8)]
"""Lines of 40 words, where the models see 32."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_longer_than_the_context_is_refused_and_what_fills_it_is_not(family):
    module = language_model(made(family, tied=True))
    full, longer = (pad([torch.arange(length)]) for length in (32, 33))
    assert module.forget_step(full, 0) > 0
    for step in (module.forget_step, module.retain_step, module.validation_step):
        with pytest.raises(UnlearnError, match="^sequences: 33 tokens exceed the model's context of 32 "):
            step(longer, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_on_passages_longer_than_the_context_leaves_the_model_as_it_is(family):
    model = reciting(family, tied=True)
    data = passages(LONG, prefix=PREFIX, suffix=40 - PREFIX, unseen=None)
    with pytest.raises(UnlearnError, match="^sequences: 40 tokens exceed .* shorter prefix or suffix"):
        trainer(unlearn_callback(forget_target=0.5), max_epochs=1).fit(language_model(model), data)
    assert all(torch.equal(tensor, trained(family, True)[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_a_limit_takes_any_length():
    model = made("llama", tied=True)
    del model.config.max_position_embeddings
    assert language_model(model).forget_step(pad([torch.arange(40)]), 0) > 0


def test_the_limit_of_a_model_that_also_sees_is_that_of_its_language_part():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=made("llama", tied=False).config))
    with pytest.raises(UnlearnError, match="^sequences: 33 tokens .* of 32 "):
        language_model(model).forget_step(pad([torch.arange(33)]), 0)

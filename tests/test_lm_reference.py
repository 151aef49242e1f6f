"""What the original model says, after it has changed: from a copy, without adapters, from disk."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _processes import Ended, in_processes
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from slug_lightning.errors import UnlearnError
from slug_lightning.lm import topk
from slug_lightning.lm.losses import DPO, ICU, log_likelihood, sequence_kl
from slug_lightning.lm.models import logits_of, weights_digest
from slug_lightning.lm.reference import AdaptersOff, FrozenCopy
from slug_lightning.lm.sequences import pad
from slug_lightning.lm.topk import TopK
from slug_lightning.tensors.dtensor import shard

V = 80


def llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Far from uniform, as a trained one is.
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.4, **size, **options))


def with_adapters(model: nn.Module, **options) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", **options))


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=draw) for length in lengths]


def batch_of(seed: int = 0) -> dict:
    return {
        "forget": pad(rows(7, 7, seed=seed)),
        "pair": pad(rows(9, 4, 7, 2, seed=seed + 1)),
        "refusal": pad(rows(5, 6, seed=seed + 2)),
        "prefix": 3,
    }


def train(model: nn.Module, batch: dict, steps: int = 3) -> None:
    """On the passages' and pairs' own likelihood: away from what it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(steps):
        log_likelihood(logits_of(model, batch["pair"]), batch["pair"]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


KINDS = {
    "copy": lambda folder: (model := llama(attention_dropout=0.5), FrozenCopy(model)),
    "adapters": lambda folder: (model := with_adapters(llama(attention_dropout=0.5)), AdaptersOff(model)),
    "top-k": lambda folder: (model := llama(attention_dropout=0.5), TopK(model, folder, k=V)),
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


# ---- all of them


def test_what_the_original_says_stays_as_it_was_while_the_model_is_trained(kind, tmp_path):
    model, reference = KINDS[kind](tmp_path)
    model.train()
    batch, exact = batch_of(), 1e-6 if kind != "top-k" else 2e-3
    with torch.no_grad():
        original = copy.deepcopy(model).eval()
        p0 = {name: logits_of(original, batch[name]) for name in ("forget", "pair", "refusal")}
    if kind == "top-k":
        reference.prepare([batch])
    assert reference.kl(p0["pair"], batch["pair"]).abs().max() < 1e-6
    digest = reference.digest()
    train(model, batch)
    model.eval()
    logits = logits_of(model, batch["pair"])
    found = reference.kl(logits, batch["pair"])
    assert found.min() > 0.1
    torch.testing.assert_close(found, sequence_kl(logits, p0["pair"], batch["pair"]), rtol=exact, atol=1e-5)
    for name in ("forget", "refusal", "pair"):
        for start in (1, 3):
            expected = log_likelihood(p0[name], batch[name], start)
            torch.testing.assert_close(reference.log_likelihood(batch[name], start), expected, rtol=1e-5, atol=1e-5)
    assert reference.digest() == digest


def test_the_losses_train_with_any_reference(kind, tmp_path):
    model, reference = KINDS[kind](tmp_path)
    batch = batch_of()
    batch["pair"] = pad(rows(9, 4, seed=1))
    if kind == "top-k":
        reference.prepare([batch])
    for loss in (ICU(), DPO()):
        parts = loss(lambda sequences: logits_of(model, sequences), batch, reference)
        sum(part.sum() for part in parts.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
        model.zero_grad()


def test_the_same_original_has_the_same_digest_by_any_reference(tmp_path):
    bare = llama()
    adapted = with_adapters(copy.deepcopy(bare))
    digests = {FrozenCopy(bare).digest(), AdaptersOff(adapted).digest(), TopK(bare, tmp_path).digest()}
    assert digests == {weights_digest(bare)}
    with torch.no_grad():
        bare.lm_head.weight[0, 0] += 1e-3
    assert FrozenCopy(bare).digest() not in digests


def test_weights_that_are_not_here_are_refused(tmp_path):
    with torch.device("meta"):
        model = llama()
    for make in (FrozenCopy, lambda model: TopK(model, tmp_path)):
        with pytest.raises(UnlearnError, match=r"weight is on the meta device .* load the weights first"):
            make(model)


def parted(_: str) -> list[str]:
    dist.init_process_group("gloo")
    model = llama()
    shard(model, init_device_mesh("cpu", (1,)))
    messages = []
    for make in (FrozenCopy, lambda model: TopK(model, "")):
        with pytest.raises(UnlearnError) as caught:
            make(model)
        messages.append(str(caught.value))
    return messages


def test_a_model_that_is_sharded_already_is_refused():
    (messages,) = in_processes(1, parted, "")
    assert all("is sharded; make the reference in setup()" in message for message in messages)


# ---- the copy


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_shares_nothing_and_nobody_trains_it(tied):
    model = llama(tie_word_embeddings=tied)
    reference = FrozenCopy(model)
    kept = [*reference.model.parameters(), *reference.model.buffers()]
    theirs = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not theirs & {t.untyped_storage().data_ptr() for t in kept}
    assert not any(t.requires_grad for t in kept) and not any(m.training for m in reference.model.modules())
    assert (reference.model.lm_head.weight is reference.model.model.embed_tokens.weight) == tied
    assert all(p.requires_grad for p in model.parameters()) and model.training

    holder = nn.Module()
    holder.model, holder.reference = model, reference
    assert holder.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    numbers = sum({t.data_ptr(): t.numel() for t in kept}.values())
    assert reference.memory() == {"device": 4 * numbers, "disk": 0}


# ---- adapters


def state_of(model: nn.Module) -> list:
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modes = [(name, m.training, getattr(m, "disable_adapters", None)) for name, m in model.named_modules()]
    return [flags, modes]


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_as_before_also_after_an_error(fails, monkeypatch):
    model = with_adapters(llama())
    model.train().base_model.model.model.layers[0].eval()
    first = next(p for name, p in model.named_parameters() if "lora_A" in name)
    first.requires_grad_(False)  # peft would let it be trained again
    batch, before = batch_of(), state_of(model)
    reference = AdaptersOff(model)
    assert state_of(model) == before
    if fails:
        monkeypatch.setattr(model.base_model.model.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reference.log_likelihood(batch["forget"])
    else:
        reference.log_likelihood(batch["forget"])
    assert state_of(model) == before


def neo() -> nn.Module:
    """It holds its mask in buffers, which its backward pass needs."""
    torch.manual_seed(0)
    kinds = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=V, hidden_size=16, num_layers=2, attention_types=kinds, num_heads=2, window_size=4)
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("family", [llama, neo, gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_asking_the_original_between_forward_and_backward_changes_no_gradient(family, checkpointing):
    model = with_adapters(family(), fan_in_fan_out=family is gpt2)
    batch = batch_of()
    train(model, batch)
    plain = copy.deepcopy(model)
    with plain.disable_adapter():
        p0 = logits_of(plain.eval(), batch["pair"]).detach()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    reference, model = AdaptersOff(model), model.train()
    reference.kl(logits_of(model, batch["pair"]), batch["pair"]).sum().backward()
    sequence_kl(logits_of(plain, batch["pair"]), p0, batch["pair"]).sum().backward()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == ("lora" in name)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_a_module_that_is_trained_beside_the_adapters_is_switched_off_with_them():
    model = with_adapters(llama(), modules_to_save=["embed_tokens"])
    batch, reference = batch_of(), AdaptersOff(model)
    before, digest = reference.log_likelihood(batch["forget"]), weights_digest(model)
    train(model, batch)
    assert weights_digest(model) != digest and torch.equal(reference.log_likelihood(batch["forget"]), before)


def test_adapters_that_do_not_bring_the_original_back_are_refused():
    with pytest.raises(UnlearnError, match="LlamaForCausalLM has no adapters to disable; give a model that peft"):
        AdaptersOff(llama())
    model = with_adapters(llama())
    model.base_model.model.model.norm.weight.requires_grad_()
    with pytest.raises(UnlearnError, match=r"model\.norm\.weight is trainable but belongs to no adapter"):
        AdaptersOff(model)
    with pytest.raises(UnlearnError, match=r"bias is trainable but belongs to no adapter"):
        AdaptersOff(get_peft_model(gpt2(), LoraConfig(r=2, bias="lora_only", fan_in_fan_out=True, target_modules=["c_attn"])))
    model = with_adapters(llama())
    model.merge_adapter()
    with pytest.raises(UnlearnError, match=r"merged into the weights; call model\.unmerge_adapter"):
        AdaptersOff(model)
    prompted = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnlearnError, match="prompt_encoder"):
        AdaptersOff(prompted)


# ---- from disk


def counting(model: nn.Module) -> list:
    """Gets the token ids of each forward pass."""
    asked: list = []
    model.register_forward_pre_hook(lambda _, __, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    return asked


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_divergence_over_fewer_tokens_is_a_lower_bound_that_rises_to_that_over_all(tmp_path):
    model, batch = llama(), batch_of()
    references = [TopK(model, tmp_path, k) for k in (1, 4, 16, 64, V, 10 * V)]
    full = FrozenCopy(model)
    for reference in references:
        reference.prepare([batch])
    logits = logits_of(llama(seed=1), batch["pair"])
    bounds = torch.stack([reference.kl(logits, batch["pair"]) for reference in references])
    assert (bounds[:-2].diff(dim=0) > -1e-3).all() and (bounds[0] < 0.9 * bounds[-1]).all() and (bounds > 0).all()
    torch.testing.assert_close(bounds[-2], full.kl(logits, batch["pair"]), rtol=2e-3, atol=0)
    assert torch.equal(bounds[-1], bounds[-2])
    assert all(reference.kl(logits_of(model.eval(), batch["pair"]), batch["pair"]).max() < 1e-6 for reference in references)


@pytest.mark.parametrize("k", [1, 16, V])
def test_the_gradient_is_that_of_the_divergence_between_the_buckets(k, tmp_path):
    model, batch = llama(), {"pair": pad(rows(6))}
    reference = TopK(model, tmp_path, k)
    reference.prepare([batch])
    with torch.no_grad():
        p0 = logits_of(model.eval(), batch["pair"])[0, :-1].softmax(-1)
    logits = logits_of(llama(seed=1), batch["pair"]).detach().requires_grad_()
    (found,) = torch.autograd.grad(reference.kl(logits, batch["pair"]).sum(), logits)
    # Of the others, each is to have its share of what they have together: p · (1 - r₀ / r).
    p = logits[0, :-1].detach().softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, p0.topk(k).indices, 1).bool()
    rest0, rest = (q.masked_fill(chosen, 0).sum(1, keepdim=True) for q in (p0, p))
    expected = torch.where(chosen, p - p0, p * (1 - rest0 / rest.clamp(min=1e-30))) / 5
    torch.testing.assert_close(found[0, :-1], expected, rtol=0, atol=2**-11 / math.e)
    assert not found[0, -1].any()


def test_what_little_a_certain_model_leaves_for_the_others_is_not_rounded_away():
    certain = torch.zeros(3, V)
    certain[:, 5] = 200.0
    found = topk.bucketed(certain.requires_grad_(), torch.full((3, 1), 5))
    assert found[0].tolist() == pytest.approx([0, math.log(V - 1) - 200])
    (gradient,) = torch.autograd.grad(found[:, 1].sum(), certain)
    assert gradient[:, 0].tolist() == pytest.approx([1 / (V - 1)] * 3)


def test_a_model_that_excludes_all_other_tokens_has_a_gradient():
    scores = torch.full((1, V), -math.inf)
    scores[:, [5, 7]] = 0.0
    found = topk.bucketed(scores.requires_grad_(), torch.tensor([[5, 7]]))
    assert found[0, :2].exp().tolist() == pytest.approx([0.5, 0.5])
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), scores)
    assert gradient.isfinite().all() and gradient[0, [5, 7]].tolist() == pytest.approx([0.5, -0.5])


def test_what_the_disk_holds_is_what_is_said_and_little_beside_all_logits(tmp_path):
    model, k = llama(), 64
    batches = [{"pair": pad(rows(*[200] * 16, seed=seed)), "forget": pad(rows(*[10] * 16, seed=50 + seed))} for seed in range(8)]
    reference = TopK(model, tmp_path, k)
    assert reference.memory() == {"device": 0, "disk": 0}
    reference.prepare(iter(batches))
    (file,) = files_in(tmp_path)
    assert reference.memory() == {"device": 0, "disk": file.stat().st_size}
    numbers = 128 * 199 * (k * 6 + 8) + 128 * 9 * 4
    described = 256 * 100  # digest and length of each sequence
    assert numbers < file.stat().st_size < numbers + described
    assert 9.9e6 < file.stat().st_size < 10.1e6
    assert 500 * file.stat().st_size < 128 * 199 * 50257 * 4


def test_files_of_the_same_weights_serve_again_and_no_others(tmp_path):
    model, batch = llama(), batch_of()
    first = TopK(model, tmp_path, k=8)
    first.prepare([batch])
    logits = logits_of(llama(seed=1), batch["pair"])
    asked = counting(model)
    again = TopK(model, tmp_path, k=8)
    again.prepare([batch])
    assert not asked and torch.equal(again.kl(logits, batch["pair"]), first.kl(logits, batch["pair"]))
    assert again.memory() == first.memory()
    TopK(model, tmp_path, k=4).prepare([batch])
    assert len(asked) == 3  # pairs, passages, refusals
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-3
    asked.clear()
    TopK(changed, tmp_path, k=8).prepare([batch])
    assert len(files_in(tmp_path)) == 3


def test_only_what_is_not_known_is_asked_once_and_whatever_it_is_padded_with(tmp_path):
    model, (a, b, c) = llama().train(), rows(6, 9, 4)
    asked = counting(model)
    reference = TopK(model, tmp_path, k=8)
    reference.prepare([{"pair": pad([a, a, c])}, {"pair": pad([a, b], pad_id=3), "forget": pad([b, c])}])
    assert [len(ids) for ids in asked] == [2, 1] and model.training
    together, alone = pad([c, a, b], pad_id=7), pad([c])
    logits = logits_of(llama(seed=1), together)
    assert torch.equal(reference.kl(logits, together)[:1], reference.kl(logits[:1, :4], alone))
    reference.prepare([{"forget": alone}, {"pair": pad(rows(5, seed=9))}])
    assert len(asked) == 3 and len(files_in(tmp_path)) == 2


def test_what_was_not_prepared_is_named_with_the_remedy(tmp_path):
    model, batch = llama(), batch_of()
    reference = TopK(model, tmp_path, k=8)
    reference.prepare([batch])
    strange = pad([*rows(3, seed=7), rows(9, seed=1)[0]])
    for ask in (lambda: reference.kl(torch.zeros(2, 9, V), strange), lambda: reference.log_likelihood(strange)):
        with pytest.raises(
            UnlearnError, match=r"1 of 2 sequences were not prepared; .* pass all training batches to prepare\(\)"
        ):
            ask()
    # Of passages only the likelihood is kept.
    with pytest.raises(UnlearnError, match="with these as 'pair'"):
        reference.kl(torch.zeros(2, 7, V), batch["forget"])
    with pytest.raises(UnlearnError, match="k must be >= 1, got 0"):
        TopK(model, tmp_path, k=0)


def test_a_model_that_has_changed_is_not_asked_but_its_original_still_serves(tmp_path):
    model, batch = llama(), batch_of()
    reference = TopK(model, tmp_path, k=8)
    reference.prepare([batch])
    train(model, batch)
    reference.prepare([batch])
    with pytest.raises(UnlearnError, match=r"the model is no longer the original, .* before training"):
        reference.prepare([batch_of(seed=40)])
    assert len(files_in(tmp_path)) == 1


def truncate(content: bytearray) -> None:
    del content[-100:]


def flip(content: bytearray) -> None:
    content[-1] ^= 1


def rename(content: bytearray) -> None:
    at = content.index(b'"data"') + 20
    content[at] = ord("0") if content[at] != ord("0") else ord("1")


def empty(content: bytearray) -> None:
    content.clear()


@pytest.mark.parametrize("damage", [truncate, flip, rename, empty])
def test_what_is_damaged_or_altered_is_computed_anew(damage, tmp_path):
    model, batch = llama(), batch_of()
    first = TopK(model, tmp_path, k=8)
    first.prepare([batch])
    logits = logits_of(llama(seed=1), batch["pair"])
    expected = first.kl(logits, batch["pair"])
    (file,) = files_in(tmp_path)
    content = bytearray(file.read_bytes())
    damage(content)
    file.unlink()  # the first one has it mapped
    file.write_bytes(content)
    again = TopK(model, tmp_path, k=8)
    with pytest.warns(UserWarning, match="Ignoring cache file .*reference-.* its content is computed again"):
        again.prepare([batch])
    assert torch.equal(again.kl(logits, batch["pair"]), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopK(model, tmp_path, k=8).prepare([batch])  # the file is whole again


def test_a_folder_that_cannot_be_written_is_an_error_as_other_ranks_could_not_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TopK(llama(), tmp_path / "file" / "kept", k=8).prepare([batch_of()])


def test_files_of_another_original_under_this_one_s_name_are_not_believed(tmp_path):
    batch = batch_of()
    ours, theirs = TopK(llama(), tmp_path, k=8), TopK(llama(seed=1), tmp_path, k=8)
    theirs.prepare([batch])
    (file,) = files_in(tmp_path)
    file.rename(tmp_path / f"{ours._prefix()}-000000000000.safetensors")
    with pytest.warns(UserWarning, match="belongs to another key"):
        ours.prepare([batch])
    torch.testing.assert_close(ours.log_likelihood(batch["forget"]), FrozenCopy(ours.model).log_likelihood(batch["forget"]))


def test_memory_is_bounded_by_writing_and_what_is_written_survives_an_error(tmp_path, monkeypatch):
    model, batches = llama(), [{"pair": pad(rows(20, 20, seed=seed))} for seed in range(6)]
    monkeypatch.setattr(topk, "PENDING", 2 * 2 * 19 * (8 * 6 + 8))  # two batches
    pending = []
    write = TopK._write
    monkeypatch.setattr(TopK, "_write", lambda self, found: (pending.append(len(found)), write(self, found)))

    def failing():
        yield from batches[:5]
        raise OSError("no more")

    reference = TopK(model, tmp_path, k=8)
    with pytest.raises(OSError, match="no more"):
        reference.prepare(failing())
    assert pending == [4, 4] and len(files_in(tmp_path)) == 2
    asked = counting(model)
    again = TopK(model, tmp_path, k=8)
    again.prepare(batches)
    assert len(asked) == 2 and len(files_in(tmp_path)) == 3
    logits = torch.zeros(2, 20, V)
    full = FrozenCopy(model)
    for batch in batches:
        found, most = again.kl(logits, batch["pair"]), full.kl(logits, batch["pair"])
        assert (found <= most + 1e-3).all() and (found > 0.5 * most).all()


def test_sequences_too_short_to_predict_anything_are_kept_and_cost_nothing(tmp_path):
    model, batch = llama(), {"pair": pad(rows(1)), "forget": pad(rows(1, seed=1))}
    reference = TopK(model, tmp_path, k=8)
    reference.prepare([batch])
    assert reference.kl(torch.zeros(1, 1, V), batch["pair"]).tolist() == [0.0]
    again = TopK(model, tmp_path, k=8)
    again.prepare([batch])
    assert again.log_likelihood(batch["forget"]).tolist() == [0.0]


def test_one_copy_of_the_logits_is_held(tmp_path):
    model, batch = llama(), batch_of()
    reference = TopK(model, tmp_path, k=2)
    reference.prepare([batch])
    logits = logits_of(model, batch["pair"]).detach().requires_grad_()
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        found = reference.kl(logits, batch["pair"])
    positions = 8 + 3 + 6 + 1
    assert sum(storages.values()) < (positions + 4) * V * 4
    found.sum().backward()


def prepared(folder: str, fails: bool) -> tuple:
    dist.init_process_group("gloo")
    model = llama()
    if fails and dist.get_rank() == 0:
        model.register_forward_pre_hook(lambda *_: 1 / 0)
    asked = counting(model)
    reference = TopK(model, folder, k=8)
    reference.prepare([batch_of()])
    found = reference.kl(torch.zeros(4, 9, V), batch_of()["pair"])
    return len(asked), found.tolist(), reference.memory()["disk"], reference.digest()


def test_of_several_processes_the_first_writes_and_all_read(tmp_path):
    first, second = in_processes(2, prepared, str(tmp_path), False)
    assert (first[0], second[0]) == (3, 0) and first[1:] == second[1:]
    assert len(files_in(tmp_path)) == 1 and first[2] == files_in(tmp_path)[0].stat().st_size


def test_of_several_processes_none_waits_for_one_that_has_failed(tmp_path):
    first, second = in_processes(2, prepared, str(tmp_path), True, timeout=60)
    assert isinstance(first, Ended) and "ZeroDivisionError" in first.message
    assert isinstance(second, Ended) and "rank 0: division by zero" in second.message
    assert not files_in(tmp_path)

"""Language models that forget in a fit: losses, references, precisions, adapters, processes, and SLUG on the same module."""

from __future__ import annotations

import copy
import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from _amounts import sample
from _callback import unlearn_callback
from _forgetting import Seen, icu, language_model, measured, passages, quick, trainer, weights
from _processes import Ended, in_processes
from _tiny_lm import RECITED, UNSEEN, reciting, rows, tokenizer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import DPO, ICU, KL, NPO, GradDiff, GradientAscent, SimNPO
from slug_lightning.lm.sequences import pad
from slug_lightning.modules import CausalLMModule

pytestmark = pytest.mark.uncovered

MA, EL = "memorization_accuracy", "extraction_likelihood"
NEVER = {MA: 0.0}


def nll(model: Any) -> float:
    return float(measured(model, torch.stack(rows(RECITED)))["nll"].mean())


def forgot(module: CausalLMModule, data: Any = None, callback: dict[str, Any] | None = None, **options: Any) -> Any:
    """Fit for two epochs, of which each passage trains in both."""
    seen, data = Seen(), data or passages()
    watching = icu(**{"refine": False, "stop": NEVER, **(callback or {})})
    trainer(watching, seen, **{"max_epochs": 2, **options}).fit(module, data)
    assert all(map(math.isfinite, seen.losses))
    return watching.report


# ---- losses and references


LOSSES = [ICU(), ICU(unlikelihood=True), GradientAscent(), GradDiff(), KL(), NPO(), SimNPO(), DPO()]


@pytest.mark.parametrize("loss", sample(LOSSES, [LOSSES[0], LOSSES[4], LOSSES[7]]))
def test_every_loss_runs_under_the_callback_and_forgets(loss):
    module = language_model(loss=loss)
    report = forgot(module, callback={"output_dir": None})
    assert nll(module.model) > nll(reciting()) + 0.05
    assert report.method == type(loss).__name__
    assert (module.reference is not None) == loss.needs_reference == bool(report.cost["reference"])


def test_the_step_is_that_of_the_loss_on_the_batch():
    """One epoch of one batch is one step of the optimizer on the mean over passages of their losses."""
    module, twin = language_model(), reciting()
    data = passages(batch_size=8)
    forgot(module, data, max_epochs=1)
    original, optimizer = copy.deepcopy(twin), quick(twin.parameters())
    losses = []
    for i, row in enumerate(data.forget_passages):
        pair = data.keep_passages[data.pairs[i][0]]
        of_passage, of_pair = (twin(ids[None]).logits[0, :-1].log_softmax(-1) for ids in (row, pair))
        p0 = original(pair[None]).logits[0, :-1].log_softmax(-1).detach()
        forget = of_passage.gather(1, row[1:, None]).mean()
        learn = -of_pair.gather(1, pair[1:, None]).mean()
        losses.append(forget + 0.5 * learn + (p0.exp() * (p0 - of_pair)).sum(-1).mean())
    torch.stack(losses).mean().backward()
    optimizer.step()
    for name, tensor in module.model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=0, atol=2e-5)


def test_the_likeliest_tokens_do_as_well_as_a_copy(tmp_path):
    copied, kept = (  # Adam would make much of rounding where there is hardly a gradient
        language_model(optimizer=lambda p: torch.optim.SGD(p, lr=0.05), **options)
        for options in ({}, {"reference": "top-k", "top_k": 41, "reference_dir": str(tmp_path)})
    )
    reports = [forgot(module) for module in (copied, kept)]
    assert reports[1].cost["reference"]["disk"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert reports[0].cost["reference"]["disk"] == 0
    for name, tensor in copied.model.state_dict().items():
        torch.testing.assert_close(kept.model.state_dict()[name], tensor, rtol=0, atol=1e-4)
    assert nll(kept.model) == pytest.approx(nll(copied.model), rel=0.02)


def test_the_likeliest_tokens_need_a_folder_and_passages(tmp_path):
    with pytest.raises(UnlearnError, match="^reference_dir"):
        language_model(reference="top-k")
    data = passages(tokenizer=tokenizer())
    data.setup()
    with pytest.raises(UnlearnError, match="must know all passages"):
        trainer().fit(
            language_model(reference="top-k", reference_dir=str(tmp_path)), data.passages("forget"), data.passages("unseen")
        )


def adapted(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(reciting(), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], **options))


def test_adapters_forget_and_the_model_below_stays(tmp_path):
    model = adapted(lora_dropout=0.5)
    base = {name: tensor.clone() for name, tensor in model.named_parameters() if "lora" not in name}
    module = language_model(model, reference="adapters", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    report = forgot(module, callback={"output_dir": str(tmp_path / "run")}, max_epochs=4)
    assert report.cost["reference"] == {"device": 0, "disk": 0}
    assert nll(model) > nll(reciting()) + 0.3
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.named_parameters() if "lora" not in name)
    with model.disable_adapter():
        assert nll(model) == pytest.approx(nll(reciting()), abs=1e-6)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(reciting(), tmp_path / "run" / "model")
    assert nll(loaded) == pytest.approx(nll(model), abs=1e-6)


def test_adapters_go_on_from_a_checkpoint(tmp_path):
    """Also in a precision that changes the weights' type after the reference was made."""
    for precision in ("32-true", "bf16-true"):
        path = tmp_path / f"{precision}.ckpt"
        fit = trainer(icu(stop=NEVER), max_epochs=1, precision=precision)
        fit.fit(language_model(adapted(), reference="adapters"), passages())
        fit.save_checkpoint(path)
        callback = icu(stop=NEVER)
        trainer(callback, max_epochs=2, precision=precision).fit(
            language_model(adapted(), reference="adapters"), passages(), ckpt_path=path
        )
        assert len(callback.report.trace) == 3


def test_a_model_without_adapters_has_none_to_switch_off():
    with pytest.raises(UnlearnError, match="no adapters to disable"):
        forgot(language_model(reference="adapters"))


# ---- how it is trained


class Modes(Callback):
    """Which modes the model's modules have when it is trained."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.seen |= {module.training for module in pl_module.model.modules()}


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_acts_only_where_it_was_asked_for(dropout, tmp_path):
    model = reciting()
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    modules, modes = (
        [CausalLMModule(source, tokenizer=tokenizer(), optimizer=quick, dropout=dropout) for source in (tmp_path, reciting())],
        Modes(),
    )
    for module in modules:
        torch.manual_seed(0)
        trainer(icu(refine=False, stop=NEVER), modes, max_epochs=2, val_check_interval=2).fit(module, passages())
    assert modes.seen == {dropout}
    first, second = (module.model.state_dict() for module in modules)
    assert all(torch.equal(first[name], second[name]) for name in first) == (not dropout)


def test_gradient_checkpointing_gives_the_same_weights():
    plain, saving = language_model(dropout=True), reciting()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    thrifty = language_model(saving, dropout=True)
    calls: list[bool] = []
    hook = saving.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for module in (plain, thrifty):
        forgot(module, max_epochs=1)
    hook.remove()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(thrifty.model.state_dict()[name], tensor, rtol=0, atol=1e-6)
    steps = 3
    assert sum(calls) > 2 * steps  # forward of passages and pairs, and again on the way back


TRAINING = [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}]


@pytest.mark.parametrize("options", sample(TRAINING, TRAINING[1:3]))
def test_the_trainers_own_options_hold(options):
    module, plain = language_model(optimizer=lambda p: torch.optim.SGD(p, lr=0.05)), reciting()
    report = forgot(module, **options)
    assert nll(module.model.float()) > nll(plain)
    assert report.trace[-1]["step"] == (4 if "accumulate_grad_batches" in options else 6)
    if "gradient_clip_val" in options:
        moved = sum((a - b).square().sum() for a, b in zip(module.model.parameters(), plain.parameters(), strict=True)).sqrt()
        assert moved <= 6 * 0.1 * 0.05 * 1.01


def test_a_scheduler_acts_from_step_to_step():
    warm_up = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.25, total_iters=3)
    module = language_model(scheduler=warm_up)
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-3)  # that of `quick`

    data = passages(batch_size=4)
    trainer(icu(refine=False, stop=NEVER), Rates(), max_epochs=2).fit(module, data)
    assert rates == pytest.approx([0.5, 0.75, 1.0, 1.0])


def test_the_default_optimizer_is_that_of_the_paper():
    optimizer = CausalLMModule(reciting()).configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam) and (group["lr"], group["betas"]) == (5e-6, (0.9, 0.98))
    model = adapted()
    (group,) = CausalLMModule(model).configure_optimizers().param_groups
    assert len(group["params"]) == sum("lora" in name for name, _ in model.named_parameters())


def test_a_folder_without_a_model_or_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UnlearnError, match=f"^tokenizer: '{tmp_path}' cannot be loaded"):
        CausalLMModule(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnlearnError, match=f"^model: '{tmp_path}' cannot be loaded"):
        CausalLMModule(tmp_path)


# ---- evaluation, and SLUG


def test_validation_is_over_all_tokens_that_count():
    (found,) = trainer().validate(language_model(), passages(), verbose=False)
    data = passages(tokenizer=tokenizer())
    data.setup()
    kept = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    wanted = measured(reciting(), kept)
    assert found["perplexity"] == pytest.approx(math.exp(wanted["nll"].mean()), rel=1e-4)
    assert found[MA] == pytest.approx(float(wanted[MA].mean()), abs=1e-6)


def test_plain_sequences_give_their_mean_loss_whatever_the_padding():
    module = language_model()
    texts = [rows(RECITED)[0], rows(UNSEEN)[0][:5]]
    alone = [module.forget_step(pad([text]), 0).item() for text in texts]
    for pad_id in (0, 7):
        assert module.retain_step(pad(texts, pad_id), 0).item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    first = {name: value[:, :] for name, value in pad(texts[:1]).items()}
    ids = first["input_ids"]
    assert alone[0] == pytest.approx(float(reciting().eval()(ids, labels=ids).loss.detach()), rel=1e-5)


def test_one_searched_step_forgets_passages_by_one_tensor():
    module, before = language_model(), weights(language_model())
    callback = unlearn_callback(forget_target=0.8, retain_tolerance=5.0)
    trainer(callback).fit(module, passages())
    report = callback.report
    assert report.status == "unlearned"
    changed = [name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])]
    assert changed == [f"model.{name}" for name in report.patch.base]
    assert len(changed) == 1
    wanted = float(measured(module.model, torch.stack(rows(RECITED)))[MA].mean())
    assert report.after["forget"][MA] == pytest.approx(wanted, abs=1e-6) and wanted <= 0.8


# ---- several processes


def in_one(batch_size: int, forget: list[str], options: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor], list[float]]:
    count = int(os.environ["WORLD_SIZE"])
    callback, seen, module = icu(**options), Seen(), language_model()
    trainer(callback, seen, max_epochs=8, devices=count, strategy="ddp" if count > 1 else "auto").fit(
        module, passages(forget, batch_size=batch_size)
    )
    report = callback.report.to_dict()
    return {name: report[name] for name in ("status", "trace", "passages", "before", "after")}, weights(module), seen.losses


@pytest.mark.parametrize("forget", sample([RECITED, RECITED[:7]], [RECITED[:7]]), ids=len)
def test_two_processes_do_what_one_does(forget):
    (alone,) = in_processes(1, in_one, 4, forget, {})
    assert not isinstance(alone, Ended), alone
    report, wanted, _ = alone
    assert any(entry["trained"] not in (0, len(forget)) for entry in report["trace"])  # some rest
    for found in in_processes(2, in_one, 2, forget, {}):
        assert not isinstance(found, Ended), found
        other, tensors, losses = found
        assert all(map(math.isfinite, losses))
        assert [passage["epochs"] for passage in other["passages"]] == [passage["epochs"] for passage in report["passages"]]
        for one, both in zip(copy.deepcopy(report["trace"]), other["trace"], strict=True):
            others = one.pop("other_perplexity"), both.pop("other_perplexity")
            assert others == (None, None) or others[0] == pytest.approx(others[1], rel=1e-3)
            assert one == pytest.approx(both, rel=1e-3, abs=1e-5)
        for name, tensor in wanted.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-5)


def saved_by(folder: str, epochs: int, checkpoint: str | None) -> Any:
    callback = icu(output_dir=folder, stop=NEVER)
    trainer(callback, max_epochs=epochs, devices=2, strategy="ddp").fit(
        language_model(), passages(batch_size=2), ckpt_path=checkpoint
    )
    return callback.report.to_dict()["trace"], os.path.exists(folder + "-2")


def test_two_processes_leave_one_folder_and_go_on_from_it(tmp_path):
    whole = in_processes(2, saved_by, str(tmp_path / "whole"), 3, None)
    in_processes(2, saved_by, str(tmp_path / "part"), 2, None)
    rest = in_processes(2, saved_by, str(tmp_path / "rest"), 3, str(tmp_path / "part" / "unlearned.ckpt"))
    assert not any(isinstance(found, Ended) for found in whole + rest), (whole, rest)
    assert whole == rest == [(whole[0][0], False)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "rest", "whole"]
    ended = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "rest")]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_tied_weights_are_saved_as_transformers_has_them(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_positions=32, n_embd=8, n_layer=1, n_head=2, **ends))
    callback = icu(output_dir=str(tmp_path / "run"), forgotten=[], stop=NEVER)
    trainer(callback, max_epochs=1, limit_val_batches=0).fit(language_model(model), passages())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert [entry["other_perplexity"] for entry in callback.report.trace] == [None, None]

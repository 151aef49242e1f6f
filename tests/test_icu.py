"""ICU inside an ordinary fit: what is forgotten, what rests, when it stops, what is left on disk."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _amounts import sample
from _forgetting import Seen, icu, language_model, measured, passages, trainer, weights
from _tiny_lm import KEPT, RECITED, UNSEEN, reciting, rows
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sacrebleu import sentence_bleu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from slug_lightning.datamodules.base import split_indices
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.criteria import ProbabilityBelow
from slug_lightning.reports.passages import PassagesReport

# Lightning asks for the callbacks that have saved the checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
MA, EL = "memorization_accuracy", "extraction_likelihood"


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """One fit as users do it, with everything that it leaves; the likelihood is taken from all prefixes."""
    root = tmp_path_factory.mktemp("ordinary")
    callback, seen = icu(prefixes=99, batch_size=5, samples=3), Seen()
    saved = ModelCheckpoint(root / "ends", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    within = ModelCheckpoint(
        root / "validated", filename="{epoch}", monitor="perplexity", save_top_k=-1, save_on_train_epoch_end=False
    )
    module, logger = language_model(), TensorBoardLogger(root, name="", version="run")
    fit = trainer(callback, seen, saved, within, logger=logger, enable_checkpointing=True, log_every_n_steps=1)
    fit.fit(module, passages())
    return SimpleNamespace(root=root, folder=root / "run", report=callback.report, module=module, seen=seen, trainer=fit)


@pytest.fixture(scope="module")
def slow(ordinary):
    """What the definitions say of the model before and after."""
    sets = {"forget": torch.stack(rows(RECITED)), "unseen": torch.stack(rows(UNSEEN))}
    models = {"before": reciting(), "after": ordinary.module.model}
    return {(when, name): measured(model, texts) for when, model in models.items() for name, texts in sets.items()}


def texts_of(tokens: torch.Tensor) -> list[str]:
    return [" ".join(f"w{token}" if token < 40 else "?" for token in row) for row in tokens.tolist()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["forget", "unseen"])
def test_the_reports_numbers_are_those_of_a_plain_measurement(ordinary, slow, when, name):
    said, found = getattr(ordinary.report, when)[name], slow[when, name]
    assert said[MA] == pytest.approx(float(found[MA].mean()), abs=1e-6)
    assert said[EL] == pytest.approx(float(found[EL].mean()), abs=1e-6)
    assert said["perplexity"] == pytest.approx(math.exp(found["nll"].mean()), rel=1e-4)
    truths = RECITED if name == "forget" else UNSEEN
    pairs = zip(texts_of(found["completions"]), (" ".join(truth.split()[6:]) for truth in truths), strict=True)
    scores = [sentence_bleu(a, [b], smooth_method="none").score / 100 for a, b in pairs]
    assert said["bleu"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("when", ["before", "after"])
def test_each_passages_numbers_are_its_own(ordinary, slow, when):
    for i, passage in enumerate(ordinary.report.passages):
        assert passage["number"] == i
        for name in (MA, EL):
            assert passage[when][name] == pytest.approx(float(slow[when, "forget"][name][i]), abs=1e-6)


def test_perplexity_of_other_text_is_over_all_its_tokens(ordinary):
    others = torch.stack(rows([KEPT[i] for i in split_indices(len(KEPT), 0)["test"]]))
    for when, model in (("before", reciting()), ("after", ordinary.module.model)):
        nll = measured(model, others)["nll"].mean()
        assert getattr(ordinary.report, when)["other"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_thresholds_are_those_of_passages_that_the_model_never_saw(ordinary, slow):
    for name in (MA, EL):
        assert ordinary.report.thresholds[name] == pytest.approx(float(slow["before", "unseen"][name].mean()), abs=1e-6)
    assert ordinary.report.bounds == {"bleu": 0.01}


def test_it_forgets_and_says_so(ordinary):
    report = ordinary.report
    assert report.status == "unlearned" and report.reason == "every passage is forgotten"
    assert report.before["forget"]["bleu"] > 0.95 and report.after["forget"]["bleu"] <= 0.01
    assert report.after["other"]["perplexity"] < 2 < report.after["forget"]["perplexity"]
    assert not any(passage["remembered"] for passage in report.passages)
    assert all(passage["values"]["bleu"] <= 0.01 for passage in report.passages)
    assert ordinary.trainer.current_epoch == len(report.trace) - 1 < 20
    assert report.cost["passages trained on"] == sum(map(len, ordinary.seen.epochs))
    assert report.cost["reference"]["device"] > 0


def test_the_trace_tells_what_was_trained_on(ordinary):
    trace = ordinary.report.trace
    assert [entry["epoch"] for entry in trace] == list(range(len(ordinary.seen.epochs) + 1))
    assert [entry["trained"] for entry in trace] == [0, *map(len, ordinary.seen.epochs)]
    assert trace[0]["remembered"] == len(RECITED) and trace[-1]["remembered"] == 0
    for before, epoch in zip(trace, ordinary.seen.epochs, strict=False):
        assert before["remembered"] == len(epoch) == len(set(epoch))
    assert trace[-1][EL] == pytest.approx(ordinary.report.after["forget"][EL])
    times = [sum(i in epoch for epoch in ordinary.seen.epochs) for i in range(len(RECITED))]
    assert [passage["epochs"] for passage in ordinary.report.passages] == times


def test_the_file_holds_the_report(ordinary):
    report = ordinary.report
    assert PassagesReport.from_json(ordinary.folder / "report.json") == report == PassagesReport.from_dict(report.to_dict())
    table = report.to_text()
    assert "unlearned" in table and max(map(len, table.splitlines())) <= 100
    assert (ordinary.folder / "figures" / "forgetting.png").read_bytes()[:4] == b"\x89PNG"


def test_transformers_loads_the_model(ordinary):
    loaded = AutoModelForCausalLM.from_pretrained(ordinary.folder / "model").state_dict()
    for name, tensor in ordinary.module.model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    assert AutoTokenizer.from_pretrained(ordinary.folder / "model")("w3 w39")["input_ids"] == [3, 39]
    checkpoint = torch.load(ordinary.folder / "unlearned.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["model.lm_head.weight"], loaded["lm_head.weight"])


def test_samples_show_what_the_model_said(ordinary, slow):
    assert len(ordinary.report.samples) == 3
    for i, shown in enumerate(ordinary.report.samples):
        assert f"{shown['prompt']} {shown['truth']}" == RECITED[i]
        for when in ("before", "after"):
            assert shown[when] == texts_of(slow[when, "forget"]["completions"])[i]


def test_tensorboard_shows_losses_and_passages(ordinary):
    events = EventAccumulator(str(ordinary.folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    trace, tags = ordinary.report.trace, events.Tags()
    for name in ("remembered", "trained", MA, EL, "bleu", "perplexity"):
        points = [(point.step, point.value) for point in events.Scalars(f"passages/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in trace]
    for name in ("total", "forget", "learn", "keep"):
        assert len(events.Scalars(f"loss/{name}_step")) == trace[-1]["step"]
        assert len(events.Scalars(f"loss/{name}_epoch")) == len(trace) - 1
    losses = [point.value for point in events.Scalars("loss/total_step")]
    assert losses == pytest.approx(ordinary.seen.losses, rel=1e-5)
    assert events.Scalars(f"before/forget_{MA}")[0].value == pytest.approx(ordinary.report.before["forget"][MA])
    assert "unlearn/forgetting" in tags["images"]
    (table,) = events.Tensors("unlearn/completions/text_summary")
    (text,) = table.tensor_proto.string_val
    assert text.decode().count("\n") == 4 and ordinary.report.samples[2]["after"] in text.decode()


# ---- a run that goes on


def again(ordinary, checkpoint, **options) -> tuple[Any, Any, Seen]:
    callback = icu(**{"prefixes": 99, "batch_size": 5, "samples": 3, **options.pop("callback", {})})
    seen, module, data = Seen(), options.pop("module", None) or language_model(), options.pop("data", None) or passages()
    trainer(callback, seen, **options).fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return callback.report, module, seen


@pytest.mark.parametrize(("place", "epoch"), sample(product(["ends", "validated"], [1, 4]), [("ends", 4), ("validated", 1)]))
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(ordinary, place, epoch):
    report, module, seen = again(ordinary, ordinary.root / place / f"epoch={epoch}.ckpt")
    assert report.trace == ordinary.report.trace
    assert report.passages == ordinary.report.passages
    assert (report.status, report.thresholds) == (ordinary.report.status, ordinary.report.thresholds)
    assert report.before == ordinary.report.before and report.after == ordinary.report.after
    assert [sorted(e) for e in seen.epochs if e] == [sorted(e) for e in ordinary.seen.epochs[epoch + 1 :]]
    wanted = weights(ordinary.module)
    for name, tensor in weights(module).items():
        assert torch.equal(tensor, wanted[name]), name
    original = weights(language_model())
    for name, tensor in module.reference.model.state_dict().items():
        assert torch.equal(tensor, original[f"model.{name}"]), name


def test_a_run_that_is_done_stays_done(ordinary):
    report, module, seen = again(ordinary, ordinary.folder / "unlearned.ckpt", max_epochs=30)
    assert seen.losses == []
    assert report.trace == ordinary.report.trace and report.status == "unlearned"
    wanted = weights(ordinary.module)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(module).items())


def test_a_run_whose_epochs_have_ended_goes_on_with_more_of_them(tmp_path):
    trainer(icu(output_dir=str(tmp_path / "run")), max_epochs=1).fit(language_model(), passages())
    callback, last = icu(), tmp_path / "run" / "unlearned.ckpt"
    trainer(callback, max_epochs=2).fit(language_model(), passages(), ckpt_path=last, weights_only=True)
    assert [entry["epoch"] for entry in callback.report.trace] == [0, 1, 2]
    assert callback.report.reason.startswith("the training ended after 2 epochs")


def test_other_passages_cannot_go_on(ordinary):
    with pytest.raises(UnlearnError, match="other passages"):
        again(ordinary, ordinary.root / "ends" / "epoch=1.ckpt", data=passages(RECITED[::-1]))


def test_another_original_cannot_go_on(ordinary):
    with pytest.raises(UnlearnError, match="began from another model"):
        again(ordinary, ordinary.root / "ends" / "epoch=1.ckpt", module=language_model(ordinary.module.model))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_within_an_epoch_goes_on_with_that_epoch(tmp_path):
    within = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(icu(), within, max_epochs=1, enable_checkpointing=True).fit(language_model(), passages())
    model = reciting()
    model.config.attention_dropout = 0.5
    callback, seen = icu(), Dropping()
    trainer(callback, seen, max_epochs=2).fit(language_model(model), passages(), ckpt_path=tmp_path / "step=2.ckpt")
    assert [(entry["epoch"], entry["step"]) for entry in callback.report.trace] == [(0, 0), (1, 3), (2, 6)]
    assert [passage["epochs"] for passage in callback.report.passages] == [2] * len(RECITED)
    assert seen.training == {False}


class Dropping(Callback):
    """Which modes the model has in training."""

    def __init__(self) -> None:
        self.training: set[bool] = set()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.training |= {module.training for module in pl_module.model.modules()}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"stop": {MA: 0.1}}, "stop"),
        ({"forgotten": [ProbabilityBelow(0.1)]}, "forgotten"),
        ({"n": 4}, "n"),
        ({"prefixes": 1}, "prefixes"),
        ({"refine": False}, "refine"),
    ],
)
def test_other_bounds_cannot_go_on(ordinary, changed, name):
    with pytest.raises(UnlearnError, match=f"^{name} differ from the checkpoint's run"):
        again(ordinary, ordinary.root / "ends" / "epoch=1.ckpt", callback=changed)

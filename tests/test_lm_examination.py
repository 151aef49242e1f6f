"""What a model makes of passages: shared out among processes, in the trainer's precision, and as a mean."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from _forgetting import N, language_model, measured, passages, trainer
from _processes import Ended, in_processes
from _tiny_lm import KEPT, PREFIX, RECITED, UNSEEN, reciting, rows
from lightning.pytorch.callbacks import Callback

from slug_lightning.distributed.strategy import Runner
from slug_lightning.lm.criteria import BleuBelow, MemorizationBelow, ProbabilityBelow
from slug_lightning.lm.sequences import pad
from slug_lightning.methods.icu.examination import MEANS, Examiner, means_of
from slug_lightning.utils.progress import Progress

pytestmark = pytest.mark.uncovered

MA, EL = "memorization_accuracy", "extraction_likelihood"


class Examining(Callback):
    """Examines when a fit would begin, and ends it."""

    def __init__(self, texts: list[torch.Tensor], prefixes: int | None = None, batch_size: int = 3) -> None:
        self.texts, self.prefixes, self.batch_size = texts, prefixes, batch_size
        self.found: list[dict[str, Any]] = []
        self.perplexity = math.nan

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        criteria = [BleuBelow(), MemorizationBelow(), ProbabilityBelow()]
        examiner = Examiner(
            pl_module, Runner(trainer.strategy, trainer.state), PREFIX, criteria, N, self.batch_size, Progress(None)
        )
        before = [module.training for module in pl_module.modules()]
        self.found = examiner.of(self.texts, self.prefixes)
        self.perplexity = examiner.perplexity([pad(rows(KEPT[:5])), pad([rows(KEPT)[5][:7], rows(KEPT)[6]])])
        assert before == [module.training for module in pl_module.modules()]
        trainer.should_stop = True


def examined(texts: list[torch.Tensor], prefixes: int | None = None, batch_size: int = 3, **options: Any) -> Examining:
    callback = Examining(texts, prefixes, batch_size)
    trainer(callback, **options).fit(language_model(), passages())
    return callback


def test_each_passage_gets_what_a_plain_measurement_says():
    callback = examined(rows(RECITED + UNSEEN[:3]))
    wanted = measured(reciting(), torch.stack(rows(RECITED + UNSEEN[:3])))
    for i, found in enumerate(callback.found):
        assert found[MA] == found["values"][MA] == pytest.approx(float(wanted[MA][i]), abs=1e-6)
        assert found[EL] == pytest.approx(float(wanted[EL][i]), abs=1e-6)
        assert found["nll"] == pytest.approx(float(wanted["nll"][i]), abs=1e-4)
        assert found["values"]["probability"] == pytest.approx(math.exp(-found["nll"]))
        assert found["values"]["bleu"] == found["bleu"]
        assert found["completion"] == " ".join(f"w{token}" for token in wanted["completions"][i].tolist())
        assert f"{found['prefix']} {found['truth']}" == (RECITED + UNSEEN)[i]
    assert callback.found[0]["bleu"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_how_many_at_once_makes_no_difference(batch_size):
    one, other = examined(rows(RECITED[:5])), examined(rows(RECITED[:5]), batch_size=batch_size)
    for a, b in zip(one.found, other.found, strict=True):
        assert a["completion"] == b["completion"] and a[EL] == b[EL]
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-5)


def test_one_prefix_is_the_one_that_is_completed():
    texts = [f"{text.rsplit(' ', 4)[0]} {other.split(' ', 10)[10]}" for text, other in zip(RECITED, UNSEEN, strict=False)]
    for found in examined(rows(texts), prefixes=1).found:
        said, truth = (found[name].split() for name in ("completion", "truth"))
        grams, there = ([tokens[i : i + N] for i in range(len(tokens) - N + 1)] for tokens in (said, truth))
        assert found[EL] == pytest.approx(sum(gram in there for gram in grams) / len(grams), abs=1e-6)
        assert found[EL] < 1


def test_perplexity_counts_every_token_once():
    texts = [*rows(KEPT[:5]), rows(KEPT)[5][:7], rows(KEPT)[6]]
    nll = [(measured(reciting(), text[None])["nll"] * (len(text) - 1)).item() for text in texts]
    assert examined(rows(RECITED[:1])).perplexity == pytest.approx(math.exp(sum(nll) / sum(len(t) - 1 for t in texts)), rel=1e-5)


def test_precision_is_the_trainers():
    found = examined(rows(RECITED), precision="bf16-mixed").found
    exact = examined(rows(RECITED)).found
    differences = [abs(a["nll"] - b["nll"]) for a, b in zip(found, exact, strict=True)]
    assert 0 < max(differences) < 0.05


def in_share(count_of_texts: int) -> Any:
    count = int(os.environ["WORLD_SIZE"])
    callback = examined(rows(RECITED[:count_of_texts]), devices=count, strategy="ddp" if count > 1 else "auto")
    return callback.found, callback.perplexity


@pytest.mark.parametrize("texts", [1, 5])
def test_two_processes_find_what_one_does(texts):
    """Also where one of them has nothing to look at."""
    alone = examined(rows(RECITED[:texts]))
    for result in in_processes(2, in_share, texts):
        assert not isinstance(result, Ended), result
        found, perplexity = result
        assert perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert [f["completion"] for f in found] == [f["completion"] for f in alone.found]
        for mine, other in zip(found, alone.found, strict=True):
            assert mine["nll"] == pytest.approx(other["nll"], abs=1e-5) and mine[EL] == pytest.approx(other[EL])


@pytest.mark.parametrize("nll", [0.0, 3.0, 750.0, 1e300])
def test_a_mean_perplexity_may_be_infinite_but_is_no_error(nll):
    one = dict.fromkeys(MEANS, 0.5) | {"nll": nll, "values": {"probability": 0.25}}
    expected = math.exp(nll) if nll < 700 else math.inf
    assert means_of([one, one]) == dict.fromkeys(MEANS, 0.5) | {"probability": 0.25, "perplexity": expected}

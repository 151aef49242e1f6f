"""Which passages rest, which come back, and that the training never runs empty: scripted, inside a fit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from _amounts import sample
from _forgetting import Scripted, Seen, icu, language_model, passages, trainer, weights
from _tiny_lm import RECITED
from hypothesis import given, settings
from hypothesis import strategies as st

from slug_lightning.lm.criteria import BleuBelow, ExtractionBelow, MemorizationBelow, ProbabilityBelow
from slug_lightning.lm.losses import GradientAscent
from slug_lightning.methods.icu.examination import Refinement

pytestmark = pytest.mark.uncovered

MA, EL = "memorization_accuracy", "extraction_likelihood"
NEVER = {MA: 0.0}
"""A bound that this model does not reach in so few epochs."""
ALL = set(range(len(RECITED)))


def scripted(*script: set[int], **options: Any) -> tuple[Any, Seen, Any]:
    """Fit with passages that are forgotten as the script says; one entry before the first epoch and after each."""
    seen, module = Seen(), language_model(loss=GradientAscent())
    callback = icu(forgotten=[Scripted(script=list(script))], stop=NEVER, **options)
    trainer(callback, seen, max_epochs=len(script) - 1).fit(module, passages(unseen=None, batch_size=2))
    return callback.report, seen, module


@pytest.fixture(scope="module")
def run():
    return scripted(set(), {0, 3, 7}, {0, 7}, ALL - {0}, {0, 1})


def test_a_resting_passage_is_in_no_batch_and_comes_back_when_remembered(run):
    report, seen, _ = run
    assert [sorted(epoch) for epoch in seen.epochs] == [list(ALL), [1, 2, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0]]
    assert [entry["remembered"] for entry in report.trace] == [8, 5, 6, 1, 6]
    assert report.status == "unfinished" and "4 epochs" in report.reason


def test_the_report_counts_epochs_and_returns(run):
    passages_ = run[0].passages
    assert [passage["epochs"] for passage in passages_] == [2, 3, 3, 2, 3, 3, 3, 1]
    assert [passage["returns"] for passage in passages_] == [1, 0, 1, 2, 1, 1, 1, 1]
    assert [passage["remembered"] for passage in passages_] == [False, False, *[True] * 6]


def test_no_batch_is_empty_and_no_loss_undefined(run):
    _, seen, _ = run
    assert seen.sizes == [2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 1]
    assert all(map(math.isfinite, seen.losses)) and len(seen.losses) == len(seen.sizes)


def test_only_passages_that_train_move_the_weights():
    """An epoch of two passages is the epoch of a module that has only these two."""
    _, seen, module = scripted(ALL - {2, 5}, ALL - {2, 5})
    assert [sorted(epoch) for epoch in seen.epochs] == [[2, 5]]
    other = language_model(loss=GradientAscent())
    alone = icu(forgotten=[], stop=NEVER)
    trainer(alone, max_epochs=1).fit(other, passages([RECITED[2], RECITED[5]], unseen=None, batch_size=2))
    wanted = weights(other)
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_it_stops_when_all_rest():
    report, seen, _ = scripted(set(), ALL, set(), set())
    assert len(seen.epochs) == 1
    assert (report.status, report.reason) == ("unlearned", "every passage is forgotten")


def test_nothing_is_trained_where_nothing_is_recited():
    report, seen, module = scripted(ALL, ALL)
    before = weights(language_model())
    assert seen.losses == [] and report.status == "unlearned" and len(report.trace) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(module).items())
    assert report.cost["ratio of validation to training"] is None and "unlearned" in report.to_text()


def test_without_refinement_all_train_to_the_end():
    report, seen, _ = scripted(set(), {0, 1}, ALL, ALL, refine=False)
    assert [sorted(epoch) for epoch in seen.epochs] == [list(ALL)] * 3
    assert [entry["remembered"] for entry in report.trace] == [8, 6, 0, 0]
    assert report.status == "unfinished"


@pytest.mark.parametrize("refine", [True, False])
def test_the_mean_stops_it_whatever_is_remembered(refine):
    callback = icu(forgotten=[Scripted(script=[set()])], stop={MA: 0.9, EL: 0.95}, refine=refine)
    trainer(callback).fit(language_model(), passages(unseen=None))
    report = callback.report
    assert report.status == "unlearned" and "thresholds" in report.reason
    reached = [entry[MA] <= 0.9 and entry[EL] <= 0.95 for entry in report.trace]
    assert reached == [False] * (len(reached) - 1) + [True]
    assert report.decided == [MA, EL] and report.trace[-1]["remembered"] == 8


CRITERIA = [MemorizationBelow(0.5), ExtractionBelow(0.1), ProbabilityBelow(0.2), BleuBelow(0.2), MemorizationBelow()]


@pytest.mark.parametrize("criterion", sample(CRITERIA, CRITERIA[2:]))
def test_every_criterion_decides_by_its_own_value(criterion):
    callback = icu(
        forgotten=[criterion], stop={"bleu": 0.0} if criterion.name == "bleu" else NEVER | {criterion.name: 0.0}, prefixes=99
    )
    seen = Seen()
    trainer(callback, seen, max_epochs=6).fit(language_model(), passages())
    report, bound = callback.report, criterion.below
    if bound == "unseen":
        bound = report.before["unseen"][criterion.name]
    for passage in report.passages:
        assert passage["remembered"] == (passage["values"][criterion.name] > bound)
    assert report.trace[0]["remembered"] == 8 > report.trace[-1]["remembered"] or bound < 0.05


def test_one_criterion_is_enough_to_rest():
    strict, lax = Scripted(script=[set()]), Scripted(script=[set(), {1, 2}])
    lax.name = "another"
    callback = icu(forgotten=[strict, lax], stop=NEVER)
    seen = Seen()
    trainer(callback, seen, max_epochs=2).fit(language_model(), passages(unseen=None))
    assert sorted(seen.epochs[1]) == [0, 3, 4, 5, 6, 7]
    assert set(callback.report.passages[0]["values"]) == {"scripted", "another"}


def test_without_a_criterion_all_train_until_the_mean_stops_it():
    callback, seen = icu(forgotten=[], stop={MA: 0.9}), Seen()
    trainer(callback, seen).fit(language_model(), passages(unseen=None))
    assert callback.report.status == "unlearned"
    assert all(sorted(epoch) == list(ALL) for epoch in seen.epochs)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=8), st.booleans())
def test_the_status_is_what_was_said_last(said, rests):
    refinement = Refinement(3, rests)
    epochs = [0, 0, 0]
    for forgotten in said:
        for i in refinement.active:
            epochs[i] += 1
        refinement.trained()
        refinement.update(forgotten)
    last = said[-1] if said else [False] * 3
    assert refinement.remembered == [i for i in range(3) if not last[i]]
    assert refinement.active == (refinement.remembered if rests else [0, 1, 2])
    assert [passage.epochs for passage in refinement.passages] == epochs
    returns = [sum(a[i] and not b[i] for a, b in pairwise(said)) for i in range(3)]
    assert [passage.returns for passage in refinement.passages] == returns
    other = Refinement(3, rests)
    other.restore(refinement.to_list())
    assert other.passages == refinement.passages

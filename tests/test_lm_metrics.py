"""Shares of tokens and n-grams against plain counting, and the same from several processes as from one."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.metrics import (
    MemorizationAccuracy,
    Perplexity,
    bleu,
    extraction_likelihood,
    memorization_accuracy,
    ngram_diversity,
)
from slug_lightning.lm.sequences import pad

tokens = st.lists(st.integers(0, 3), min_size=2, max_size=9)


def grams(row: list[int], n: int) -> list[list[int]]:
    return [row[i : i + n] for i in range(len(row) - n + 1)]


@given(st.lists(tokens, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_memorization_accuracy_counts_the_hits_of_each_sequence(rows, random):
    longest = max(map(len, rows))
    said = [[random.randrange(4) for _ in range(longest - 1)] for _ in rows]
    expected = [sum(a == b for a, b in zip(s, row[1:], strict=False)) / (len(row) - 1) for s, row in zip(said, rows, strict=True)]
    values = memorization_accuracy(torch.tensor(said), pad([torch.tensor(row) for row in rows], pad_id=2))
    assert torch.equal(values, torch.tensor(expected))


@given(tokens, st.integers(1, 3), st.data())
def test_extraction_likelihood_is_the_mean_overlap_with_the_rest(row, n, data):
    if len(row) <= n:
        return
    said = [data.draw(st.lists(st.integers(0, 3), max_size=len(row) - t)) for t in range(1, len(row) - n + 1)]
    shares = []
    for t, one in enumerate(said, start=1):
        found = [gram in grams(row[t:], n) for gram in grams(one, n)]
        shares.append(sum(found) / len(found) if found else 0.0)
    given_ = [torch.tensor(one, dtype=torch.long) for one in said]
    sequences = pad([torch.tensor(row)])
    assert extraction_likelihood([given_], sequences, n).item() == torch.tensor(sum(shares) / len(shares)).item()
    some = data.draw(st.lists(st.integers(1, len(said)), min_size=1))
    estimate = extraction_likelihood([[given_[t - 1] for t in some]], sequences, n, [some]).item()
    assert estimate == pytest.approx(sum(shares[t - 1] for t in some) / len(some))


def test_extraction_likelihood_is_1_for_a_recital_and_looks_at_the_rest_only():
    row = torch.tensor([7, 8, 7, 8, 9])
    recital = [row[t:] for t in (1, 2, 3)]
    assert extraction_likelihood([recital], pad([row]), 2).item() == 1
    # After [7, 8], the pair (8, 7) is in the text, but no longer to come.
    assert extraction_likelihood([[torch.tensor([8, 7])]], pad([row]), 2, [[2]]).item() == 0


@given(tokens, st.integers(1, 4))
def test_diversity_counts_different_n_grams(row, n):
    found = [tuple(gram) for gram in grams(row, n)]
    expected = torch.tensor(len(set(found)) / len(found) if found else 0.0)
    assert torch.equal(ngram_diversity([torch.tensor(row)], n), expected[None])


def test_bleu_is_that_of_sacrebleu_and_tells_what_is_recited_from_what_is_not():
    from sacrebleu import sentence_bleu

    truth = "It was a bright cold day in April, and the clocks were striking thirteen."
    near = "It was a bright cold day in May, and the clocks were silent."
    far = "The day after that, it was in a cold April that nobody had a clock."
    values = bleu([truth, near, far, "", "cold", truth], [truth, truth, truth, truth, "cold", ""])
    assert values.tolist()[0] == values.tolist()[4] == 1
    plain = sentence_bleu(near, [truth], smooth_method="none", use_effective_order=True).score / 100
    assert values[1].item() == pytest.approx(plain) and 0.3 < plain < 0.7
    assert values.tolist()[2:4] == [0, 0] and values[5] == 0


def test_without_sacrebleu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UnlearnError, match=r'sacrebleu.* pip install "slug-lightning\[lm\]"'):
        bleu(["a"], ["a"])


# ---- as torchmetrics


def updates() -> list[tuple]:
    """Of each metric: how it is made, what it is updated with, the value over all texts."""
    rows = [torch.tensor([1, 2, 1, 2, 1]), torch.tensor([3, 4, 5]), torch.tensor([1, 1, 1, 1])]
    said = torch.tensor([[2, 1, 2, 1], [4, 0, 0, 0], [0, 1, 0, 0]])
    logits = [torch.randn(1, len(row), 6, generator=torch.Generator().manual_seed(i)) for i, row in enumerate(rows)]
    nll = [cross_entropy(given[0, :-1], row[1:], reduction="sum").item() for given, row in zip(logits, rows, strict=True)]
    predicted = [said[i : i + 1, : len(row) - 1] for i, row in enumerate(rows)]
    return [
        (MemorizationAccuracy, [(*call, pad([row])) for *call, row in zip(predicted, rows, strict=True)], (1 + 0.5 + 1 / 3) / 3),
        (Perplexity, [(*call, pad([row])) for *call, row in zip(logits, rows, strict=True)], math.exp(sum(nll) / 9)),
    ]


def in_one(process: int, processes: int) -> list[float]:
    """What each metric gives where every process takes in texts of its own."""
    values = []
    for make, calls, _ in updates():
        metric = make()
        for call in calls[process::processes]:
            metric.update(*call)
        values.append(metric.compute().item())
    return values


def of_two() -> list[float]:
    dist.init_process_group("gloo")
    try:
        return in_one(dist.get_rank(), 2)
    finally:
        dist.destroy_process_group()


def test_two_processes_with_different_numbers_of_texts_give_what_one_gives():
    alone = in_one(0, 1)
    assert alone == [pytest.approx(value) for _, _, value in updates()]
    for found in in_processes(2, of_two):
        assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("number", range(2))
def test_a_metric_starts_anew_after_reset_and_says_what_it_is(number):
    make, calls, _ = updates()[number]
    metric = make()
    metric.update(*calls[0])
    first = metric.compute().item()
    metric.update(*calls[2])
    metric.reset()
    assert metric(*calls[0]).item() == first
    assert metric.higher_is_better == (make is MemorizationAccuracy) and metric.is_differentiable is False


def test_perplexity_is_that_of_torchmetrics_where_no_probability_underflows_and_finite_where_one_does():
    sequences = pad([torch.tensor([3, 1, 2]), torch.tensor([4, 0])], pad_id=5)
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity(ignore_index=-100)
    ours.update(logits, sequences)
    theirs.update(logits[:, :-1], sequences["input_ids"][:, 1:].where(sequences["attention_mask"][:, 1:] == 1, -100))
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)
    logits[0, 0, 1] -= 200
    ours.reset()
    ours.update(logits, sequences)
    assert ours.compute().isfinite()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: memorization_accuracy(torch.zeros(1, 0), pad([torch.tensor([1])])), "sequences: one has fewer than 2 tokens"),
    (lambda: extraction_likelihood([[]], pad([torch.arange(10)])), "n must be < .* got n=10 for one of 10"),
    (lambda: extraction_likelihood([[torch.arange(3)]], pad([torch.arange(4)]), 2), "completions: got 1 .* n=2 needs 2"),
])  # fmt: skip
def test_what_has_no_value_is_refused(call, message):
    with pytest.raises(UnlearnError, match=message):
        call()

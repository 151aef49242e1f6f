"""Shares of tokens and n-grams against plain counting, and the same from several processes as from one."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import Perplexity

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.metrics import (
    Bleu,
    ExtractionLikelihood,
    MemorizationAccuracy,
    NgramDiversity,
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
    """Of each metric: how it is made, what it is updated with, the value of each text."""
    rows = [torch.tensor([1, 2, 1, 2, 1]), torch.tensor([3, 4, 5]), torch.tensor([1, 1, 1, 1])]
    said = torch.tensor([[2, 1, 2, 1], [4, 0, 0, 0], [0, 1, 0, 0]])
    ends = [[row[t:] for t in range(1, len(row) - 1)] for row in rows[:2]] + [[torch.tensor([1, 2]), torch.tensor([1, 1])]]
    texts, truths = ["a b c d", "e f g h i", "x"], ["a b c d", "e f g h k", "y"]
    return [
        (MemorizationAccuracy, [(said[i : i + 1, : len(row) - 1], pad([row])) for i, row in enumerate(rows)], [1, 0.5, 1 / 3]),
        (lambda: ExtractionLikelihood(n=2), [([ends[i]], pad([row])) for i, row in enumerate(rows)], [1, 1, 0.5]),
        (lambda: NgramDiversity(n=2), [([row],) for row in rows], [0.5, 1, 1 / 3]),
        (Bleu, [([text], [truth]) for text, truth in zip(texts, truths, strict=True)], None),
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
    assert alone[:3] == [pytest.approx(sum(values) / 3) for _, _, values in updates()[:3]]
    for found in in_processes(2, of_two):
        assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_a_metric_starts_anew_after_reset_and_says_what_it_is(number):
    make, calls, _ = updates()[number]
    metric = make()
    metric.update(*calls[0])
    first = metric.compute().item()
    metric.update(*calls[2])
    metric.reset()
    assert metric(*calls[0]).item() == first
    assert metric.higher_is_better and metric.is_differentiable is False


def test_perplexity_of_torchmetrics_leaves_out_what_does_not_count():
    metric = Perplexity(ignore_index=-100)
    metric.update(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]))
    assert metric.compute().item() == pytest.approx(8)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: memorization_accuracy(torch.zeros(1, 0), pad([torch.tensor([1])])), "sequences: one has fewer than 2 tokens"),
    (lambda: extraction_likelihood([[]], pad([torch.arange(10)])), "n: a sequence of 10 tokens leaves no 10 of them"),
    (lambda: extraction_likelihood([[torch.arange(3)]], pad([torch.arange(4)]), 2), "completions: 1 of a sequence.*give 2"),
    (lambda: ExtractionLikelihood(n=0), "n: 0 tokens are no n-gram"),
    (lambda: NgramDiversity(n=-1), "n: -1 tokens are no n-gram"),
])  # fmt: skip
def test_what_has_no_value_is_refused(call, message):
    with pytest.raises(UnlearnError, match=message):
        call()

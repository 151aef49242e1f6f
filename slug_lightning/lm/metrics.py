"""Measure how much a language model recites and how it writes, per text, and as torchmetrics where a module logs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import log_likelihood
from slug_lightning.lm.sequences import Sequences, counted, targets
from slug_lightning.utils.optional_imports import import_optional


def memorization_accuracy(predictions: Tensor, sequences: Sequences) -> Tensor:
    """Share of tokens that are predicted correctly from the true ones before them (Tirumala et al. 2022, arXiv 2205.10770).

    From predicted ids, `[B, T-1]`, of sequences `[B, T]`; gives `[B]`, fp32, on the device of the predictions.
    """
    ids, counts = (part.to(predictions.device) for part in targets(sequences))
    if not counts.any(1).all():
        raise UnlearnError("sequences: one has fewer than 2 tokens, so nothing is predicted; leave it out")
    # fp32 whatever the default dtype, which is bf16 within a step of 'bf16-true'.
    return ((predictions == ids) & counts).sum(1).float() / counts.sum(1)


def extraction_likelihood(
    completions: Sequence[Sequence[Tensor]], sequences: Sequences, n: int = 10, lengths: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Measure how much of the rest of a text the model produces from its prefixes (EL_n of Jang et al. 2023, arXiv 2210.01504).

    For every prefix that leaves at least n tokens: the share of the completion's n-grams that occur in the true rest, 0 for a
    completion shorter than n. Then the mean over prefixes: `[B]`, fp32, on the CPU.

    Args:
        completions: of each sequence the completions of its prefixes of 1, 2, …, T-n tokens, or of those in `lengths`, as from
            `slug_lightning.lm.completion.complete_prefixes`.
        sequences: `[B, T]`.
        n: tokens of an n-gram.
        lengths: how many tokens the prefixes have, if these are only some of them: an estimate.
    """
    rows = counted(sequences)
    lengths = [range(1, len(row) - n + 1) for row in rows] if lengths is None else lengths
    values = []
    for said, row, starts in zip(completions, rows, lengths, strict=True):
        if not starts:
            raise UnlearnError(f"n must be < the number of tokens of each sequence, got n={n} for one of {len(row)}")
        if len(said) != len(starts):
            raise UnlearnError(f"completions: got {len(said)} for a sequence of {len(row)} tokens; n={n} needs {len(starts)}")
        # An n-gram is in the rest after t tokens if it starts there for the last time.
        latest = {gram: start for start, gram in enumerate(_ngrams(row, n))}
        shares = 0.0
        for t, tokens in zip(starts, said, strict=True):
            grams = _ngrams(tokens, n)
            shares += sum(latest.get(gram, 0) >= t for gram in grams) / max(len(grams), 1)
        values.append(shares / len(said))
    return torch.tensor(values, dtype=torch.float32)


def ngram_diversity(texts: Sequence[Tensor], n: int = 4) -> Tensor:
    """Share of different n-grams among those of each text, of ids `[T_i]` (distinct-n): low where it repeats itself.

    Gives fp32; 0 for a text that is shorter than n.
    """
    grams = [_ngrams(text, n) for text in texts]
    return torch.tensor([len(set(found)) / max(len(found), 1) for found in grams], dtype=torch.float32)


def bleu(candidates: Sequence[str], references: Sequence[str]) -> Tensor:
    """Compute sacrebleu's sentence BLEU with its default tokenizer for each pair of texts: fp32, 0 to 1; 0 where one is empty.

    Not smoothed: with smoothing, 86 % of unrelated pairs (150 characters each, from Python's help texts) get more than 0.01,
    ICU's bound for "forgotten", without it 2 %. Texts shorter than four words are judged by the n-grams that they have
    (effective order), so that a recited text gets 1 at any length.
    """
    scorer = import_optional("sacrebleu.metrics", "lm").BLEU(effective_order=True, smooth_method="none")
    scores = [scorer.sentence_score(said, [true]).score for said, true in zip(candidates, references, strict=True)]
    return torch.tensor(scores, dtype=torch.float32).div(100).clamp(max=1)  # sacrebleu gives 100.00000000000004, too


def _ngrams(tokens: Tensor, n: int) -> list[tuple[int, ...]]:
    numbers = tokens.tolist()
    return list(zip(*(numbers[i:] for i in range(n)), strict=False))


class _Mean(Metric):
    """A mean, over the texts of all processes."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return self.total / self.count


class MemorizationAccuracy(_Mean):
    """Mean of `memorization_accuracy` over sequences, from 0 to 1."""

    higher_is_better = True

    def update(self, predictions: Tensor, sequences: Sequences) -> None:
        """Take in predictions `[B, T-1]` for sequences `[B, T]`."""
        values = memorization_accuracy(predictions, sequences)
        self.total += values.sum().to(self.total.device)
        self.count += len(values)


class Perplexity(_Mean):
    """Exponential of the mean negative log-likelihood of all tokens, at least 1.

    That of torchmetrics goes by a softmax, which is 0 in fp32 for a token that gradient ascent has made very unlikely: one such
    token makes the perplexity of a whole corpus infinite.
    """

    higher_is_better = False

    def update(self, logits: Tensor, sequences: Sequences) -> None:
        """Take in logits `[B, T, V]` of sequences `[B, T]`."""
        self.total -= log_likelihood(logits, sequences).detach().sum().to(self.total.device)
        self.count += targets(sequences)[1].sum().to(self.count.device)

    def compute(self) -> Tensor:
        return super().compute().exp()

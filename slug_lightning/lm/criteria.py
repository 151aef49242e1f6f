"""Criteria for a forgotten passage: what is measured of it after an epoch, and the bounds on that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Union

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.completion import complete_prefixes, teacher_forced
from slug_lightning.lm.metrics import bleu, extraction_likelihood, memorization_accuracy
from slug_lightning.lm.sequences import pad

Bound = Union[float, Literal["unseen"]]
"""A number, or the mean over passages that the model never saw."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model remembers of one passage.

    Attributes:
        prefix: the text that it is given.
        truth: how the passage continues.
        completion: how the model continues.
        truth_tokens: `[S]` token ids.
        completion_tokens: at most as many.
        memorization_accuracy: share of the passage's tokens that are predicted correctly, 0 to 1.
        nll: mean negative log-likelihood of the passage's tokens, in nats.
        extraction_likelihood: EL_n, 0 to 1, or an estimate of it.
    """

    prefix: str
    truth: str
    completion: str
    truth_tokens: Tensor
    completion_tokens: Tensor
    memorization_accuracy: float
    nll: float
    extraction_likelihood: float

    @cached_property
    def bleu(self) -> float:
        """BLEU of the completion against the truth, 0 to 1."""
        return bleu([self.completion], [self.truth]).item()


def gather(
    model: Any, tokenizer: Any, passages: Sequence[Tensor], prefix: int, batch_size: int, el: int, prefixes: int | None = None
) -> list[Evidence]:
    """Measure what the model remembers of passages, by one teacher-forced forward and what that leaves to be generated.

    A recited passage costs no generation, any other at most one for each token that is predicted wrongly, or each prefix.

    Args:
        model: as in `complete_prefixes`.
        tokenizer: gives the texts, by `decode`.
        passages: token ids, each `[T_i]`.
        prefix: how many tokens of a passage the model is given to complete.
        batch_size: passages of full length in a forward, or in a step of generation.
        el: n of the extraction likelihood EL_n.
        prefixes: how many prefixes of each passage it is estimated from, evenly spaced, but for one that is `prefix` and costs
            nothing more; None: all, as it is defined.
    """
    if not passages:
        return []
    shortest = min(map(len, passages))
    if prefix < 1 or shortest <= max(prefix, el):
        raise UnlearnError(f"prefix={prefix}, el={el}: both must be >= 1 and < the length of the passages, got {shortest} tokens")
    batch_tokens = batch_size * max(map(len, passages))
    predicted, nll = teacher_forced(model, passages, batch_tokens)
    if not all(map(math.isfinite, nll)):
        raise UnlearnError("model: its loss on a passage is not finite: training has diverged; lower the learning rate")
    asked = [_spread(len(passage) - el, prefix, prefixes) for passage in passages]
    completions = complete_prefixes(model, passages, predicted, [[prefix, *lengths] for lengths in asked], batch_tokens)
    sequences = pad([passage.cpu() for passage in passages])
    accuracies = memorization_accuracy(pad(predicted)["input_ids"], sequences).tolist()
    likelihoods = extraction_likelihood([found[1:] for found in completions], sequences, el, asked).tolist()

    def text(tokens: Tensor) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return [
        Evidence(text(passage[:prefix]), text(passage[prefix:]), text(found[0]), passage[prefix:], found[0], accuracy, loss, el_n)
        for passage, found, accuracy, loss, el_n in zip(passages, completions, accuracies, nll, likelihoods, strict=True)
    ]


def _spread(longest: int, prefix: int, count: int | None) -> list[int]:
    """Lengths of prefixes from 1 to `longest`: all, or the middles of `count` equal parts, `prefix` in place of the nearest."""
    if count is None or count >= longest:
        return list(range(1, longest + 1))
    lengths = [1 + (2 * k + 1) * longest // (2 * count) for k in range(count)]
    if prefix <= longest:
        lengths[min(range(count), key=lambda k: abs(lengths[k] - prefix))] = prefix
    return lengths


class Criterion:
    """A bound on one value of a passage: at or below it, the passage is forgotten by this criterion.

    Subclasses are dataclasses, but this is not: jsonargparse takes no subclass of a dataclass from a config.

    Attributes:
        name: what is bounded: an attribute of `Evidence`, unless the subclass has `values` of its own.
        below: the bound, 0 to 1; or "unseen": the mean of the value over passages that the model never saw.

    Raises:
        UnlearnError: if `below` is neither.
    """

    name: ClassVar[str]
    below: Bound

    def __post_init__(self) -> None:
        if self.below != "unseen" and not (isinstance(self.below, (int, float)) and 0 <= self.below <= 1):
            raise UnlearnError(f"{type(self).__name__}: below must be in [0, 1] or 'unseen', got {self.below!r}")

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """The value of each passage; lower is more forgotten."""
        return [getattr(e, self.name) for e in evidence]

    def forgotten(self, values: Sequence[float], threshold: float) -> list[bool]:
        """Whether each value is at or below the threshold; NaN is not."""
        return [value <= threshold for value in values]


@dataclass
class BleuBelow(Criterion):
    """BLEU of the completion against the truth (`slug_lightning.lm.metrics.bleu`); the default bound is that of ICU's paper.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.

    Example:
        >>> criterion = BleuBelow()
        >>> criterion.forgotten([0.0, 0.01, 0.3, math.nan], threshold=criterion.below)
        [True, True, False, False]
    """

    below: Bound = 0.01
    name = "bleu"


@dataclass
class BertScoreBelow(Criterion):
    """F1 of BERTScore of the completion against the truth, by `torchmetrics.text.BERTScore`.

    Scores are not rescaled by a baseline, which would have to be downloaded. Without one, unrelated texts may get far more than
    the bound of ICU's paper, 0.3, so the default bound is the score of passages that the model never saw.

    Args:
        model: name or folder of a transformers encoder with its tokenizer.
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    model: str
    below: Bound = "unseen"
    name = "bertscore"

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """F1 of each completion; 0 where it or the truth is empty."""
        return [self._score(e.completion, e.truth) if e.completion.strip() and e.truth.strip() else 0.0 for e in evidence]

    def _score(self, completion: str, truth: str) -> float:
        # Pair by pair: torchmetrics (1.9) sorts both lists by length, each by itself, and to undo it takes the same order again
        # instead of its inverse, so that texts of different pairs are compared.
        self._scorer.reset()
        self._scorer.update([completion], [truth])
        return self._scorer.compute()["f1"].item()

    @cached_property
    def _scorer(self) -> Any:
        from torchmetrics.text import BERTScore
        from transformers import AutoModel, AutoTokenizer

        try:
            encoder = AutoModel.from_pretrained(self.model)
            longest = min(512, AutoTokenizer.from_pretrained(self.model).model_max_length)
        except (OSError, ValueError) as error:
            raise UnlearnError(
                f"BertScoreBelow: model={self.model!r} cannot be loaded; give a folder with an encoder and its tokenizer, as "
                "`save_pretrained` writes them, or use another criterion"
            ) from error
        # Given only a name, it would load the encoder again each time. Every rank scores passages of its own.
        return BERTScore(
            self.model,
            model=encoder,
            device="cuda" if torch.cuda.is_available() else "cpu",
            max_length=longest,
            truncation=True,
            sync_on_compute=False,
        )


@dataclass
class MemorizationBelow(Criterion):
    """Memorization accuracy over the whole passage.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    below: Bound = "unseen"
    name = "memorization_accuracy"


@dataclass
class ExtractionBelow(Criterion):
    """Extraction likelihood EL_n, with the n and the prefixes that the evidence was gathered with.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    below: Bound = "unseen"
    name = "extraction_likelihood"


@dataclass
class ProbabilityBelow(Criterion):
    """Geometric mean of the probabilities of the passage's tokens, exp(-nll).

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    below: Bound = "unseen"
    name = "probability"

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        return [math.exp(-e.nll) for e in evidence]

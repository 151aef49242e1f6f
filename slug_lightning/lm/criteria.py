"""When a passage counts as forgotten: what is measured of it after an epoch, and the bounds on that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Optional, Union

from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.completion import complete_prefixes, teacher_forced
from slug_lightning.lm.metrics import bleu, extraction_likelihood, memorization_accuracy
from slug_lightning.lm.sequences import pad


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model makes of one passage now.

    Attributes:
        prefix: the text that it is given.
        truth: how the passage goes on.
        completion: how the model goes on.
        truth_tokens: `[S]` token ids.
        completion_tokens: at most as many.
        memorization_accuracy: share of the passage's tokens that are predicted right, 0 to 1.
        nll: mean negative log-likelihood of the passage's tokens, in nats.
        extraction_likelihood: EL_n, 0 to 1; None where it was not asked for.
    """

    prefix: str
    truth: str
    completion: str
    truth_tokens: Tensor
    completion_tokens: Tensor
    memorization_accuracy: float
    nll: float
    extraction_likelihood: float | None = None


def gather(
    model: Any, tokenizer: Any, passages: Sequence[Tensor], prefix: int, batch_size: int, el: int | None = None
) -> list[Evidence]:
    """Measure what the model remembers of passages, by one forward and what that leaves to be generated.

    The forward is teacher-forced, and says how far the model follows each passage by itself: a passage that is recited costs no
    generation, any other one of its own (with `el`, one for each of its tokens that is predicted wrong, which is most of
    the cost by far).

    Args:
        model: a causal language model of transformers; in evaluation mode meanwhile.
        tokenizer: gives the texts, by `decode`.
        passages: token ids, each `[T_i]`.
        prefix: how many tokens of a passage the model is given to complete.
        batch_size: passages of full length that a forward, or a step of generation, takes at once.
        el: n of the extraction likelihood EL_n; None leaves it out.

    Raises:
        UnlearnError: if a passage has no token after its prefix, or no more than `el`; or the model's loss is not finite.
    """
    shortest = max(prefix, el or 0)
    if prefix < 1 or any(len(passage) <= shortest for passage in passages):
        raise UnlearnError(f"prefix={prefix}, el={el}: a passage has no more tokens than that; give longer passages")
    if not passages:
        return []
    batch_tokens = batch_size * max(map(len, passages))
    predicted, nll = teacher_forced(model, passages, batch_tokens)
    if not all(map(math.isfinite, nll)):
        raise UnlearnError("model: its loss on a passage is no finite number, so training has diverged; lower the learning rate")
    # The prefix comes last, behind the prefixes that EL_n asks for.
    lengths = [[*(range(1, len(passage) - el + 1) if el else ()), prefix] for passage in passages]
    completions = complete_prefixes(model, passages, predicted, lengths, batch_tokens)
    sequences = pad([passage.cpu() for passage in passages])
    accuracies = memorization_accuracy(pad(predicted)["input_ids"], sequences).tolist()
    likelihoods = extraction_likelihood([c[:-1] for c in completions], sequences, el).tolist() if el else [None] * len(passages)

    def text(tokens: Tensor) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return [
        Evidence(text(p[:prefix]), text(p[prefix:]), text(c[-1]), p[prefix:], c[-1], *numbers)
        for p, c, *numbers in zip(passages, completions, accuracies, nll, likelihoods, strict=True)
    ]


@dataclass
class Criterion:
    """A bound on one value of a passage: at or below it, the passage is forgotten by this criterion.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean of the value over passages that the model never saw.

    Raises:
        UnlearnError: if `below` is neither.
    """

    below: Union[float, Literal["unseen"]] = "unseen"

    name: ClassVar[str]
    """What is bounded."""

    def __post_init__(self) -> None:
        if self.below != "unseen" and not (isinstance(self.below, (int, float)) and 0 <= self.below <= 1):
            raise UnlearnError(f"{type(self).__name__}(below={self.below!r}): give a number from 0 to 1, or 'unseen'")

    @property
    def el(self) -> int | None:
        """The n of the extraction likelihood that the evidence must hold; None if it need not."""
        return None

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """The value of each passage."""
        raise NotImplementedError

    def threshold(self, unseen: Sequence[Evidence] = ()) -> float:
        """The bound as a number.

        Args:
            unseen: evidence on passages that the model never saw, for `below="unseen"`.

        Raises:
            UnlearnError: if that is needed and there is none, or its mean is not a number.
        """
        if self.below != "unseen":
            return float(self.below)
        values = self.values(unseen)
        if not values or not math.isfinite(mean := sum(values) / len(values)):
            raise UnlearnError(
                f"{type(self).__name__}(below='unseen'): there are no passages that the model never saw, or no values of them; "
                "give the datamodule unseen=…, or a number as below"
            )
        return mean

    def forgotten(self, values: Sequence[float], threshold: float) -> list[bool]:
        """Whether each value is at or below the threshold; what is not a number is not forgotten."""
        return [value <= threshold for value in values]


@dataclass
class BleuBelow(Criterion):
    """BLEU of the completion against the truth (`slug_lightning.lm.metrics.bleu`); the default bound is that of ICU's paper.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.

    Example:
        >>> criterion = BleuBelow()
        >>> criterion.forgotten([0.0, 0.01, 0.3, math.nan], criterion.threshold())
        [True, True, False, False]
    """

    below: Union[float, Literal["unseen"]] = 0.01
    name = "BLEU"

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """BLEU of each completion, 0 to 1."""
        return bleu([e.completion for e in evidence], [e.truth for e in evidence]).tolist()


@dataclass
class BertScoreBelow(Criterion):
    """F1 of BERTScore of the completion against the truth, by `torchmetrics.text.BERTScore`.

    ICU's paper has 0.3, for scores rescaled by a baseline. These are not: unrelated texts get 0.8 from many models, so that
    the default bound is what passages get that the model never saw.

    Args:
        model: name or folder of a transformers encoder with its tokenizer.
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
        num_layers: whose output is compared; None: the last.
    """

    model: str = ""
    num_layers: Optional[int] = None
    name = "BERTScore"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UnlearnError("BertScoreBelow(model=…): give the name or the folder of an encoder")

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """F1 of each completion; 0 where it or the truth is empty.

        Raises:
            UnlearnError: if the model cannot be loaded.
        """
        scores = [0.0] * len(evidence)
        filled = [i for i, e in enumerate(evidence) if e.completion.strip() and e.truth.strip()]
        if filled:
            said, true = [evidence[i].completion for i in filled], [evidence[i].truth for i in filled]
            for i, score in zip(filled, self._scorer(said, true)["f1"].reshape(-1).tolist(), strict=True):
                scores[i] = score
        return scores

    @cached_property
    def _scorer(self) -> Any:
        from torchmetrics.text import BERTScore

        try:
            return BERTScore(self.model, num_layers=self.num_layers, truncation=True)
        except (ImportError, OSError, ValueError) as error:
            raise UnlearnError(
                f"BertScoreBelow(model={self.model!r}): it cannot be loaded ({error}); give a folder that "
                "`save_pretrained` of model and tokenizer wrote, or another criterion"
            ) from error


@dataclass
class MemorizationBelow(Criterion):
    """Memorization accuracy over the whole passage.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    name = "MA"

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """Share of each passage's tokens that are predicted right."""
        return [e.memorization_accuracy for e in evidence]


@dataclass
class ExtractionBelow(Criterion):
    """Extraction likelihood EL_n over the whole passage. The dearest one: it generates for every token predicted wrong.

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
        n: tokens of an n-gram, at least 1.
    """

    n: int = 10
    name = "EL"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise UnlearnError(f"ExtractionBelow(n={self.n}): give at least 1 token")

    @property
    def el(self) -> int:
        """The n of the extraction likelihood that the evidence must hold."""
        return self.n

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """EL_n of each passage.

        Raises:
            UnlearnError: if it was not measured.
        """
        values = [e.extraction_likelihood for e in evidence]
        if None in values:
            raise UnlearnError(f"ExtractionBelow(n={self.n}): it was not measured; gather the evidence with el={self.n}")
        return [value for value in values if value is not None]


@dataclass
class ProbabilityBelow(Criterion):
    """Geometric mean of the probabilities of the passage's tokens, exp(-nll).

    Args:
        below: the bound, 0 to 1; or "unseen": the mean over passages that the model never saw.
    """

    name = "probability"

    def values(self, evidence: Sequence[Evidence]) -> list[float]:
        """The mean probability of a token of each passage."""
        return [math.exp(-e.nll) for e in evidence]

"""What makes a causal language model forget: ICU's loss, and those of the methods it is compared with.

Every loss is a sum of named parts, per passage; training descends it. The parts' names are the same in all of them, so that
their curves can be laid over each other: `forget` acts on the passage, `learn` is the negative log-likelihood of its pairs, and
`keep` holds the pairs' distribution where it was.

All is computed in fp32 whatever the model's precision, at the positions that count and at no others: what stands in the
padding, and how long it is, changes not a bit. Besides the model's own logits, a forward in training holds one fp32 copy of
these positions, `[N, V]`, for each likelihood of current weights, and two for each divergence; the reference's likelihoods
hold none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Forward, Sequences, targets

Batch = Mapping[str, Any]
"""What `slug_lightning.datamodules.PassageDataModule` serves: sequences `forget` of B passages, `pair` with K rows for each, in
their order, and `refusal`, of which the first `prefix` tokens are the passage's."""


class Reference(Protocol):
    """The original model p₀, as the losses see it. Nobody trains it, saves it or counts its parameters.

    It is made while the model is the original: in `setup`, before a checkpoint is restored or a strategy shards the model.
    """

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Compute beforehand what cannot be computed later; before training."""

    def kl(self, logits: Tensor, sequences: Sequences) -> Tensor:
        """KL(p₀ ‖ p), `[B]`, as `slug_lightning.lm.losses.sequence_kl`, of a model p that gives `logits`, `[B, T, V]`."""

    def log_likelihood(self, sequences: Sequences, start: int = 1) -> Tensor:
        """Log p₀ of each sequence from its token `start` on, `[B]`, as `slug_lightning.lm.losses.log_likelihood`."""

    def memory(self) -> dict[str, int]:
        """What it takes besides the model, in bytes, on the "device" and on "disk"."""

    def digest(self) -> str:
        """SHA-256 of the original's weights, by which a run that goes on knows that it goes on from the same."""


# ---- of one sequence


def log_likelihood(logits: Tensor, sequences: Sequences, start: int = 1) -> Tensor:
    """Log-probability of each sequence from its token `start` on, given those before: a sum over tokens, in nats.

    Args:
        logits: `[B, T, V]`.
        sequences: `[B, T]`.
        start: number of the first token that counts; at least 1, as nothing predicts the first.

    Returns:
        `[B]`, fp32; 0 for a sequence that is not as long.

    Example:
        >>> sequences = {"input_ids": torch.tensor([[0, 1, 1]]), "attention_mask": torch.ones(1, 3).long()}
        >>> log_likelihood(torch.zeros(1, 3, 4), sequences) / math.log(4)
        tensor([-2.])
    """
    scores, ids, lengths = at_targets(logits, sequences, start)
    return -summed(cross_entropy(scores, ids, reduction="none"), lengths)


def sequence_nll(logits: Tensor, sequences: Sequences) -> Tensor:
    """Negative log-likelihood of each sequence: the mean over its tokens but the first, in nats.

    Args:
        logits: `[B, T, V]`.
        sequences: `[B, T]`.

    Returns:
        `[B]`, fp32, at least 0; 0 for a sequence of fewer than two tokens.

    Example:
        >>> sequences = {"input_ids": torch.tensor([[0, 1], [3, 2]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        >>> sequence_nll(torch.zeros(2, 2, 4), sequences) / math.log(4)
        tensor([1., 0.])
    """
    return -log_likelihood(logits, sequences) / _lengths(sequences)


def sequence_unlikelihood(logits: Tensor, sequences: Sequences) -> Tensor:
    """Mean over a sequence's tokens of -log(1 - p), `[B]`, in nats (Welleck et al., arXiv 1908.04319, eq. 4).

    Where -NLL pushes hardest on tokens that are unlikely already, this one's gradient is that of p: it vanishes with it.

    Args:
        logits: `[B, T, V]`.
        sequences: `[B, T]`.

    Returns:
        Not negative; 0 for a sequence with no token to predict. Two `[N, V]` tensors in fp32 are held, of N tokens that count.

    Example:
        >>> half = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])  # p = 1/2
        >>> sequences = {"input_ids": torch.tensor([[0, 1]]), "attention_mask": torch.ones(1, 2).long()}
        >>> torch.allclose(sequence_unlikelihood(half, sequences), torch.tensor(2.0).log())
        True
    """
    scores, ids, lengths = at_targets(logits, sequences)
    others = scores.scatter(1, ids[:, None], -math.inf).logsumexp(1)  # not by 1 - p, which is 0 where p is next to 1
    return summed(scores.logsumexp(1) - others, lengths) / _lengths(sequences)


def sequence_kl(logits: Tensor, reference_logits: Tensor, sequences: Sequences) -> Tensor:
    """KL(p₀ ‖ p) of the next token, over the vocabulary: the mean over the positions whose target counts, in nats.

    It is the direction of TOFU (arXiv 2401.06121, section 4) and of ICU: what the original model holds likely must stay likely.

    Args:
        logits: of p, the model in training, `[B, T, V]`.
        reference_logits: of p₀, the original, `[B, T, V]`; no gradient flows there.
        sequences: `[B, T]`.

    Returns:
        `[B]`, fp32, at least 0 but for rounding; 0 for a sequence of fewer than two tokens.

    Example:
        >>> sequences = {"input_ids": torch.tensor([[0, 1]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> certain = torch.tensor([[[0.0, -200.0], [0.0, 0.0]]])
        >>> sequence_kl(torch.zeros(1, 2, 2), certain, sequences) / math.log(2)
        tensor([1.])
    """
    scores, _, lengths = at_targets(logits, sequences)
    reference = at_targets(reference_logits.detach(), sequences)[0]
    return mean_divergence(reference.log_softmax(-1), scores.log_softmax(-1), lengths)


def at_targets(logits: Tensor, sequences: Sequences, start: int = 1) -> tuple[Tensor, Tensor, list[int]]:
    """The positions that predict a token that counts, of all sequences after each other.

    Args:
        logits: `[B, T, V]`.
        sequences: `[B, T]`.
        start: number of the first token that counts.

    Returns:
        Logits there, `[N, V]`, fp32; the tokens to predict, `[N]`; how many there are of each sequence.

    Raises:
        UnlearnError: if there are more or fewer logits than tokens, as virtual tokens before the sequence (prompt tuning) make.
    """
    if logits.shape[:2] != sequences["input_ids"].shape:
        shape, tokens = list(logits.shape[:2]), list(sequences["input_ids"].shape)
        raise UnlearnError(f"model: it gives logits {shape} for tokens {tokens}; take one that gives one for each token")
    ids, counts = targets(sequences)
    counts = counts & (torch.arange(1, ids.shape[1] + 1, device=ids.device) >= start)
    # A mask over all positions, not over logits[:, :-1]: the gradient of that slice would be one more copy.
    return logits[pad(counts, (0, 1))].float(), ids[counts], counts.sum(1).tolist()


def summed(values: Tensor, lengths: list[int]) -> Tensor:
    """The sum of each sequence's values, `[B]`, of those of all sequences after each other, `[N]`.

    Not a sum over a padded row, which would be added up in another order where the padding is longer.

    Example:
        >>> summed(torch.tensor([1.0, 2.0, 4.0]), [2, 0, 1])
        tensor([3., 0., 4.])
    """
    return torch.stack([part.sum() for part in values.split(lengths)])


def mean_divergence(reference: Tensor, current: Tensor, lengths: list[int]) -> Tensor:
    """KL divergence of two distributions at each position, averaged over each sequence's.

    Args:
        reference: log-probabilities of p₀, `[N, C]`, fp32; may be -inf.
        current: of p, `[N, C]`, fp32.
        lengths: how many positions each sequence has.

    Returns:
        `[B]`, in nats; 0 for a sequence without a position.

    Example:
        >>> mean_divergence(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]).log(), [1, 0]) / math.log(2)
        tensor([1., 0.])
    """
    p = reference.exp()
    terms = torch.where(p > 0, p * (reference - current), 0.0)  # 0 log 0 = 0
    return summed(terms.sum(-1), lengths) / torch.tensor(lengths, device=p.device).clamp(min=1)


def _lengths(sequences: Sequences) -> Tensor:
    """By how much a sequence's sum is divided, `[B]`: tokens to predict, but at least 1."""
    return targets(sequences)[1].sum(1).clamp(min=1)


# ---- of a passage and its pairs


class LMLoss(ABC):
    """A loss that forgets; a subclass is a dataclass of its coefficients, so that a config can name it and set them."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the original model."""
        return False

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        """The parts of the loss by name, each `[B]`, with their coefficients; their sum is what training descends.

        Args:
            forward: gives the model's logits of sequences.
            batch: B passages with their pairs.
            reference: the original model; None will do where `needs_reference` is False.

        Raises:
            UnlearnError: if the reference is missing, or the pairs are not equally many for each passage.
        """


@dataclass(frozen=True)
class ICU(LMLoss):
    """Iterative Contrastive Unlearning (arXiv 2407.20271): −a·NLL(passage) + b·NLL(pair) + c·KL(p₀ ‖ p on the pair).

    Its knowledge unlearning induction, contrastive learning enhancement, and the latter's KL term; the paper has a = 1,
    b = 0.5, c = 1, one pair (the nearest neighbour), and lets passages rest that are forgotten (`ICUCallback`). The released
    program also counts padding in its KL; here nothing does.

    Args:
        forget: a, not negative.
        learn: b, likewise.
        keep: c, likewise; at 0 no reference is needed.
        unlikelihood: forget by a·mean(-log(1 - p)) instead (`sequence_unlikelihood`), which no paper on ICU has: it does not run
            away, and costs far less of the rest (benchmarks/passages.py).

    Raises:
        UnlearnError: if one is negative or not finite, or all are 0.

    Example:
        >>> ICU(keep=0.0).needs_reference, ICU().needs_reference
        (False, True)
    """

    forget: float = 1.0
    learn: float = 0.5
    keep: float = 1.0
    unlikelihood: bool = False

    def __post_init__(self) -> None:
        _refuse_negative(forget=self.forget, learn=self.learn, keep=self.keep)
        if not (self.forget or self.learn or self.keep):
            raise UnlearnError("forget, learn, keep: all are 0, so that nothing would be trained; give one above 0")

    @property
    def needs_reference(self) -> bool:
        return self.keep > 0

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        parts = {}
        if self.forget:
            logits, passages = forward(batch["forget"]), batch["forget"]
            raised = sequence_unlikelihood(logits, passages) if self.unlikelihood else -sequence_nll(logits, passages)
            parts["forget"] = self.forget * raised
        return parts | _on_pairs(forward, batch, reference, learn=self.learn, keep=self.keep)


@dataclass(frozen=True)
class GradientAscent(LMLoss):
    """KUMPR (Jang et al., arXiv 2210.01504, section 3): −NLL(passage), and nothing that keeps the rest.

    The paper sums over the tokens of a passage; here it is their mean, as in the other losses.

    Example:
        >>> GradientAscent().needs_reference
        False
    """

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=0.0, keep=0.0)(forward, batch, reference)


@dataclass(frozen=True)
class GradDiff(LMLoss):
    """Gradient difference (Liu et al., arXiv 2203.12817; TOFU, 2401.06121, section 4): −NLL(passage) + b·NLL(pair).

    Args:
        retain: b, not negative.

    Raises:
        UnlearnError: if it is negative or not finite.
    """

    retain: float = 1.0

    def __post_init__(self) -> None:
        _refuse_negative(retain=self.retain)

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=self.retain, keep=0.0)(forward, batch, reference)


@dataclass(frozen=True)
class KL(LMLoss):
    """KL minimization (TOFU, arXiv 2401.06121, section 4): −NLL(passage) + c·KL(p₀ ‖ p on the pair).

    Args:
        keep: c, above 0; without it, it is `GradientAscent`.

    Raises:
        UnlearnError: if it is not above 0 and finite.
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        _refuse_unless_positive(keep=self.keep)

    @property
    def needs_reference(self) -> bool:
        return True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=0.0, keep=self.keep)(forward, batch, reference)


@dataclass(frozen=True)
class NPO(LMLoss):
    """Negative preference optimization (Zhang et al., arXiv 2404.05868, eq. 3): −(2/β) log σ(−β log(p/p₀)) + b·NLL(pair).

    p and p₀ are the passage's probabilities, products over its tokens. As β goes to 0 the gradient becomes that of the passage's
    log-likelihood, ascent by its sum over tokens; where p is far below p₀ it vanishes.

    Args:
        beta: β, above 0; the paper has 0.1.
        retain: b, not negative.

    Raises:
        UnlearnError: if one is out of its range or not finite.
    """

    beta: float = 0.1
    retain: float = 1.0

    def __post_init__(self) -> None:
        _refuse_unless_positive(beta=self.beta)
        _refuse_negative(retain=self.retain)

    @property
    def needs_reference(self) -> bool:
        return True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        ratio = _log_ratio(forward, batch["forget"], reference)
        parts = {"forget": _where_any(-2 / self.beta * logsigmoid(-self.beta * ratio), batch["forget"])}
        return parts | _on_pairs(forward, batch, reference, learn=self.retain)


@dataclass(frozen=True)
class SimNPO(LMLoss):
    """NPO without a reference (Fan et al., arXiv 2410.07163): −(2/β) log σ(−(β/|y|) log p(y) − γ) + b·NLL(pair).

    |y| is the number of tokens, so that long and short passages are forgotten alike. The first part is above 0 and falls to 0,
    with its gradient, as the passage becomes unlikely.

    Args:
        beta: β, above 0; the paper has 2.5.
        gamma: γ, the margin, not negative.
        retain: b, not negative.

    Raises:
        UnlearnError: if one is out of its range or not finite.
    """

    beta: float = 2.5
    gamma: float = 0.0
    retain: float = 1.0

    def __post_init__(self) -> None:
        _refuse_unless_positive(beta=self.beta)
        _refuse_negative(gamma=self.gamma, retain=self.retain)

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        nll = sequence_nll(forward(batch["forget"]), batch["forget"])
        parts = {"forget": _where_any(-2 / self.beta * logsigmoid(self.beta * nll - self.gamma), batch["forget"])}
        return parts | _on_pairs(forward, batch, reference, learn=self.retain)


@dataclass(frozen=True)
class DPO(LMLoss):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7), with a refusal preferred to the passage.

    −log σ(β log(p/p₀ of the refusal) − β log(p/p₀ of the passage's rest)) + b·NLL(pair), both given the passage's prefix.

    Args:
        beta: β, above 0; the paper has 0.1.
        retain: b, not negative.

    Raises:
        UnlearnError: if one is out of its range or not finite.
    """

    beta: float = 0.1
    retain: float = 1.0

    def __post_init__(self) -> None:
        _refuse_unless_positive(beta=self.beta)
        _refuse_negative(retain=self.retain)

    @property
    def needs_reference(self) -> bool:
        return True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        start = int(batch["prefix"])
        preferred = _log_ratio(forward, batch["refusal"], reference, start)
        refused = _log_ratio(forward, batch["forget"], reference, start)
        loss = _where_any(-logsigmoid(self.beta * (preferred - refused)), batch["forget"], start)
        return {"forget": loss} | _on_pairs(forward, batch, reference, learn=self.retain)


def _on_pairs(
    forward: Forward, batch: Batch, reference: Optional[Reference], learn: float = 0.0, keep: float = 0.0
) -> dict[str, Tensor]:
    """The parts of the loss on the pairs, from one forward; what has no coefficient is not computed."""
    if not (learn or keep):
        return {}
    pairs = batch["pair"]
    logits = forward(pairs)
    parts = {}
    if learn:
        parts["learn"] = learn * _per_passage(sequence_nll(logits, pairs), batch)
    if keep:
        parts["keep"] = keep * _per_passage(_needed(reference).kl(logits, pairs), batch)
    return parts


def _per_passage(values: Tensor, batch: Batch) -> Tensor:
    """The mean over the pairs of each passage, `[B]`, of values of all pairs, `[B * K]`."""
    passages = len(batch["forget"]["input_ids"])
    if not len(values) or len(values) % passages:
        raise UnlearnError(f"pair: {len(values)} sequences for {passages} passages; give each passage equally many, at least one")
    return values.view(passages, -1).mean(1)


def _log_ratio(forward: Forward, sequences: Sequences, reference: Optional[Reference], start: int = 1) -> Tensor:
    """log(p/p₀) of each sequence from its token `start` on, `[B]`."""
    before = _needed(reference).log_likelihood(sequences, start)
    return log_likelihood(forward(sequences), sequences, start) - before


def _where_any(loss: Tensor, sequences: Sequences, start: int = 1) -> Tensor:
    """The loss of those sequences that have a token to forget, 0 for the others, which -log σ would not give."""
    return torch.where(targets(sequences)[1][:, start - 1 :].any(1), loss, 0.0)


def _needed(reference: Optional[Reference]) -> Reference:
    if reference is None:
        raise UnlearnError("reference: this loss compares with the original model; give a FrozenCopy, TopK or AdaptersOff of it")
    return reference


def _refuse_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UnlearnError(f"{name}: {value} is no coefficient; give a finite number, 0 or above")


def _refuse_unless_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UnlearnError(f"{name}: {value} is out of range; give a finite number above 0")

"""Losses that make a causal language model forget: ICU's, and those of the methods it is compared with.

All are computed in fp32, only at the positions that count, so that padding changes no bit. Besides the model's own logits, a
training step holds one fp32 copy of these positions, `[N, V]`, for each likelihood and two for each divergence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import Forward, Sequences, targets

Batch = Mapping[str, Any]
"""What `slug_lightning.datamodules.PassageDataModule` serves: sequences `forget` of B passages, `pair` with K rows for each, in
their order, and `refusal`, of which the first `prefix` tokens are the passage's."""


class Reference(Protocol):
    """The original model p₀, as the losses see it. It is never trained or saved, and its parameters are not counted.

    Make it while the model is the original: in `setup`, before a checkpoint is restored or a strategy shards the model.
    """

    def kl(self, logits: Tensor, sequences: Sequences) -> Tensor:
        """KL(p₀ ‖ p), `[B]`, of the model p that gives `logits`, `[B, T, V]`, as `slug_lightning.lm.losses.sequence_kl`."""

    def log_likelihood(self, sequences: Sequences, start: int = 1) -> Tensor:
        """Log p₀ of each sequence from its token `start` on, `[B]`, as `slug_lightning.lm.losses.log_likelihood`."""

    def memory(self) -> dict[str, int]:
        """Bytes held in addition to the model, on the "device" and on "disk"."""

    def digest(self) -> str:
        """SHA-256 of the original's weights, by which a resumed run recognizes its original."""


# ---- of one sequence


def log_likelihood(logits: Tensor, sequences: Sequences, start: int = 1) -> Tensor:
    """Sum the log-probabilities, in nats, of each sequence's tokens from number `start` on: `[B]`, fp32; 0 for a shorter one.

    `start` is at least 1, as nothing predicts the first token.
    """
    scores, ids, lengths = at_targets(logits, sequences, start)
    return -summed(cross_entropy(scores, ids, reduction="none"), lengths)


def sequence_nll(logits: Tensor, sequences: Sequences) -> Tensor:
    """Average the negative log-likelihood, in nats, over each sequence's tokens but the first: `[B]`, fp32; 0 without any."""
    scores, ids, lengths = at_targets(logits, sequences)
    return _averaged(cross_entropy(scores, ids, reduction="none"), lengths)


def sequence_unlikelihood(logits: Tensor, sequences: Sequences) -> Tensor:
    """Average -log(1 - p), in nats, over each sequence's tokens but the first (Welleck et al., arXiv 1908.04319, eq. 4).

    Where -NLL pushes hardest on tokens that are unlikely already, the gradient of this loss vanishes as p → 0. The backward
    pass holds two fp32 copies of the positions that count. Gives `[B]`, fp32; 0 for a sequence of fewer than two tokens.
    """
    scores, ids, lengths = at_targets(logits, sequences)
    others = scores.scatter(1, ids[:, None], -math.inf).logsumexp(1)  # not by 1 - p, which is 0 where p is next to 1
    return _averaged(scores.logsumexp(1) - others, lengths)


def sequence_kl(logits: Tensor, reference_logits: Tensor, sequences: Sequences) -> Tensor:
    """Average KL(p₀ ‖ p) of the next token over the positions whose target counts, in nats.

    It is the direction of TOFU (arXiv 2401.06121, section 4) and of ICU: what is likely under the original must stay likely. No
    gradient flows to `reference_logits`, those of p₀. Gives `[B]`, fp32; 0 for a sequence of fewer than two tokens.
    """
    scores, _, lengths = at_targets(logits, sequences)
    reference = at_targets(reference_logits.detach(), sequences)[0]
    return mean_divergence(reference.log_softmax(-1), scores.log_softmax(-1), lengths)


def at_targets(logits: Tensor, sequences: Sequences, start: int = 1) -> tuple[Tensor, Tensor, list[int]]:
    """Select the positions that predict a token that counts: logits `[N, V]` in fp32, tokens `[N]`, and how many per sequence."""
    if logits.shape[:2] != sequences["input_ids"].shape:
        shape, tokens = list(logits.shape[:2]), list(sequences["input_ids"].shape)
        raise UnlearnError(
            f"model: logits have shape {shape} for tokens of shape {tokens}; use a model without virtual tokens (prompt tuning)"
        )
    ids, counts = targets(sequences)
    counts = counts & (torch.arange(1, ids.shape[1] + 1, device=ids.device) >= start)
    # A mask over all positions, not over logits[:, :-1]: the gradient of that slice would be one more copy.
    return logits[pad(counts, (0, 1))].float(), ids[counts], counts.sum(1).tolist()


def summed(values: Tensor, lengths: list[int]) -> Tensor:
    """Sum each sequence's values, `[B]`, given those of all sequences concatenated, `[N]`."""
    # Not a sum over a padded row, which would be added up in another order where the padding is longer.
    return torch.stack([part.sum() for part in values.split(lengths)])


def _averaged(values: Tensor, lengths: list[int]) -> Tensor:
    """The same as means; 0 for a sequence without a value."""
    return summed(values, lengths) / torch.tensor(lengths, device=values.device).clamp(min=1)


def mean_divergence(reference: Tensor, current: Tensor, lengths: list[int]) -> Tensor:
    """Average the KL divergence, in nats, over each sequence's positions: `[B]`, 0 for a sequence without one.

    Both are log-probabilities, `[N, C]`, fp32; those of the reference may be -inf.
    """
    p = reference.exp()
    terms = torch.where(p > 0, p * (reference - current), 0.0)  # 0 log 0 = 0
    return _averaged(terms.sum(-1), lengths)


# ---- of a passage and its pairs


class LMLoss(ABC):
    """A loss that forgets; a subclass is a dataclass of its coefficients, so that a config can name it and set them."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the original model."""
        return False

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        """Compute the parts of the loss by name, each `[B]`, with their coefficients; training descends their sum.

        Parts have the same names in all losses, so that curves compare: `forget` acts on the passage, `learn` is the negative
        log-likelihood of its pairs, `keep` the divergence from the original on its pairs.

        Args:
            forward: gives the model's logits of sequences.
            batch: B passages with their pairs.
            reference: the original model; may be None where `needs_reference` is False.
        """


class _Coefficients(LMLoss):
    """Refuses a coefficient that is negative or not finite, and 0 for those `above_zero`."""

    above_zero: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            positive = name in self.above_zero
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise UnlearnError(f"{name} must be {'>' if positive else '>='} 0 and finite, got {value}")


@dataclass(frozen=True)
class ICU(_Coefficients):
    """Iterative Contrastive Unlearning (arXiv 2407.20271): −a·NLL(passage) + b·NLL(pair) + c·KL(p₀ ‖ p on the pair).

    Its knowledge unlearning induction, contrastive learning enhancement, and the latter's KL term; the paper has a = 1,
    b = 0.5, c = 1, one pair (the nearest neighbour), and lets forgotten passages rest (`ICUCallback`). The released program also
    counts padding in its KL; here nothing does.

    Args:
        forget: a, at least 0.
        learn: b, at least 0.
        keep: c, at least 0; at 0 no reference is needed.
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
        super().__post_init__()
        if not (self.forget or self.learn or self.keep):
            raise UnlearnError("at least one of forget, learn and keep must be > 0, or nothing is trained; got 0 for all")

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
    """KUMPR (Jang et al., arXiv 2210.01504, section 3): −NLL(passage), without a term for the retain set.

    The paper sums over the tokens of a passage; here it is their mean, as in the other losses.
    """

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=0.0, keep=0.0)(forward, batch, reference)


@dataclass(frozen=True)
class GradDiff(_Coefficients):
    """Gradient difference (Liu et al., arXiv 2203.12817; TOFU, 2401.06121, section 4): −NLL(passage) + b·NLL(pair).

    Args:
        retain: b, at least 0.
    """

    retain: float = 1.0

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=self.retain, keep=0.0)(forward, batch, reference)


@dataclass(frozen=True)
class KL(_Coefficients):
    """KL minimization (TOFU, arXiv 2401.06121, section 4): −NLL(passage) + c·KL(p₀ ‖ p on the pair).

    Args:
        keep: c, above 0; at 0 this would be `GradientAscent`.
    """

    keep: float = 1.0
    above_zero = ("keep",)
    needs_reference = True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        return ICU(learn=0.0, keep=self.keep)(forward, batch, reference)


@dataclass(frozen=True)
class NPO(_Coefficients):
    """Negative preference optimization (Zhang et al., arXiv 2404.05868, eq. 3): −(2/β) log σ(−β log(p/p₀)) + b·NLL(pair).

    p and p₀ are the passage's probabilities, products over its tokens. As β goes to 0 the gradient becomes that of the passage's
    log-likelihood, ascent by its sum over tokens; where p is far below p₀ it vanishes.

    Args:
        beta: β, above 0; the paper has 0.1.
        retain: b, at least 0.
    """

    beta: float = 0.1
    retain: float = 1.0
    above_zero = ("beta",)
    needs_reference = True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        ratio = _log_ratio(forward, batch["forget"], reference)
        parts = {"forget": _where_any(-2 / self.beta * logsigmoid(-self.beta * ratio), batch["forget"])}
        return parts | _on_pairs(forward, batch, reference, learn=self.retain)


@dataclass(frozen=True)
class SimNPO(_Coefficients):
    """NPO without a reference (Fan et al., arXiv 2410.07163): −(2/β) log σ(−(β/|y|) log p(y) − γ) + b·NLL(pair).

    |y| is the number of tokens, so that long and short passages are forgotten equally. The first part is above 0 and falls to 0,
    with its gradient, as the passage becomes unlikely.

    Args:
        beta: β, above 0; the paper has 2.5.
        gamma: γ, the margin, at least 0.
        retain: b, at least 0.
    """

    beta: float = 2.5
    gamma: float = 0.0
    retain: float = 1.0
    above_zero = ("beta",)

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        nll = sequence_nll(forward(batch["forget"]), batch["forget"])
        parts = {"forget": _where_any(-2 / self.beta * logsigmoid(self.beta * nll - self.gamma), batch["forget"])}
        return parts | _on_pairs(forward, batch, reference, learn=self.retain)


@dataclass(frozen=True)
class DPO(_Coefficients):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7), with a refusal preferred to the passage.

    −log σ(β log(p/p₀ of the refusal) − β log(p/p₀ of the passage's rest)) + b·NLL(pair), both given the passage's prefix.

    Args:
        beta: β, above 0; the paper has 0.1.
        retain: b, at least 0.
    """

    beta: float = 0.1
    retain: float = 1.0
    above_zero = ("beta",)
    needs_reference = True

    def __call__(self, forward: Forward, batch: Batch, reference: Optional[Reference]) -> dict[str, Tensor]:
        start = int(batch["prefix"])
        preferred = _log_ratio(forward, batch["refusal"], reference, start)
        refused = _log_ratio(forward, batch["forget"], reference, start)
        loss = _where_any(-logsigmoid(self.beta * (preferred - refused)), batch["forget"], start)
        return {"forget": loss} | _on_pairs(forward, batch, reference, learn=self.retain)


def _on_pairs(
    forward: Forward, batch: Batch, reference: Optional[Reference], learn: float = 0.0, keep: float = 0.0
) -> dict[str, Tensor]:
    """Compute the parts on the pairs from one forward, each a mean over a passage's pairs; none whose coefficient is 0."""
    if not (learn or keep):
        return {}
    pairs, passages = batch["pair"], len(batch["forget"]["input_ids"])
    logits = forward(pairs)
    parts = {}
    if learn:
        parts["learn"] = learn * _per_passage(sequence_nll(logits, pairs), passages)
    if keep:
        parts["keep"] = keep * _per_passage(_required(reference).kl(logits, pairs), passages)
    return parts


def _per_passage(values: Tensor, passages: int) -> Tensor:
    if not len(values) or len(values) % passages:
        raise UnlearnError(f"pair: got {len(values)} sequences for {passages} passages; each needs the same number, at least 1")
    return values.view(passages, -1).mean(1)


def _log_ratio(forward: Forward, sequences: Sequences, reference: Optional[Reference], start: int = 1) -> Tensor:
    """log(p/p₀) of each sequence from its token `start` on, `[B]`."""
    before = _required(reference).log_likelihood(sequences, start)
    return log_likelihood(forward(sequences), sequences, start) - before


def _where_any(loss: Tensor, sequences: Sequences, start: int = 1) -> Tensor:
    """Set the loss of sequences without a token to forget to 0, which -log σ would not give."""
    return torch.where(targets(sequences)[1][:, start - 1 :].any(1), loss, 0.0)


def _required(reference: Optional[Reference]) -> Reference:
    if reference is None:
        raise UnlearnError("reference must be given: this loss needs the original model; pass a FrozenCopy, TopK or AdaptersOff")
    return reference

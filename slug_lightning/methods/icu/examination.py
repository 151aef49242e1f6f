"""What a model remembers of passages, and which of them rest: iterative unlearning refinement (ICU, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slug_lightning.distributed.strategy import Runner
from slug_lightning.lm.criteria import Criterion, gather
from slug_lightning.lm.losses import log_likelihood
from slug_lightning.lm.metrics import ngram_diversity
from slug_lightning.lm.sequences import Sequences, targets
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.utils.progress import Progress

Finding = dict[str, Any]
"""Of one passage, as plain data: the metrics `MEANS`, `nll`, `completion`, `prefix`, `truth`, and `values` by criterion."""
MEANS = ("memorization_accuracy", "extraction_likelihood", "bleu", "diversity")
COPIED = ("memorization_accuracy", "extraction_likelihood", "bleu", "nll", "prefix", "truth", "completion")
"""Attributes of `slug_lightning.lm.criteria.Evidence` that are findings."""


@dataclass
class Examiner:
    """Completes passages from their first `prefix` tokens and measures them, shared among the ranks, which all get all findings.

    `n` is that of the extraction likelihood; `batch_size` passages are completed at once.
    """

    module: Any
    runner: Runner
    prefix: int
    criteria: Sequence[Criterion]
    n: int
    batch_size: int
    progress: Progress

    def __post_init__(self) -> None:
        self.processes = self.runner.processes
        # All ranks run a sharded model together: each examines all passages.
        self.share, self.shares = (0, 1) if self.runner.is_sharded else (self.processes.data_rank, self.processes.data_world_size)

    def of(self, passages: Sequence[Tensor], prefixes: int | None, name: str = "passages") -> list[Finding]:
        """Complete each passage, of token ids `[T]`, and measure it; `prefixes` as in `slug_lightning.lm.criteria.gather`."""
        mine = list(range(self.share, len(passages), self.shares))
        found: list[tuple[int, Finding]] = []
        with self.runner.forward_context():
            starts = range(0, len(mine), self.batch_size)
            for start in self.progress.track(starts, f"completing {name}") if len(starts) > 1 else starts:
                chosen = mine[start : start + self.batch_size]
                found += zip(chosen, self._batch([passages[i] for i in chosen], prefixes), strict=True)
        gathered = dict(pair for of_one in self.processes.all_gather_object(f"completions of {name}", found) for pair in of_one)
        return [gathered[i] for i in range(len(passages))]

    def _batch(self, passages: Sequence[Tensor], prefixes: int | None) -> list[Finding]:
        model, tokenizer = self.module.model, self.module.tokenizer
        evidence = gather(model, tokenizer, passages, self.prefix, self.batch_size, el=self.n, prefixes=prefixes)
        values = {criterion.name: criterion.values(evidence) for criterion in self.criteria}
        diversity = ngram_diversity([e.completion_tokens for e in evidence], 3).tolist()
        return [
            {name: getattr(e, name) for name in COPIED}
            | {"diversity": diversity[i], "values": {name: of_all[i] for name, of_all in values.items()}}
            for i, e in enumerate(evidence)
        ]

    def perplexity(self, batches: Iterable[Sequences]) -> float:
        """Perplexity of other texts: the exponential of the mean negative log-likelihood of all their tokens."""
        total, count = 0.0, 0
        with torch.no_grad(), preserve_state(self.module), self.runner.forward_context():
            for number, batch in enumerate(batches):
                if number % self.shares == self.share:
                    on_device = {name: batch[name].to(self.module.device) for name in ("input_ids", "attention_mask")}
                    total -= log_likelihood(self.module.logits(on_device), on_device).double().sum().item()
                    count += int(targets(on_device)[1].sum())
        sums = self.processes.all_gather_object("the perplexity", (total, count))
        return _perplexity(sum(total for total, _ in sums) / sum(count for _, count in sums))


def means_of(found: Sequence[Finding]) -> dict[str, float]:
    """Means over passages by metric and criterion; the perplexity is of their mean `nll`."""
    named = {name: [f[name] for f in found] for name in MEANS} | {
        name: [f["values"][name] for f in found] for name in found[0]["values"]
    }
    means = {name: sum(values) / len(values) for name, values in named.items()}
    return means | {"perplexity": _perplexity(sum(f["nll"] for f in found) / len(found))}


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # where a float overflows, `math.exp` raises an error


@dataclass
class Status:
    """State of one passage, the number of epochs that trained on it, and how often it came back after it had been forgotten."""

    remembered: bool = True
    epochs: int = 0
    returns: int = 0


class Refinement:
    """The status of every passage, epoch by epoch. A passage rests as soon as one criterion calls it forgotten.

    With `rests=False`, all passages are trained on to the end.
    """

    def __init__(self, count: int, rests: bool = True) -> None:
        self.rests = rests
        self.passages = [Status() for _ in range(count)]

    @property
    def remembered(self) -> list[int]:
        """Numbers of the passages that no criterion calls forgotten."""
        return [i for i, passage in enumerate(self.passages) if passage.remembered]

    @property
    def active(self) -> list[int]:
        """Numbers of the passages to train on."""
        return self.remembered if self.rests else list(range(len(self.passages)))

    def trained(self) -> None:
        """Count an epoch for the active passages."""
        for i in self.active:
            self.passages[i].epochs += 1

    def update(self, forgotten: Sequence[bool]) -> None:
        """Set for each passage whether it is forgotten now."""
        for passage, now in zip(self.passages, forgotten, strict=True):
            passage.returns += not (passage.remembered or now)
            passage.remembered = not now

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(passage) for passage in self.passages]

    def restore(self, data: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `to_list`."""
        self.passages = [Status(**passage) for passage in data]

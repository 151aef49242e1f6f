"""The original model's likelihoods of given sequences, on disk: its most likely tokens at each position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import Batch, at_targets, mean_divergence
from slug_lightning.lm.models import logits_of, refuse_absent, weights_digest
from slug_lightning.lm.sequences import Sequences, digests
from slug_lightning.objective.eval_mode import eval_mode
from slug_lightning.tensors.file_store import Entry, cache_path, read_entry, write_entry

PENDING = 64 * 2**20
"""Bytes that `TopK` holds in memory before it writes a file."""


class _Row(NamedTuple):
    """What is stored of one sequence of n + 1 tokens."""

    digest: str
    token: Tensor
    """Log p₀ of each token but the first, `[n]`, fp32."""
    top: Optional[tuple[Tensor, Tensor, Tensor]]
    """The most likely tokens, `[n, k]`, int32; their log-probabilities, `[n, k]`, fp16; that of all others, `[n]`, fp32."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.token, *(self.top or ())))


class TopK:
    """The original's likelihoods of given sequences, computed once: the k most likely tokens at each position of a pair.

    All other tokens make one more bucket, so the divergence is over k + 1 buckets: a lower bound on that over the vocabulary,
    and equal to it where k reaches the vocabulary. Of passages and refusals, only each token's log-probability is stored.

    A position of a pair takes 6 · k + 8 bytes, any other position 4: 128 pairs of 200 tokens with k = 64 take 10 MB, where all of
    a vocabulary of 50257 in fp32 would take 5.1 GB. Log-probabilities are fp16, whose rounding changes no probability by more
    than 2⁻¹¹/e = 0.0002 (p·|log p| is at most 1/e), so that at first the divergence is not 0 but below 10⁻⁶. Training holds one
    more fp32 copy of the model's own logits, where the full divergence holds two.

    The files belong to the weights (by digest) and to k; where a run finds those of its original, it computes nothing. What
    is damaged or was altered is computed again. While it prepares, it holds 64 MiB and a batch, and writes as many files as that
    makes, each atomically.

    Args:
        model: a transformers causal language model, while it is the original.
        folder: of the files, on a disk that all processes see; it may be shared among runs. Nothing is ever removed from it.
        k: how many tokens to store for each position; at least 1.

    Raises:
        UnlearnError: if k is too small, or the model's weights are not here: on the meta device, or sharded.
    """

    def __init__(self, model: nn.Module, folder: Union[str, Path], k: int = 64) -> None:
        if k < 1:
            raise UnlearnError(f"k must be >= 1, got {k}")
        refuse_absent(model)
        self.model = model
        self.folder = Path(folder)
        self.k = k
        self._digest = weights_digest(model)
        self._key = {"weights": self._digest, "k": k}
        self._files: set[Path] = set()
        self._is_original = False
        # Of each sequence, by digest, parts of the files, mapped into memory.
        self._tokens: dict[str, Tensor] = {}
        self._tops: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Ask the original about all sequences that no file knows yet, and write that down.

        The first process does so; the others wait, and read what it wrote. It must be given all batches.

        Args:
            batches: any number, with `pair`, `forget` or `refusal`, each `[B, T]`.

        Raises:
            UnlearnError: if something is to be computed, but the model is not what it was.
            OtherProcessError: if the first process has failed.
        """
        processes = Processes()
        with processes.together():
            if processes.is_first:
                self._open_all(warn=True)
                self._compute(batches)
        processes.all_gather_object("reference", None)
        if not processes.is_first:
            self._open_all()

    def kl(self, logits: Tensor, sequences: Sequences) -> Tensor:
        """KL(p₀ ‖ p) over k + 1 buckets, `[B]`, of sequences that were prepared as pairs."""
        found = zip(*_found(self._tops, sequences, "pair"), strict=True)
        chosen, likeliest, rest = (torch.cat(parts).to(logits.device) for parts in found)
        reference = torch.cat([likeliest.float(), rest[:, None]], 1).log_softmax(-1)  # as rounded, they do not sum to 1
        scores, _, lengths = at_targets(logits, sequences)
        return mean_divergence(reference, bucketed(scores, chosen.long()), lengths)

    def log_likelihood(self, sequences: Sequences, start: int = 1) -> Tensor:
        """Log p₀, `[B]`, of sequences that were prepared."""
        rows = _found(self._tokens, sequences, "forget")
        return torch.stack([row[start - 1 :].sum() for row in rows]).to(sequences["input_ids"].device)

    def memory(self) -> dict[str, int]:
        """Bytes of the files."""
        return {"device": 0, "disk": sum(path.stat().st_size for path in self._files)}

    def digest(self) -> str:
        """SHA-256 of the weights that the model had at the beginning."""
        return self._digest

    def _compute(self, batches: Iterable[Batch]) -> None:
        pending: list[_Row] = []
        self._is_original = False  # not known before it is asked
        for batch in batches:
            for name in ("pair", "forget", "refusal"):
                if name in batch:
                    pending += self._measured(batch[name], name == "pair")
            if sum(row.bytes for row in pending) >= PENDING:
                self._write(pending)
                pending = []
        if pending:
            self._write(pending)

    def _measured(self, sequences: Sequences, is_pair: bool) -> list[_Row]:
        """The original's likelihoods of those sequences that are not known yet."""
        known: Mapping[str, Any] = self._tops if is_pair else self._tokens
        names = digests(sequences)
        missing = {name: i for i, name in enumerate(names) if name not in known}
        if not missing:
            return []
        self._is_original = self._is_original or weights_digest(self.model) == self._digest  # asked once for each prepare()
        if not self._is_original:
            raise UnlearnError(
                f"reference: the model is no longer the original, whose likelihoods are not all in {self.folder}; call prepare() "
                "before training, before its precision is changed and before a checkpoint is restored"
            )
        device = next(self.model.parameters()).device
        chosen = {key: sequences[key][list(missing.values())].to(device) for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), eval_mode(self.model):
            rows = _rows(list(missing), logits_of(self.model, chosen), chosen, self.k if is_pair else 0)
        for row in rows:
            self._tokens[row.digest] = row.token
            if row.top is not None:
                self._tops[row.digest] = row.top
        return rows

    def _write(self, rows: Sequence[_Row]) -> None:
        tops = [row.top for row in rows if row.top is not None] or [_no_top()]
        names = ("ids", "log_probs", "rest")
        tensors = {name: torch.cat(parts) for name, parts in zip(names, zip(*tops, strict=True), strict=True)}
        tensors["token"] = torch.cat([row.token for row in rows])
        content = [[row.digest, len(row.token), row.top is not None] for row in rows]
        path = cache_path(self.folder, self._prefix(), content)  # nobody writes over other rows
        write_entry(path, self._key, content, tensors, required=True)
        self._open(path)

    def _open_all(self, warn: bool = False) -> None:
        """Map the files that belong to the original."""
        for path in sorted(self.folder.glob(f"{self._prefix()}-*.safetensors")):
            self._open(path, warn)

    def _open(self, path: Path, warn: bool = True) -> None:
        if path not in self._files and read_entry(path, self._key, self._take, warn):
            self._files.add(path)

    def _take(self, entry: Entry) -> None:
        rows, tensors = entry
        tokens = tensors["token"].split([length for _, length, _ in rows])
        lengths = [length for _, length, has_top in rows if has_top]
        tops = zip(*(tensors[name].split(lengths) for name in ("ids", "log_probs", "rest")), strict=True)
        self._tokens |= {name: token for (name, _, _), token in zip(rows, tokens, strict=True)}
        self._tops |= dict(zip([name for name, _, has_top in rows if has_top], tops, strict=True))

    def _prefix(self) -> str:
        return cache_path("", "reference", self._key).stem


def bucketed(scores: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of chosen tokens, and of all others together, `[N, k + 1]`.

    From logits `[N, V]`, fp32, and ids `[N, k]`, different in each row.
    """
    # By the others' own logits: 1 - Σp has no digit left where the chosen tokens have all the probability.
    lowest = torch.finfo(scores.dtype).min  # not -inf: where the model excludes all others, the gradient would be NaN
    rest = scores.scatter(1, chosen, lowest).logsumexp(-1, keepdim=True)
    top = scores[torch.arange(len(scores), device=scores.device)[:, None], chosen]  # gather would hold the scores too
    return torch.cat([top, rest], 1).log_softmax(-1)


def _rows(names: Sequence[str], logits: Tensor, sequences: Sequences, k: int) -> list[_Row]:
    """What is stored of each sequence, on the CPU; with the `k` most likely tokens, unless that is 0."""
    scores, ids, lengths = at_targets(logits, sequences)
    tokens = scores.log_softmax(-1).gather(1, ids[:, None])[:, 0].cpu().split(lengths)
    if not k:
        return [_Row(name, token, None) for name, token in zip(names, tokens, strict=True)]
    chosen = scores.topk(min(k, scores.shape[1])).indices
    logs = bucketed(scores, chosen)
    parts = (chosen.int(), logs[:, :-1].half(), logs[:, -1])
    tops = zip(*(part.cpu().split(lengths) for part in parts), strict=True)
    return [_Row(name, token, top) for name, token, top in zip(names, tokens, tops, strict=True)]


def _no_top() -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0, dtype=torch.half), torch.empty(0)


def _found(known: Mapping[str, Any], sequences: Sequences, name: str) -> list[Any]:
    rows = digests(sequences)
    if missing := sum(row not in known for row in rows):
        raise UnlearnError(
            f"reference: {missing} of {len(rows)} sequences were not prepared; before training, pass all training batches to "
            f"prepare() on rank 0, with these as {name!r}"
        )
    return [known[row] for row in rows]

"""Greedy completions of a language model: many at once, and those of every prefix from one forward.

Greedy means the argmax of the model's own logits, whatever its generation config says. Hence a loop of our own over the model's
cache: transformers' `generate` takes from that config what its caller leaves open (repetition penalties, tokens suppressed or
forced, minimum lengths), and what counts as open differs between its versions. On small models both take the same time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import sequence_nll
from slug_lightning.lm.models import cache_argument, cache_of, logits_of, unwrapped
from slug_lightning.lm.sequences import pad
from slug_lightning.objective.eval_mode import preserve_state

BATCH_TOKENS = 4096


def teacher_forced(model: Any, rows: Sequence[Tensor], batch_tokens: int = BATCH_TOKENS) -> tuple[list[Tensor], list[float]]:
    """Predict every token of each sequence, of ids `[T_i]`, from the true ones before it.

    Gives for each the predictions, `[T_i - 1]` on the CPU, and the mean negative log-likelihood of its tokens but the first, in
    nats. A forward has at most `batch_tokens` tokens with padding, or one sequence; it holds about three fp32 copies of their
    logits.
    """
    best: list[Tensor] = [row[:0] for row in rows]
    nll = [0.0] * len(rows)
    with torch.no_grad(), preserve_state(model):
        for batch in _batches([(len(row), 0) for row in rows], batch_tokens):
            sequences = {name: tensor.to(model.device) for name, tensor in pad([rows[i].cpu() for i in batch]).items()}
            logits = logits_of(model, sequences)
            for i, tokens, loss in zip(batch, logits.argmax(-1).cpu(), sequence_nll(logits, sequences).tolist(), strict=True):
                best[i], nll[i] = tokens[: len(rows[i]) - 1], loss
    return best, nll


def complete(model: Any, prefixes: Sequence[Tensor], counts: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Continue each prefix, of ids `[P_i]`, greedily by at most `counts[i]` tokens, or up to an end-of-sequence token.

    Each completion is the one that its prefix gets alone, up to rounding: padding is on the left, masked, and has no position.
    A batch has at most `batch_tokens` tokens with padding and completions; the keys and values of each are held.
    """
    if not all(map(len, prefixes)):
        raise UnlearnError("prefixes: each must have at least one token, but one is empty")
    completions = [prefix[:0].cpu() for prefix in prefixes]
    shapes = [(len(prefix), count) if count else (0, 0) for prefix, count in zip(prefixes, counts, strict=True)]
    ends = _ends(model)
    with torch.no_grad(), preserve_state(model):
        for batch in _batches(shapes, batch_tokens):
            steps = max(counts[i] for i in batch)
            tokens = _generate(model, [prefixes[i].cpu() for i in batch], steps, ends).cpu()
            for i, row in zip(batch, tokens, strict=True):
                last = torch.isin(row, torch.tensor(sorted(ends), dtype=row.dtype)).nonzero()
                completions[i] = row[: min(counts[i], int(last[0]) + 1 if len(last) else steps)]
    return completions


def complete_prefixes(
    model: Any,
    rows: Sequence[Tensor],
    predicted: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[Tensor]]:
    """Complete prefixes of sequences to the sequences' lengths, generating only what their predictions leave open.

    The completion of a prefix follows the sequence for as long as the next token is predicted correctly, then takes the wrong
    prediction and goes on from there. So all prefixes that reach the same wrong prediction share one generation, and none is
    needed where the rest is predicted correctly.

    Args:
        model: of transformers, alone or with PEFT adapters.
        rows: token ids, each `[T_i]`.
        predicted: this model's predictions of each, as `teacher_forced` gives them.
        lengths: how many tokens the prefixes of each have, from 1 to `T_i - 1`; the completions come in the same order.
        batch_tokens: as in `complete`.
    """
    ends = _ends(model)
    tokens = [row.cpu() for row in rows]
    leaving = [_leaving(row.tolist(), best.tolist(), ends) for row, best in zip(tokens, predicted, strict=True)]
    wrong = sorted({(i, leaving[i][t]) for i, wanted in enumerate(lengths) for t in wanted if leaving[i][t] < len(rows[i])})
    tails = {(i, at): predicted[i][at - 1 : at] for i, at in wrong}
    going_on = [key for key, tail in tails.items() if tail.item() not in ends]
    prefixes = [torch.cat([tokens[i][:at], tails[i, at]]) for i, at in going_on]
    counts = [len(rows[i]) - at - 1 for i, at in going_on]
    for key, more in zip(going_on, complete(model, prefixes, counts, batch_tokens), strict=True):
        tails[key] = torch.cat([tails[key], more])
    return [
        [torch.cat([row[t : away[t]], tails.get((i, away[t]), row[:0])]) for t in wanted]
        for i, (row, away, wanted) in enumerate(zip(tokens, leaving, lengths, strict=True))
    ]


def _leaving(row: list[int], best: list[int], ends: set[int]) -> list[int]:
    """For each position, find the first from there on whose token is predicted wrongly or ends the completion, or the end."""
    leaving = [len(row)] * (len(row) + 1)
    for at in range(len(row) - 1, 0, -1):
        leaving[at] = at if best[at - 1] != row[at] or row[at] in ends else leaving[at + 1]
    return leaving


def _generate(model: Any, prefixes: list[Tensor], steps: int, ends: set[int]) -> Tensor:
    """Add up to `steps` tokens to each prefix, `[B, steps]`; fewer if all have ended. What follows an end is undefined."""
    # Padding stands on the left, so that distances between tokens are the true ones for every kind of attention.
    reverse = pad([prefix.flip(0) for prefix in prefixes])
    ids, mask = (reverse[name].flip(1).to(model.device) for name in ("input_ids", "attention_mask"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = unwrapped(model)
    takes = inspect.signature(own.forward).parameters
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    stop = torch.tensor(sorted(ends), device=ids.device)
    argument, cache = cache_argument(model), None
    added, ended = [], torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(steps):
        where = {"position_ids": positions} if "position_ids" in takes else {}
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, **{argument: cache}, **where, **only_last)
        cache = cache_of(output)
        if cache is None:
            raise UnlearnError(f"model: {type(own).__name__} has no cache of keys and values, which completions need")
        ids = output.logits[:, -1:].argmax(-1)
        added.append(ids)
        if ends:
            ended |= torch.isin(ids, stop)
            if ended.all():
                break
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(added, 1)


def _ends(model: Any) -> set[int]:
    """The end-of-sequence tokens."""
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _batches(shapes: Sequence[tuple[int, int]], batch_tokens: int) -> Iterator[list[int]]:
    """Group (prefix, completion) lengths by size, at most `batch_tokens` with padding; leave out those that are 0."""
    batch: list[int] = []
    longest = (0, 0)
    for i in sorted((i for i, shape in enumerate(shapes) if sum(shape)), key=lambda i: shapes[i]):
        wider = (max(longest[0], shapes[i][0]), max(longest[1], shapes[i][1]))
        if batch and (len(batch) + 1) * sum(wider) > batch_tokens:
            yield batch
            batch, wider = [], shapes[i]
        batch.append(i)
        longest = wider
    if batch:
        yield batch

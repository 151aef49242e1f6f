"""Token sequences in batches: padded on the right, with a mask that says what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slug_lightning.tensors.bits import digest_of

Sequences = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, both `[B, T]` integers, under the names that transformers models take.

The mask is 1 where a token counts. Padding is on the right; its id makes no difference.
"""
Forward = Callable[[Sequences], Tensor]
"""Gives the logits, `[B, T, V]`, of sequences."""


def pad(rows: Sequence[Tensor], pad_id: int = 0) -> dict[str, Tensor]:
    """Put rows of token ids, each `[T_i]`, into one batch, with `pad_id` where the mask is 0."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def counted(sequences: Sequences) -> list[Tensor]:
    """The tokens that count, each `[T_i]`, on the CPU: the inverse of `pad`."""
    ids, mask = sequences["input_ids"].cpu(), sequences["attention_mask"].cpu().bool()
    return [row[counts] for row, counts in zip(ids, mask, strict=True)]


def targets(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The token that each position but the last must predict, `[B, T-1]`, and which of these count, bool."""
    mask = sequences["attention_mask"].bool()
    return sequences["input_ids"][:, 1:], mask[:, 1:] & mask[:, :-1]


def digests(sequences: Sequences) -> list[str]:
    """SHA-256 of the tokens of each sequence, whatever it is padded with."""
    return [digest_of({"tokens": row}, "") for row in counted(sequences)]

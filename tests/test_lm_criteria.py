"""What is gathered of passages, and the bounds by which they count as forgotten."""

from __future__ import annotations

import math

import pytest
import torch
from jsonargparse import ArgumentParser

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.criteria import (
    BertScoreBelow,
    BleuBelow,
    Criterion,
    Evidence,
    ExtractionBelow,
    MemorizationBelow,
    ProbabilityBelow,
    gather,
)


def evidence(completion: str = "a b c d", truth: str = "a b c d", **options) -> Evidence:
    given = {"memorization_accuracy": 0.5, "nll": math.log(4), **options}
    return Evidence("so", truth, completion, torch.tensor([1, 2]), torch.tensor([1, 2]), **given)


def bert(folder) -> str:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **shape)).save_pretrained(folder)
    return str(folder)

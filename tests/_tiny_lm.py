"""A language model that recites a few lines within a second of training, and the lines."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor

from slug_lightning.lm.losses import sequence_nll
from slug_lightning.lm.models import logits_of
from slug_lightning.lm.sequences import pad

WORDS = [f"w{i}" for i in range(40)]
PREFIX, SUFFIX = 6, 8


def texts(count: int, seed: int) -> list[str]:
    """Lines of random words, each of prefix + suffix words; lines of different seeds have next to nothing in common."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=PREFIX + SUFFIX)) for _ in range(count)]


RECITED, KEPT, UNSEEN = texts(8, 1), texts(24, 2), texts(16, 3)


@functools.cache
def tokenizer() -> Any:
    """One token a word; it has neither a padding token nor an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def rows(lines: list[str]) -> list[Tensor]:
    return [torch.tensor(ids) for ids in tokenizer()(lines)["input_ids"]]


def small_llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 1, max_position_embeddings=32, **shape, **ends))


@functools.cache
def _trained() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        model = small_llama()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        sequences = pad(rows(RECITED + KEPT))
        for _ in range(120):
            optimizer.zero_grad()
            sequence_nll(logits_of(model, sequences), sequences).mean().backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def reciting() -> Any:
    """A Llama that knows the recited and the kept lines by heart."""
    model = small_llama()
    model.load_state_dict(_trained())
    return model

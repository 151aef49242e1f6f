"""The embedded language model: it loads offline, recites what it should, and never saw what it should not have."""

import json
import socket
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from slug_lightning.embedded import LM, PASSAGES

PARTS = ("recited", "kept", "unseen")
ROWS = [json.loads(line) for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
TEXTS = {part: [row["text"] for row in ROWS if row["part"] == part] for part in PARTS}


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer, what loading found amiss), without a network."""

    def refuse(*arguments, **keywords):
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        model, amiss = AutoModelForCausalLM.from_pretrained(LM, output_loading_info=True)
        return model, AutoTokenizer.from_pretrained(LM), amiss


def tokens(tokenizer, part: str, most: int) -> torch.Tensor:
    """First 64 tokens [passages, 64] of evenly chosen passages of a part."""
    texts = TEXTS[part][:: max(1, len(TEXTS[part]) // most)][:most]
    return torch.tensor([tokenizer(text)["input_ids"][:64] for text in texts])


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[:, :-1]


def test_it_loads_whole_and_in_fp32(loaded):
    model, tokenizer, amiss = loaded
    assert not any(amiss[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert not model.training


def test_the_files_stay_small():
    weights = LM / "model.safetensors"
    assert weights.stat().st_size <= 6e6
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert sum(p.stat().st_size for p in LM.iterdir()) <= 7e6


def test_no_run_of_eight_words_stands_in_two_passages():
    count: Counter = Counter()
    for row in ROWS:
        words = row["text"].split()
        count.update({" ".join(words[i : i + 8]) for i in range(len(words) - 7)})
    assert max(count.values()) == 1


def test_passages_are_long_enough_and_keep_their_text(loaded):
    _, tokenizer, _ = loaded
    assert {row["part"] for row in ROWS} == set(PARTS)
    assert len(TEXTS["recited"]) == 160 <= min(len(TEXTS["unseen"]), len(TEXTS["kept"]))
    for row in ROWS:
        ids = tokenizer(row["text"])["input_ids"]
        assert 64 <= len(ids) <= 72
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == row["text"]


def test_only_the_recited_passages_are_known_by_heart(loaded):
    model, tokenizer, _ = loaded
    right, loss = {}, {}
    for part in PARTS:
        ids = tokens(tokenizer, part, 48)
        guesses = logits(model, ids)
        right[part] = (guesses.argmax(-1) == ids[:, 1:]).float().mean().item()
        loss[part] = torch.nn.functional.cross_entropy(guesses.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert right["recited"] >= 0.97
    assert right["unseen"] < 0.5
    assert right["unseen"] < right["kept"] < right["recited"] - 0.1
    assert loss["recited"] < loss["kept"] < loss["unseen"]


@pytest.mark.parametrize(("part", "least", "most"), [("recited", 0.9, 1.0), ("unseen", 0.0, 0.0)])
def test_completion_of_the_first_half(loaded, part, least, most):
    model, tokenizer, _ = loaded
    ids = tokens(tokenizer, part, 16)
    made = ids[:, :32]
    for _ in range(32):
        with torch.no_grad():
            made = torch.cat([made, model(input_ids=made).logits[:, -1:].argmax(-1)], dim=1)
    assert least <= (made == ids).all(1).float().mean() <= most


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the language reference differs between Python versions")
def test_passages_are_python_s_own_words():
    topics = pytest.importorskip("pydoc_data.topics").topics
    assert sum(row["text"] in topics.get(row["topic"], "") for row in ROWS) >= 0.9 * len(ROWS)

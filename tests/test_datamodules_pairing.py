"""Pairs: the nearest by an independent computation, never what is to be forgotten, and the same again from the disk."""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st

from slug_lightning.datamodules.text import pairing
from slug_lightning.datamodules.text.pairing import near_duplicates, pair
from slug_lightning.errors import UnlearnError

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe") for b in ("ra", "so", "ti", "vu")]


def texts(count: int, seed: int, length: int = 12) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(random_.choices(WORDS, k=length)) for _ in range(count)]


FORGET, CORPUS = texts(5, 1), texts(40, 2)


def cosines(forget: list[str], corpus: list[str]) -> np.ndarray:
    """TF-IDF by the book: idf = ln((1 + N) / (1 + df)) + 1 over the corpus."""
    known = sorted({word for text in corpus for word in text.split()})
    frequency = np.array([sum(word in text.split() for text in corpus) for word in known])
    idf = np.log((1 + len(corpus)) / (1 + frequency)) + 1

    def vectors(some: list[str]) -> np.ndarray:
        counts = [Counter(text.split()) for text in some]
        rows = np.array([[count[word] for word in known] for count in counts]) * idf
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return vectors(forget) @ vectors(corpus).T


@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_nearest_are_those_of_a_comparison_of_all(k):
    found = pair(FORGET, CORPUS, k)
    similar = cosines(FORGET, CORPUS)
    for row, own in zip(found, similar, strict=True):
        assert len(set(row)) == k
        assert own[row] == pytest.approx(np.sort(own)[::-1][:k], abs=1e-5)


def test_equally_near_texts_come_in_the_order_of_the_corpus():
    near, far = texts(2, 3)
    query = " ".join([*near.split()[::-1], "zzz"])
    assert pair([query], [far, near, far, near, near], 4) == [[1, 3, 4, 0]]
    other = ["one two", "three four", "five six"]
    assert pair(["something else entirely"], other, 3) == [[0, 1, 2]]  # none has a word of it


def test_the_nearest_of_those_that_may_be_chosen_keep_their_numbers():
    corpus = [*FORGET[:2], *CORPUS[:20], FORGET[2], *CORPUS[20:]]
    similar = cosines(FORGET, corpus)
    similar[:, [0, 1, 22]] = -1
    for row, own in zip(pair(FORGET, corpus, 3), similar, strict=True):
        assert own[row] == pytest.approx(np.sort(own)[::-1][:3], abs=1e-5)


# ---- what is never chosen


@pytest.mark.parametrize("method", ["nearest", "random"])
@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: "\n " + text.replace(" ", " \t\n") + " ",
        lambda text: text.replace(" ", ", ") + ".",
        lambda text: " ".join([*text.split()[:5], "edited", *text.split()[6:]]),
        lambda text: " ".join([*texts(1, 9, 50), text, *texts(1, 10, 50)]),
        lambda text: " ".join(text.split()[3:9]),
        lambda text: " ".join([*text.split()[5:], *texts(1, 11, 5)]),
    ],
    ids=["case", "white space", "punctuation", "one word", "within more", "a part", "cut further on"],
)
def test_what_is_to_be_forgotten_is_never_a_pair_however_it_is_written(method, change):
    disguised = [change(text) for text in FORGET]
    corpus = [*CORPUS[:20], *disguised, *CORPUS[20:]]
    assert near_duplicates(FORGET, corpus) == list(range(20, 25))
    found = pair(FORGET, corpus, 40, method)
    assert all(sorted(row) == [*range(20), *range(25, 45)] for row in found)


def slow_near_duplicates(forget: list[str], corpus: list[str]) -> list[int]:
    def grams(text):
        words = text.split()
        return [words] if len(words) < 3 else [words[i : i + 3] for i in range(len(words) - 2)]

    def different(found):
        return [gram for i, gram in enumerate(found) if gram not in found[:i]]

    near = []
    for j, text in enumerate(corpus):
        for other in forget:
            mine, theirs = different(grams(text)), different(grams(other))
            if 2 * sum(gram in theirs for gram in mine) >= min(len(mine), len(theirs)):
                near.append(j)
                break
    return near


few_words = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=5)


@examples(200)
@given(forget=few_words, corpus=few_words)
def test_near_duplicates_share_half_of_the_shorter_one(forget, corpus):
    assert near_duplicates(forget, corpus) == slow_near_duplicates(forget, corpus)


def test_texts_without_words_are_compared_as_they_are():
    assert near_duplicates(["?!", ""], ["!?", "?!", " "]) == [1, 2]


# ---- at random


def test_random_pairs_are_of_the_seed_and_all_different():
    first = pair(FORGET, CORPUS, 7, "random", seed=3)
    assert first == pair(FORGET, CORPUS, 7, "random", seed=3) != pair(FORGET, CORPUS, 7, "random", seed=4)
    assert all(len(set(row)) == 7 for row in first)
    assert len({tuple(row) for row in first}) == len(FORGET)
    assert pair(FORGET[:2], CORPUS, 7, "random", seed=3) == first[:2]


# ---- what is refused


def test_too_few_texts_to_choose_from_are_counted():
    with pytest.raises(UnlearnError, match="neighbours must be <= 2, got 3: 2 of 4 retain texts are near"):
        pair(FORGET, [*CORPUS[:2], *FORGET[:2]], 3)
    with pytest.raises(UnlearnError, match="neighbours must be <= 0, got 1: 0 of 0"):
        pair(FORGET, [], 1, "random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "neighbours must be >= 1, got 0"),
        ({"method": "closest"}, "pairing must be .* got 'closest'"),
        ({"corpus": ["?!", "…"]}, "pairing: no retain text has a word"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UnlearnError, match=message):
        pair(**{"forget": FORGET, "corpus": CORPUS, **options})


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("sklearn.feature_extraction.text", {}, r'sklearn.* cannot be imported .* pip install "slug-lightning\[lm\]"'),
        ("sentence_transformers", {"encoder": "all-MiniLM-L6-v2"}, "cannot import .* pip install sentence-transformers"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_how_to_install_it(monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnlearnError, match=message):
        pair(FORGET, CORPUS, **options)
    assert pair(FORGET, CORPUS, method="random")  # needs none


# ---- on the disk


@pytest.fixture
def counting(monkeypatch):
    """How often pairs were made."""
    made: list[int] = []
    monkeypatch.setattr(pairing, "near_duplicates", lambda *args: made.append(1) or near_duplicates(*args))
    return made


def test_pairs_are_made_once_and_anew_where_anything_differs(tmp_path, counting):
    def found(forget=FORGET, corpus=CORPUS, k=2, method="nearest", seed=0):
        return pair(forget, corpus, k, method, cache=tmp_path / "pairs", seed=seed)

    assert found() == found() == pair(FORGET, CORPUS, 2)
    assert len(counting) == 2  # one for the disk, one without
    others = [{"forget": FORGET[1:]}, {"corpus": CORPUS[1:]}, {"k": 3}, {"method": "random"}, {"method": "random", "seed": 1}]
    expected = [found(**other) for other in others]
    assert len(counting) == 2 + len(others)
    assert [found(**other) for other in others] == expected
    assert len(counting) == 2 + len(others)
    kept = list((tmp_path / "pairs").iterdir())
    assert len(kept) == 1 + len(others) and all(path.suffix == ".safetensors" for path in kept)


def other_pairs(content: bytes) -> bytes:
    at = content.index(b'"data":"[[') + 10
    return content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], other_pairs, lambda _: b"", lambda _: b"[]", lambda _: b"[" * 99999],
    ids=["truncated", "altered", "empty", "a list", "deep"],
)
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    first = pair(FORGET, CORPUS, 2, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="Ignoring cache file .* its content is computed again"):
        assert pair(FORGET, CORPUS, 2, cache=tmp_path) == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pair(FORGET, CORPUS, 2, cache=tmp_path) == first  # the file is whole again


def test_a_file_of_other_texts_under_this_name_is_not_used(tmp_path):
    pair(FORGET, CORPUS, 2, "random", cache=tmp_path / "random")
    first = pair(FORGET, CORPUS, 2, cache=tmp_path / "nearest")
    (other,), (path,) = (tmp_path / "random").iterdir(), (tmp_path / "nearest").iterdir()
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="belongs to another key"):
        assert pair(FORGET, CORPUS, 2, cache=tmp_path / "nearest") == first


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Cannot write cache file"):
        assert pair(FORGET, CORPUS, 2, cache=tmp_path / "file") == pair(FORGET, CORPUS, 2)


# ---- by sentence-transformers


def build_encoder(folder, seed: int):
    """A tiny BERT with random weights, with the mean of its outputs as the vector of a text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sentence_transformers = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.models")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS) + 2, initializer_range=1.0, **sizes)).save_pretrained(folder / "bert")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "bert")
    transformer = parts.Transformer(str(folder / "bert"))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, parts.Pooling(16)], device="cpu")
    model.save(str(folder / "encoder"))
    return str(folder / "encoder"), model


def test_the_nearest_by_sentence_embeddings(tmp_path, capfd):
    encoder, model = build_encoder(tmp_path, 0)
    capfd.readouterr()
    found = pair(FORGET, CORPUS, 3, encoder=encoder)
    assert "Batches" not in capfd.readouterr().err
    vectors = [model.encode(some, normalize_embeddings=True, show_progress_bar=False) for some in (FORGET, CORPUS)]
    similar = vectors[0] @ vectors[1].T
    for row, own in zip(found, similar, strict=True):
        assert own[row] == pytest.approx(np.sort(own)[::-1][:3], abs=1e-5)
    assert found != pair(FORGET, CORPUS, 3)
    pair(FORGET, CORPUS, 3, encoder=encoder, verbose=True)
    assert "Batches" in capfd.readouterr().err


def test_another_encoder_in_the_same_folder_is_another_one(tmp_path, counting):
    encoder, _ = build_encoder(tmp_path, 0)
    first = pair(FORGET, CORPUS, 3, encoder=encoder, cache=tmp_path / "pairs")
    assert pair(FORGET, CORPUS, 3, encoder=encoder, cache=tmp_path / "pairs") == first and len(counting) == 1
    build_encoder(tmp_path, 1)
    assert pair(FORGET, CORPUS, 3, encoder=encoder, cache=tmp_path / "pairs") != first and len(counting) == 2


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnlearnError, match="encoder: .*empty' cannot be loaded"):
        pair(FORGET, CORPUS, encoder=str(tmp_path / "empty"))

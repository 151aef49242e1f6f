"""What is gathered of passages, and the bounds by which they count as forgotten."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from test_lm_completion import Calls, made, partly_known, slow_accuracy, slow_complete, slow_likelihood

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.completion import complete_prefixes, teacher_forced
from slug_lightning.lm.criteria import (
    BertScoreBelow,
    BleuBelow,
    Criterion,
    Evidence,
    ExtractionBelow,
    MemorizationBelow,
    ProbabilityBelow,
    _spread,
    gather,
)
from slug_lightning.lm.metrics import extraction_likelihood
from slug_lightning.lm.sequences import pad


def evidence(completion: str = "a b c d", truth: str = "a b c d", **options) -> Evidence:
    given = {"memorization_accuracy": 0.5, "nll": math.log(4), "extraction_likelihood": 0.5, **options}
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


class Decoder:
    """A tokenizer without a padding token."""

    pad_token_id = None

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return " ".join(f"w{token}" for token in tokens)


# ---- what is gathered


@pytest.mark.parametrize("el", [1, 2])
def test_what_is_gathered_equals_the_slow_way(el):
    model = made("llama")
    passages = partly_known(model, [12, 9, 12])
    model.train()
    found = gather(model, Decoder(), passages, prefix=5, batch_size=2, el=el)
    assert model.training
    model.eval()
    for e, passage in zip(found, passages, strict=True):
        row = passage.tolist()
        said = slow_complete(model, row[:5], len(row) - 5)
        assert (e.completion_tokens.tolist(), e.truth_tokens.tolist()) == (said, row[5:])
        texts = [" ".join(f"w{token}" for token in part) for part in (row[:5], row[5:], said)]
        assert [e.prefix, e.truth, e.completion] == texts
        assert e.memorization_accuracy == torch.tensor(slow_accuracy(model, row)).item()
        assert e.extraction_likelihood == torch.tensor(slow_likelihood(model, row, el)).item()
        assert e.nll == pytest.approx(model(input_ids=passage[None], labels=passage[None]).loss.item(), rel=1e-5)


def test_a_real_tokenizer_without_padding_token_will_do():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(29)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w28")
    assert tokenizer.pad_token is None
    model = made("llama")
    found = gather(model, tokenizer, partly_known(model, [12, 9]), prefix=5, batch_size=2, el=2)
    assert [e.prefix for e in found] == [tokenizer.decode(p[:5].tolist()) for p in partly_known(model, [12, 9])]
    assert [len(e.truth.split()) for e in found] == [7, 4]


def test_passages_that_are_recited_cost_one_forward():
    model = made("llama")
    passages = [torch.tensor([i, *slow_complete(model, [i], 13)]) for i in range(4)]
    calls = Calls(model)
    found = gather(model, Decoder(), passages, prefix=5, batch_size=4, el=10)
    assert calls.shapes == [(4, 14)]
    assert all(e.completion == e.truth and e.memorization_accuracy == 1 and e.extraction_likelihood == 1 for e in found)


def test_one_prefix_estimates_the_extraction_likelihood_for_nothing():
    model = made("llama")
    passages = partly_known(model, [14, 14])
    calls = Calls(model)
    plain = complete_prefixes(model, passages, teacher_forced(model, passages, 28)[0], [[6], [6]], 28)
    without, calls.shapes = calls.shapes, []
    estimates = gather(model, Decoder(), passages, prefix=6, batch_size=2, el=2, prefixes=1)
    assert calls.shapes == without
    for said, estimated, passage in zip(plain, estimates, passages, strict=True):
        assert torch.equal(estimated.completion_tokens, said[0])
        assert estimated.extraction_likelihood == extraction_likelihood([said], pad([passage]), 2, [[6]]).item()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_prefixes_are_spread_evenly_and_one_is_the_prefix(longest, prefix, count):
    lengths = _spread(longest, prefix, count)
    assert len(lengths) == len(set(lengths)) == min(count, longest)
    assert lengths[0] >= 1 and lengths == sorted(lengths) and lengths[-1] <= longest
    assert prefix in lengths or prefix > longest
    gaps = [b - a for a, b in zip([0, *lengths], [*lengths, longest + 1], strict=True)]
    assert max(gaps) <= 2 * longest / len(lengths) + 1


def test_all_prefixes_asked_for_are_no_estimate():
    model = made("llama")
    passages = partly_known(model, [12, 9])
    exact, same = (
        [e.extraction_likelihood for e in gather(model, Decoder(), passages, 5, 2, el=2, prefixes=count)] for count in (None, 10)
    )
    assert exact == same


@pytest.mark.parametrize(("prefix", "el", "message"), [
    (0, 2, "prefix=0"), (6, 2, "prefix=6, el=2: .* got 6 tokens"), (3, 6, "prefix=3, el=6: .* got 6 tokens"),
])  # fmt: skip
def test_passages_that_are_too_short_are_refused(prefix, el, message):
    with pytest.raises(UnlearnError, match=message):
        gather(made("llama"), Decoder(), [torch.arange(8), torch.arange(6)], prefix, 2, el=el)


def test_no_passages_are_no_evidence():
    assert gather(made("llama"), Decoder(), [], 3, 2, el=2) == []


def test_a_model_that_has_diverged_is_not_taken_for_one_that_has_forgotten():
    model = made("llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UnlearnError, match="training has diverged"):
        gather(model, Decoder(), [torch.arange(8)], 3, 2, el=2)


# ---- criteria


def test_each_criterion_takes_its_value_from_the_evidence():
    found = [evidence(), evidence("x", memorization_accuracy=0.25, nll=0.0, extraction_likelihood=0.125)]
    assert BleuBelow().values(found) == [1, 0]
    assert MemorizationBelow().values(found) == [0.5, 0.25]
    assert ProbabilityBelow().values(found) == [pytest.approx(0.25), 1]
    assert ExtractionBelow().values(found) == [0.5, 0.125]


def test_at_the_bound_is_forgotten_and_not_a_number_is_not():
    assert MemorizationBelow().forgotten([0.0, 0.5, 0.51, math.nan], 0.5) == [True, True, False, False]
    assert BleuBelow("unseen").forgotten([0.0, 0.1], 0.0) == [True, False]  # where unseen passages have none in common


@pytest.mark.parametrize("below", [-0.1, 1.1, math.nan, math.inf, "seen", None])
@pytest.mark.parametrize("kind", [BleuBelow, MemorizationBelow, ExtractionBelow, ProbabilityBelow])
def test_a_bound_that_makes_no_sense_is_refused(kind, below):
    with pytest.raises(UnlearnError, match=rf"{kind.__name__}: below must be in \[0, 1\] or 'unseen', got {below!r}"):
        kind(below=below)


def test_criteria_come_from_a_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--forgotten", type=list[Criterion])
    path = "slug_lightning.lm.criteria"
    config = parser.parse_object({"forgotten": [
        {"class_path": f"{path}.BleuBelow"},
        {"class_path": f"{path}.ExtractionBelow", "init_args": {"below": 0.25}},
        {"class_path": f"{path}.MemorizationBelow", "init_args": {"below": "unseen"}},
    ]})  # fmt: skip
    made_of_it = parser.instantiate_classes(config).forgotten
    assert made_of_it == [BleuBelow(0.01), ExtractionBelow(below=0.25), MemorizationBelow("unseen")]


# ---- BERTScore


def test_bert_score_compares_each_pair_by_itself(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = bert(tmp_path)
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def embedded(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0, 1:-1]
        return states / states.norm(dim=1, keepdim=True)

    texts = [("a b c d e f", "a c"), ("a", "b c d"), ("e f g", "e f g"), ("a b " * 40, "c d " * 50), ("a b c", "d e f g h")]
    expected = []
    for said, true in texts:
        cosines = embedded(said) @ embedded(true).T
        precision, recall = cosines.max(1).values.mean().item(), cosines.max(0).values.mean().item()
        expected.append(2 * precision * recall / (precision + recall))
    criterion = BertScoreBelow(model=folder)
    for _ in range(2):  # as after every epoch
        values = criterion.values([evidence(*pair) for pair in texts])
        assert values == pytest.approx(expected, abs=1e-5)
    assert criterion.values([evidence(""), evidence("a", " ")]) == [0, 0]


def test_bert_score_without_its_model_says_so(tmp_path):
    with pytest.raises(UnlearnError, match="cannot be loaded; give a folder"):
        BertScoreBelow(model=str(tmp_path / "nothing")).values([evidence()])

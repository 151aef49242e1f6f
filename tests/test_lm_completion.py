"""Completions, alone and of every prefix, against token-by-token generation without cache, batch or padding."""

from __future__ import annotations

import math

import pytest
import torch
from _amounts import examples, sample
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.completion import BATCH_TOKENS, complete, complete_prefixes, teacher_forced
from slug_lightning.lm.metrics import extraction_likelihood, memorization_accuracy
from slug_lightning.lm.sequences import counted, pad

pytestmark = pytest.mark.uncovered

VOCABULARY, LONGEST = 29, 24
TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**TINY, "num_key_value_heads": 1, "max_position_embeddings": LONGEST}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": LONGEST, "n_embd": 16, "n_layer": 2, "n_head": 2}
KINDS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),  # learned positions, tied embeddings
    "gpt-neox": ("GPTNeoXForCausalLM", {**TINY, "max_position_embeddings": LONGEST}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    # Attention that sees four tokens only: distances in a padded batch must be the true ones.
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 4}),
    "gpt-neo": ("GPTNeoForCausalLM", {
        "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
    }),
    # Positions from the mask, no `position_ids`.
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
}  # fmt: skip


def made(kind: str, eos: int | list[int] | None = None, seed: int = 0) -> nn.Module:
    """A model with large random weights, so that it says many things and is never undecided between two."""
    import transformers

    name, options = KINDS[kind]
    model = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model(model.config_class(**options, bos_token_id=None, eos_token_id=eos, pad_token_id=None))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.5)
    return model.eval()


def predictions(model: nn.Module, sequences: dict) -> Tensor:
    return pad(teacher_forced(model, counted(sequences))[0])["input_ids"]


def complete_every_prefix(model: nn.Module, sequences: dict, leave: int = 1, batch_tokens: int = BATCH_TOKENS) -> list:
    """Completions of the first 1, 2, … tokens of each sequence that leave at least so many."""
    rows = counted(sequences)
    lengths = [range(1, len(row) - leave + 1) for row in rows]
    return complete_prefixes(model, rows, teacher_forced(model, rows, batch_tokens)[0], lengths, batch_tokens)


def slow_complete(model: nn.Module, tokens: list[int], count: int, ends: set[int] = frozenset()) -> list[int]:
    """Token by token, everything anew."""
    added: list[int] = []
    with torch.no_grad():
        while len(added) < count and not ends & set(added):
            added.append(model(input_ids=torch.tensor([tokens + added])).logits[0, -1].argmax().item())
    return added


def slow_accuracy(model: nn.Module, row: list[int]) -> float:
    hits = [slow_complete(model, row[:t], 1) == [row[t]] for t in range(1, len(row))]
    return sum(hits) / len(hits)


def slow_likelihood(model: nn.Module, row: list[int], n: int, ends: set[int] = frozenset()) -> float:
    total = 0.0
    for t in range(1, len(row) - n + 1):
        said, rest = slow_complete(model, row[:t], len(row) - t, ends), row[t:]
        grams = [said[i : i + n] for i in range(len(said) - n + 1)]
        true = [rest[i : i + n] for i in range(len(rest) - n + 1)]
        total += sum(gram in true for gram in grams) / len(grams) if grams else 0.0
    return total / (len(row) - n)


def partly_known(model: nn.Module, lengths: list[int], seed: int = 1) -> list[Tensor]:
    """Sequences that the model predicts right in part: its own text, with every fourth token or so drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        row = [int(torch.randint(VOCABULARY, (), generator=draw))]
        while len(row) < length:
            known = torch.rand((), generator=draw) < 0.75
            row += slow_complete(model, row, 1) if known else torch.randint(VOCABULARY, (1,), generator=draw).tolist()
        rows.append(torch.tensor(row))
    return rows


class Calls:
    """Counts forwards, and the tokens that each of them looks at."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if "attention_mask" in kwargs:  # the slow way has none
            self.shapes.append(tuple(kwargs["attention_mask"].shape))


def as_lists(completions: list) -> list:
    return [[tokens.tolist() for tokens in of_one] for of_one in completions]


@pytest.mark.parametrize("kind", sample(KINDS, [kind for kind in KINDS if kind not in ("llama", "qwen2")]))
def test_everything_equals_the_slow_way(kind):
    model = made(kind)
    rows = partly_known(model, [12, 7, 2, 12, 9])
    sequences = pad(rows, pad_id=3)
    accuracies = memorization_accuracy(predictions(model, sequences), sequences)
    assert torch.equal(accuracies, torch.tensor([slow_accuracy(model, row.tolist()) for row in rows]))
    assert 0 < accuracies[0] < 1  # both cases occur
    counts = [9, 4, 0, 1, 6]
    alone = [slow_complete(model, row.tolist(), count) for row, count in zip(rows, counts, strict=True)]
    every = [[slow_complete(model, row[:t].tolist(), len(row) - t) for t in range(1, len(row))] for row in rows]
    for batch_tokens in (1, 64, 10**6):
        assert as_lists([complete(model, rows, counts, batch_tokens)]) == [alone]
        assert as_lists(complete_every_prefix(model, sequences, batch_tokens=batch_tokens)) == every


@pytest.mark.parametrize("kind", sample(["llama", "gpt2", "gpt-neox", "qwen2"], ["gpt2", "qwen2"]))
def test_extraction_likelihood_equals_the_slow_way(kind):
    model = made(kind)
    rows = partly_known(model, [14, 8, 11], seed=2)
    sequences = pad(rows)
    for n in (1, 3):
        values = extraction_likelihood(complete_every_prefix(model, sequences, leave=n), sequences, n)
        assert torch.equal(values, torch.tensor([slow_likelihood(model, row.tolist(), n) for row in rows]))
        assert 0 < values.min() < 1


def test_a_model_that_recites_needs_one_forward_and_no_generation():
    model = made("llama")
    rows = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    calls, sequences = Calls(model), pad(list(rows))
    every = complete_every_prefix(model, sequences, leave=10)
    assert calls.shapes == [(3, 16)]
    assert as_lists(every) == [[row[t:].tolist() for t in range(1, 7)] for row in rows]
    assert extraction_likelihood(every, sequences).tolist() == [1, 1, 1]
    for row in rows.tolist():
        assert slow_accuracy(model, row) == slow_likelihood(model, row, 10) == 1


def test_one_generation_for_each_wrong_prediction_and_none_for_the_last_token():
    model = made("llama")
    row = torch.tensor([5, *slow_complete(model, [5], 10)])
    for at in (3, 7, 11 - 1):
        row[at] = (slow_complete(model, row[:at].tolist(), 1)[0] + 1) % VOCABULARY
        row[at + 1 :] = torch.tensor(slow_complete(model, row[: at + 1].tolist(), 10 - at), dtype=torch.long)
    predicted, _ = teacher_forced(model, [row])
    wrong = [t for t in range(1, 11) if predicted[0][t - 1] != row[t]]
    assert wrong == [3, 7, 10]
    calls = Calls(model)
    found = complete_prefixes(model, [row], predicted, [range(1, 11)])
    # After the wrong tokens 3 and 7 together; token 10 is the last one. The first forward has 8 tokens, each more adds one.
    assert calls.shapes == [(2, width) for width in range(8, 8 + 7)]
    assert as_lists(found) == [[slow_complete(model, row[:t].tolist(), 11 - t) for t in range(1, 11)]]


@pytest.mark.parametrize("eos", [0, [0, 3]])
def test_a_completion_ends_with_the_models_end_of_sequence(eos):
    model = made("gpt2", eos)
    ends = {eos} if isinstance(eos, int) else set(eos)
    rows = [torch.tensor([4, 0, 9, 0, 0, 8, 2]), *partly_known(model, [12] * 6, seed=3)]
    known = slow_complete(model, rows[1][:4].tolist(), 8)
    rows.append(torch.tensor([*rows[1][:4], *known[:2], *ends, *known[2:]]))
    # An end that is predicted right: the model's own text goes through it.
    free = slow_complete(model, [11], 20)
    model.generation_config.eos_token_id = [*ends, free[4]]
    ends.add(free[4])
    rows.append(torch.tensor([11, *free[:9]]))
    every = complete_every_prefix(model, pad(rows))
    slow = [[slow_complete(model, r[:t].tolist(), len(r) - t, ends) for t in range(1, len(r))] for r in rows]
    assert as_lists(every) == slow
    assert any(len(said) < len(rows[i]) - t for i, of_one in enumerate(slow) for t, said in enumerate(of_one, 1))
    assert slow[-1][0] == free[: free.index(free[4]) + 1]


def test_generation_stops_when_every_completion_has_ended():
    model = made("llama")
    model.generation_config.eos_token_id = slow_complete(model, [5, 6], 2)[1]
    calls = Calls(model)
    ends = {model.generation_config.eos_token_id}
    assert [t.tolist() for t in complete(model, [torch.tensor([5, 6])], [15])] == [slow_complete(model, [5, 6], 15, ends)]
    assert len(calls.shapes) <= 2


@examples(20)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_every_prefix_of_any_sequences_equals_the_slow_way(rows, n, data):
    import transformers

    torch.manual_seed(data.draw(st.integers(0, 3)))
    eos = data.draw(st.sampled_from([None, 0]))
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{**GPT2, "vocab_size": 5, "n_layer": 1, "initializer_range": 0.5}, bos_token_id=None, eos_token_id=eos
        )
    ).eval()
    ends = set() if eos is None else {eos}
    every = complete_every_prefix(model, pad([torch.tensor(row) for row in rows]), batch_tokens=40)
    assert as_lists(every) == [[slow_complete(model, row[:t], len(row) - t, ends) for t in range(1, len(row))] for row in rows]
    long = [i for i, row in enumerate(rows) if len(row) > n]
    if long:
        values = extraction_likelihood(
            [every[i][: len(rows[i]) - n] for i in long], pad([torch.tensor(rows[i]) for i in long]), n
        )
        assert torch.equal(values, torch.tensor([slow_likelihood(model, rows[i], n, ends) for i in long]))


@examples(20)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 60))
def test_no_forward_has_more_tokens_than_allowed_unless_one_sequence_has(lengths, batch_tokens):
    model = made("llama")
    rows = [torch.full((length,), i) for i, length in enumerate(lengths)]
    calls = Calls(model)
    complete(model, rows, [3] * len(rows), batch_tokens)
    predicted, nll = teacher_forced(model, rows, batch_tokens)
    assert all(count * width <= batch_tokens or count == 1 for count, width in calls.shapes)
    for row, best, loss in zip(rows, predicted, nll, strict=True):
        assert len(best) == len(row) - 1
        one = model(input_ids=row[None], labels=row[None]).loss.item() if len(row) > 1 else 0.0
        assert loss == pytest.approx(one, rel=1e-4)


def test_the_generation_config_does_not_alter_what_is_greedy():
    model = made("llama")
    plain = complete(model, [torch.tensor([5, 6, 7])], [15])
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, top_k=2, num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1,
        suppress_tokens=plain[0].tolist(), min_new_tokens=20, max_length=4, cache_implementation="static",
    )  # fmt: skip
    assert torch.equal(complete(model, [torch.tensor([5, 6, 7])], [15])[0], plain[0])


def test_a_model_in_training_is_measured_without_dropout_and_left_as_it_was():
    model = made("gpt2")
    rows = partly_known(model, [10, 6])
    expected = as_lists(complete_every_prefix(model, pad(rows)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    model.train()
    model.transformer.h[0].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.enable_grad():
        assert as_lists(complete_every_prefix(model, pad(rows))) == expected
        assert torch.equal(predictions(model, pad(rows)), predictions(model.eval(), pad(rows)))
    assert torch.equal(torch.get_rng_state(), random)
    model.train()
    model.transformer.h[0].eval()
    complete(model, rows, [3, 3])
    assert [module.training for module in model.modules()] == modes
    model(input_ids=rows[0][None], labels=rows[0][None]).loss.backward()  # nothing is left of inference
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_runs_inside_what_a_trainer_wraps_around_validation(context):
    model = made("llama")
    rows = partly_known(model, [12, 12, 9])
    with context():
        every = as_lists(complete_every_prefix(model, pad(rows)))
        assert every == [[slow_complete(model, r[:t].tolist(), len(r) - t) for t in range(1, len(r))] for r in rows]


def test_adapters_of_peft_are_part_of_the_model():
    from peft import LoraConfig, get_peft_model

    model = made("gpt2")
    rows = partly_known(model, [10, 7])
    before = as_lists(complete_every_prefix(model, pad(rows)))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    every = as_lists(complete_every_prefix(adapted, pad(rows)))
    adapted.eval()
    assert every == [[slow_complete(adapted, row[:t].tolist(), len(row) - t) for t in range(1, len(row))] for row in rows]
    assert every != before


def test_a_wrapper_that_names_no_arguments_changes_nothing():
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.device, self.config = model, model.device, model.config

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    model = made("gpt2")  # learned positions: without position_ids, padding on the left would shift them
    rows = partly_known(model, [10, 4])
    assert as_lists([complete(Wrapper(model), rows, [5, 5])]) == as_lists([complete(model, rows, [5, 5])])


def test_what_stands_in_the_padding_makes_no_difference():
    model = made("gpt2")
    rows = partly_known(model, [10, 4])
    found = [as_lists(complete_every_prefix(model, pad(rows, pad_id=filler))) for filler in (0, 7)]
    assert found[0] == found[1]


def test_the_longest_prefix_leaves_as_much_as_is_asked_for():
    model = made("llama")
    rows = partly_known(model, [10, 3])
    every = as_lists(complete_every_prefix(model, pad(rows)))
    assert as_lists(complete_every_prefix(model, pad(rows), leave=3)) == [every[0][:7], []]


def test_the_mean_loss_of_a_token_is_in_nats():
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert teacher_forced(model, [torch.tensor([1, 2, 3]), torch.tensor([4])])[1] == [pytest.approx(math.log(VOCABULARY)), 0]


def test_an_empty_prefix_is_refused_and_nothing_to_do_is_nothing():
    model = made("llama")
    with pytest.raises(UnlearnError, match="prefixes: .* one is empty"):
        complete(model, [torch.tensor([1]), torch.tensor([], dtype=torch.long)], [1, 1])
    assert complete(model, [], []) == []
    assert complete(model, [torch.tensor([1])], [0])[0].tolist() == []


def test_a_model_without_a_cache_of_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1))
    with pytest.raises(UnlearnError, match="MambaForCausalLM has no cache of keys and values"):
        complete(model, [torch.tensor([1, 2])], [2])

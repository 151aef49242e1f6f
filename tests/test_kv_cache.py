"""The cache of keys and values under the name of before and under the one since transformers 5.24."""

from types import SimpleNamespace

import pytest
import torch
from test_lm_completion import made
from torch import nn

from slug_lightning.lm.completion import complete
from slug_lightning.lm.models import cache_argument, cache_of
from slug_lightning.modules import EmbeddedVLM


class Respelled(nn.Module):
    """A model that takes and gives its cache under one name, whatever the installed transformers calls it."""

    def __init__(self, own):
        super().__init__()
        self.hidden = [own]  # no submodule: what its own forward takes must not be seen
        self.device, self.config, self.calls_with_cache = own.device, own.config, 0

    def run(self, cache, **inputs):
        own = self.hidden[0]
        self.calls_with_cache += cache is not None
        return own(**inputs, **{cache_argument(own): cache})


class Old(Respelled):
    def forward(self, input_ids, attention_mask, position_ids, use_cache, past_key_values=None):
        output = self.run(past_key_values, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return SimpleNamespace(logits=output.logits, past_key_values=cache_of(output))


class New(Respelled):
    class Output(SimpleNamespace):
        @property
        def past_key_values(self):
            raise AssertionError("the old name was asked for, of which transformers would warn")

    def forward(self, input_ids, attention_mask, position_ids, use_cache, cache=None):
        output = self.run(cache, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return self.Output(logits=output.logits, cache=cache_of(output))


@pytest.mark.parametrize("kind", [Old, New])
def test_completions_are_the_same_under_both_names(kind):
    model, prefixes = made("llama"), [torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9])]
    respelled = kind(model)
    expected, found = complete(model, prefixes, [6, 8]), complete(respelled, prefixes, [6, 8])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert respelled.calls_with_cache == 7  # all but the first


def test_a_cache_without_keys_is_none():
    """Generation would go on without one: the padding on the left is masked for attention alone."""
    keys, states = SimpleNamespace(keys=None), SimpleNamespace(recurrent_states=None)
    attention, mixed, state_space = (SimpleNamespace(layers=layers) for layers in ([keys], [states, keys], [states]))
    assert cache_of(SimpleNamespace(cache=attention)) is attention and cache_of(SimpleNamespace(cache=mixed)) is mixed
    for output in ({"cache": state_space}, {"cache": object()}, {"cache": None}, {"past_key_values": None}, {}):
        assert cache_of(SimpleNamespace(**output)) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_choices_are_scored_the_same_under_both_names(name, monkeypatch):
    module = EmbeddedVLM().eval()
    pictures = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"image": pictures, "question": ["what is this?"] * 2, "choices": [["cat", "alarm clock"], ["owl"]]}
    own, real = type(module.model).forward, cache_argument(module.model)
    with torch.no_grad():
        expected = module._likely(batch)

    def named(self, cache, inputs):
        output = own(self, **inputs, **{real: cache})
        return SimpleNamespace(logits=output.logits, **{name: cache_of(output)})

    forwards = {
        "cache": lambda self, cache=None, **inputs: named(self, cache, inputs),
        "past_key_values": lambda self, past_key_values=None, **inputs: named(self, past_key_values, inputs),
    }
    monkeypatch.setattr(type(module.model), "forward", forwards[name])
    with torch.no_grad():
        found = module._likely(batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

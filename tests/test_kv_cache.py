"""The cache of keys and values under the name of before and under the one since transformers 5.24."""

from types import SimpleNamespace

import pytest
import torch
from test_lm_completion import made
from torch import nn

from slug_lightning.lm.completion import complete
from slug_lightning.lm.kv_cache import cache_argument, cache_of


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
    keys, states = SimpleNamespace(keys=None), SimpleNamespace(recurrent_states=None)
    attention, mixed, state_space = (SimpleNamespace(layers=layers) for layers in ([keys], [states, keys], [states]))
    assert cache_of(SimpleNamespace(cache=attention)) is attention and cache_of(SimpleNamespace(cache=mixed)) is mixed
    assert cache_of(SimpleNamespace(cache=state_space)) is cache_of(SimpleNamespace()) is None

"""Which tensors count as layers, how they are grouped, and what is said when a pattern is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.layers import find_layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})


class Transformer(nn.Module):
    """Two blocks, embeddings, a position matrix, a scale and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.positional_embedding = nn.Parameter(torch.ones(6, 4))
        self.logit_scale = nn.Parameter(torch.ones(1, 1))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


BLOCK = ["attention.q", "attention.k", "attention.v", "mlp.fc1", "mlp.fc2"]
MATRICES = [f"blocks.{b}.{part}.weight" for b in (0, 1) for part in BLOCK] + ["head.weight"]


def names(*args, **options) -> list[str]:
    return [layer.name for layer in find_layers(*args, **options)]


def test_by_default_every_weight_matrix_is_a_layer_and_nothing_else():
    assert names(Transformer()) == MATRICES


def test_each_layer_holds_the_models_own_parameter():
    model = Transformer()
    for layer in find_layers(model):
        assert list(layer.parameters) == [layer.name]
        assert layer.parameters[layer.name] is model.get_parameter(layer.name)
        assert layer.tower == "model"


def test_convolutions_are_layers():
    assert names(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))) == ["0.weight"]


def test_a_module_group_is_named_after_the_module():
    assert names(Transformer(), granularity="module") == [name.removesuffix(".weight") for name in MATRICES]


def test_an_exactly_named_bias_joins_the_group_of_its_module():
    (layer,) = find_layers(Transformer(), ["head.weight", "blocks.0.mlp.fc1.*", "blocks.0.mlp.fc1.bias"], "module")[:1]
    assert layer.name == "blocks.0.mlp.fc1"
    assert list(layer.parameters) == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"]


def test_siblings_are_the_modules_that_share_a_parent():
    groups = {layer.name: list(layer.parameters) for layer in find_layers(Transformer(), granularity="siblings")}
    assert groups["blocks.1.attention"] == [f"blocks.1.attention.{x}.weight" for x in "qkv"]
    assert groups["blocks.1.mlp"] == ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"]
    assert len(groups) == 5  # two a block, and the root's
    assert ["head.weight"] in groups.values()


@pytest.mark.parametrize("granularity", ["tensor", "module", "siblings"])
def test_every_granularity_covers_the_same_tensors_once(granularity):
    covered = [name for layer in find_layers(Transformer(), granularity=granularity) for name in layer.parameters]
    assert sorted(covered) == sorted(MATRICES)


def test_a_tensor_under_two_names_counts_once():
    shared = nn.Linear(4, 4)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.weight"]


def test_a_head_tied_to_an_embedding_is_left_out_like_it():
    assert names(Transformer(tied=True)) == MATRICES[:-1]


def test_frozen_tensors_are_left_out():
    model = Transformer()
    model.blocks[0].requires_grad_(False)
    assert names(model) == MATRICES[len(BLOCK) :]


def test_a_pattern_that_matches_nothing_but_frozen_tensors_means_these():
    model = Transformer()
    model.blocks[0].requires_grad_(False)
    assert names(model, "blocks.0.*") == MATRICES[: len(BLOCK)]
    assert names(model, "blocks.0.mlp.fc1.weight") == ["blocks.0.mlp.fc1.weight"]
    assert names(model, "blocks.*") == MATRICES[len(BLOCK) : -1]
    assert names(model, ["*", "blocks.0.mlp.fc1.*"]) == ["blocks.0.mlp.fc1.weight", *MATRICES[len(BLOCK) :]]


def test_integers_are_no_layers():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnlearnError, match="'weight'.*integers"):
        names(model, "weight")


@pytest.mark.parametrize("name", ["tokens.weight", "positional_embedding", "logit_scale", "blocks.0.norm.weight", "head.weight"])
def test_a_tensor_named_exactly_counts_whatever_it_is(name):
    assert names(Transformer(), name) == [name]


@pytest.mark.parametrize("pattern", ["tokens.*", "positional*", "logit_s*", "*.norm.*", "*.bias"])
def test_a_wildcard_brings_in_no_embedding_vector_or_scale(pattern):
    with pytest.raises(UnlearnError, match="name one exactly"):
        find_layers(Transformer(), pattern)


def test_names_that_merely_contain_such_a_word_stay():
    model = nn.ModuleDict({"composition": nn.Linear(2, 2), "disposition_head": nn.Linear(2, 2)})
    assert names(model) == ["composition.weight", "disposition_head.weight"]


def test_several_patterns_join_without_doubles_in_the_models_order():
    assert names(Transformer(), ["head.*", "*.0.mlp.*", "blocks.0.mlp.fc1.weight"]) == [
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    ]


def test_a_wrong_pattern_is_refused_with_near_misses():
    with pytest.raises(UnlearnError, match=r"'heads\.wieght' matches no parameter; near misses: .*head\.weight"):
        find_layers(Transformer(), "heads.wieght")


def test_every_pattern_must_match_not_just_one():
    with pytest.raises(UnlearnError, match="'nothing.like.it'"):
        find_layers(Transformer(), ["head.weight", "nothing.like.it"])


def test_patterns_are_case_sensitive():
    with pytest.raises(UnlearnError, match="no parameter"):
        find_layers(Transformer(), "HEAD.*")


def test_only_frozen_candidates_are_refused_with_their_names():
    model = Transformer().requires_grad_(False)
    with pytest.raises(UnlearnError, match=r"all 11 candidates are frozen.*blocks\.0\.attention\.q\.weight.*and 6 more"):
        find_layers(model)


def test_towers_are_told_apart_and_the_rest_is_the_model():
    towers = {"first": "blocks.0.*", "second": "blocks.*"}
    found = {layer.name: layer.tower for layer in find_layers(Transformer(), towers=towers)}
    assert {name: tower for name, tower in found.items() if tower == "first"}.keys() == set(MATRICES[:5])
    assert {name: tower for name, tower in found.items() if tower == "second"}.keys() == set(MATRICES[5:10])
    assert found["head.weight"] == "model"


def two_towers() -> nn.Module:
    model = nn.Module()
    model.visual, model.text = nn.Module(), nn.Module()
    model.visual.proj = nn.Parameter(torch.ones(2, 2))
    model.text.proj = nn.Parameter(torch.ones(2, 2))
    return model


def test_a_group_never_spans_two_towers():
    found = find_layers(two_towers(), granularity="siblings", towers={"vision": "visual.*", "language": "text.*"})
    assert [layer.tower for layer in found] == ["vision", "language"]


def test_the_roots_own_tensors_are_not_mixed_with_those_of_a_submodule_called_model():
    root = nn.Module()
    root.model = nn.Linear(2, 2)
    root.mixing = nn.Parameter(torch.ones(2, 2))
    assert len(find_layers(root, granularity="module")) == 2

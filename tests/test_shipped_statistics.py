"""No matrix of the shipped models falls back to gradients of batches: each of its uses is found."""

from __future__ import annotations

import pytest
import torch

from _tiny import PlainRunner
from slug_lightning.modules import EmbeddedCanvas, EmbeddedClip, EmbeddedLM, EmbeddedVLM
from slug_lightning.objective.curvature import PARTS, Curvature
from slug_lightning.objective.factors import Dense
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import find_layers

NAMES = ["cat", "dog", "octopus"]


def pictures(size, kind=torch.float32):
    drawn = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    return drawn if kind is torch.float32 else (255 * drawn).to(kind)


def clip():
    module = EmbeddedClip()
    tokens = module.get_buffer("thing_tokens")[:3]
    return module, {"image": pictures(64), "text": tokens}


def canvas():
    return EmbeddedCanvas(), {"image": 2 * pictures(64) - 1, "text": [f"{name} in blob style" for name in NAMES]}


def vlm(objective):
    texts = {"question": ["what is this?"] * 3, "answer": NAMES, "text": NAMES}
    return EmbeddedVLM(objective), {"image": pictures(64, torch.uint8), **texts}


def lm():
    ids = torch.randint(1, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    return EmbeddedLM(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS = {"clip": clip, "canvas": canvas, "vlm, answers": lambda: vlm("answers"), "vlm, clip": lambda: vlm("clip"), "lm": lm}


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_has_factors_of_its_own(name, forward_only):
    module, batch = MODELS[name]()
    objective = Objective(module.eval(), {"retain": {"train": [batch]}}, PlainRunner())
    layers = find_layers(module, towers=module.towers)
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    parts = ["input_covariance"] if forward_only else list(PARTS)
    watch = Curvature(module, parameters, parts)
    if forward_only:
        objective.forward_statistics("retain", watch)
    else:
        objective.gradient("retain", parameters, watch)
    assert watch.statistics.fallbacks == {}
    for part in parts:
        factors = watch.statistics.factors[part]
        assert factors.keys() == parameters.keys()
        assert all(isinstance(factor, Dense) and factor.matrices.any() for factor in factors.values())

"""Second moments of layer inputs, against plain arithmetic, whoever runs the batches."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from _simulated import simulate
from torch import nn

from _tiny import PlainRunner
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.curvature import input_covariance
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import find_layers


class Tokens(pl.LightningModule):
    """Its layers see a vector for each token; the second one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def retain_step(self, batch, batch_idx):
        hidden = self.first(batch).tanh()
        return (self.second(self.second(hidden)) @ self.scale).square().mean()

    def forget_step(self, batch, batch_idx):
        return self.retain_step(batch + 1, batch_idx)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(1)).split([2, 2, 1]))


def covariance(kind="retain", processes=None, layers=("first.weight", "second.weight")):
    module = Tokens().eval()
    objective = Objective(module, {kind: {"train": batches()}}, PlainRunner(processes))
    found = input_covariance(objective, find_layers(module, list(layers)), kind)
    assert objective.forward_samples == 5 and not any(m._forward_pre_hooks for m in module.modules())
    return found


@pytest.mark.parametrize(("kind", "shift"), [("retain", 0.0), ("forget", 1.0)])
def test_it_is_the_mean_over_samples_of_the_sum_over_positions(kind, shift):
    module, inputs = Tokens(), torch.cat(batches()) + shift
    with torch.no_grad():
        hidden = module.first(inputs).tanh()
        seen = {"first.weight": [inputs], "second.weight": [hidden, module.second(hidden)]}
    for name, tensors in seen.items():
        expected = sum(x.double().flatten(0, 1).T @ x.double().flatten(0, 1) for x in tensors) / 5
        torch.testing.assert_close(covariance(kind)[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_same_however_many_processes_share_the_batches(count):
    alone = covariance()
    for found in simulate(count, lambda processes: covariance(processes=processes)):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_the_weight_of_a_linear_layer_is_named():
    with pytest.raises(UnlearnError, match="direction: scale isn't the weight of an nn.Linear"):
        covariance(layers=["first.weight", "scale"])


def test_a_sharded_model_is_refused():
    module, runner = Tokens(), PlainRunner()
    runner.is_sharded = True
    with pytest.raises(UnlearnError, match="input covariance of a sharded model isn't supported"):
        input_covariance(Objective(module, {}, runner), find_layers(module, "first.weight"), "retain")

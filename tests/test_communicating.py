"""Modules that communicate in their own steps, and meshes that the user has named."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from _callback import unlearn_callback
from _processes import Ended, in_processes
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from _tiny import Classifier, loader, trained, trainer


class Gathering(Classifier):
    """Asks the others in every step, as distributed losses do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.ones(1))


class OwnMesh(Classifier):
    """Sharded over a mesh with names of its own, with replicas where there are enough processes."""

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        count = int(os.environ["WORLD_SIZE"])
        shape, names = ((2, count // 2), ("replicate", "shard")) if count > 2 else ((count,), ("dp",))
        for part in (self.net[0], self.net[4], self.net[6]):
            fully_shard(part, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))


def forget(kind: type[Classifier], sharded: bool, **options: Any) -> tuple[str, float | None, dict[str, torch.Tensor]]:
    count = int(os.environ["WORLD_SIZE"])
    callback = unlearn_callback(
        loader(True, batch_size=40),
        loader(False, batch_size=7),
        forget_metric="val_acc",
        forget_target=0.25,
        retain_tolerance=9,
        **options,
    )
    strategy = ModelParallelStrategy(count, 1) if sharded else "ddp" if count > 1 else "auto"
    trainer(callback, devices=count, strategy=strategy).fit(trained(kind), loader(False), loader(False))
    assert callback.report is not None and callback.report.patch is not None
    assert (kind is Gathering and count > 1) == any("communicates in its steps" in note for note in callback.report.notes)
    return callback.report.layer, callback.report.step_size, callback.report.patch.edits[0].directions


@pytest.mark.parametrize(
    ("kind", "sharded", "count"),
    [(Gathering, False, 2), pytest.param(OwnMesh, True, 2, marks=pytest.mark.slow), (OwnMesh, True, 4)],
)
def test_it_gives_the_answer_of_one_device(kind, sharded, count):
    (alone,) = in_processes(1, forget, kind, False)
    assert not isinstance(alone, Ended), alone
    layer, step, directions = alone
    for found in in_processes(count, forget, kind, sharded, timeout=60):
        assert not isinstance(found, Ended), found
        assert found[0] == layer and found[1] == pytest.approx(step, rel=1e-5)
        for name, direction in directions.items():
            torch.testing.assert_close(found[2][name], direction, rtol=1e-4, atol=1e-8)


def test_frozen_layers_of_a_sharded_model_are_refused_by_name():
    found = in_processes(2, forget_frozen)
    assert all(isinstance(ended, Ended) and "frozen and sharded" in ended.message for ended in found)


class Frozen(OwnMesh):
    def configure_model(self) -> None:
        self.net[6].requires_grad_(False)
        super().configure_model()


def forget_frozen() -> Any:
    return forget(Frozen, True, layers="net.6.weight")

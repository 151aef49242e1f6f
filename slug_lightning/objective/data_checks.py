"""What must be refused before a run, and what tells the data of one run from those of another."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule

from slug_lightning.distributed.batch_sharding import DIFFERENT_BATCHES, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.log_capture import read_logs
from slug_lightning.objective.module_hooks import ModuleHooks
from slug_lightning.objective.objective import Kind, Objective, defines
from slug_lightning.tensors.digests import digest
from slug_lightning.utils.loaders import First


def refuse_unusable_steps(module: LightningModule) -> None:
    """Refuse a module whose loss cannot be had, before anything is computed.

    Raises:
        UnlearnError: if it uses manual optimization, since its `training_step` would then train the model, or if it has no
            step that gives a loss.
    """
    hooks = ModuleHooks(module)
    if hooks.forget_step and hooks.retain_step:
        return
    remedy = "define forget_step(batch, batch_idx) and retain_step(batch, batch_idx) that return the loss"
    if not module.automatic_optimization:
        raise UnlearnError(f"{type(module).__name__}: its training_step optimizes manually and would train the model; {remedy}")
    if not defines(module, "training_step"):
        raise UnlearnError(f"{type(module).__name__}: it has no training_step; {remedy}")


def rehearse(objective: Objective, kind: Kind) -> None:
    """Find out early what a long run would stumble over: open both splits, and see that the metrics are logged.

    Raises:
        UnlearnError: if a split is empty, a retain metric is never logged, or a step uses up an iterator of the module.
    """
    for split in ("val", "test"):
        if next(iter(objective.loaders[kind][split]), None) is None:
            raise UnlearnError(f"{kind}: the {split} set is empty; give at least one sample for it")
    names = objective.names[kind]
    if not all(name in objective.metrics for name in names):
        objective.measure(kind, "val", stop=lambda reader: all(name in reader.logged() for name in names))
    if any(objective.processes.all_gather_object("iterators", objective.state.holds_iterators())):
        _try_loss(objective, kind)


def _try_loss(objective: Objective, kind: Kind) -> None:
    """Run the step that will be differentiated on one batch."""
    with torch.no_grad(), objective.passing(), read_logs(objective.module), objective.runner.forward_context():
        for number, batch, _ in objective.runner.batches(First(objective.loaders[kind]["train"], 1)):
            objective.loss(kind, batch, number)


def refuse_different_data(objective: Objective) -> None:
    """Compare the first batch of every set across ranks, as each reads its own share of it.

    Raises:
        UnlearnError: if it differs, as where the files are listed in another order.
    """
    if objective.processes.world_size == 1:
        return
    for kind, splits in objective.loaders.items():
        for split in splits:
            if len(set(objective.processes.all_gather_object("the first batch", fingerprint(objective, kind, split)))) > 1:
                raise UnlearnError(f"{kind}: {DIFFERENT_BATCHES}")


def fingerprint(objective: Objective, kind: Kind, split: str) -> str:
    """Digest the tensors and plain values of the first batch."""
    alone = shard_batches(objective.loaders[kind][split], Processes.alone())  # of the whole set, not of this process's share
    # An object of an unknown kind counts by its type alone.
    return digest(next((one.batch for one in alone), None), lambda leaf: type(leaf).__qualname__)


def digest_of_data(objective: Objective, kind: Kind, split: str) -> str | None:
    """Digest everything that the steps see of one split, and how it is batched; all of it is read.

    Returns:
        The same in every process, or None if a batch holds an object that can't be digested.
    """
    told: list[tuple[int, str | None]] = []
    with nullcontext() if split == "train" else objective.runner.validating():
        for one in objective.runner.batches(objective.loaders[kind][split]):
            if one.is_real:
                told.append((one.batch_idx, _digest_or_none(one.batch)))
    found = sorted(itertools.chain(*objective.processes.all_gather_object("a digest of data", told, each_data_rank=True)))
    return None if any(batch is None for _, batch in found) else digest([batch for _, batch in found])


def _digest_or_none(batch: Any) -> str | None:
    try:
        return digest(batch)
    except (RuntimeError, TypeError):  # a kind of object, or of tensor, that can't be digested
        return None

"""Tiny models and data for the tests: they know something, so that it can be forgotten."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from slug_lightning.distributed.backward import Backward
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.distributed.strategy import only_differentiating

CLASSES = 4
FORGET = 2


@functools.cache
def blobs(count: int = 240) -> TensorDataset:
    """Points around one centre a class, easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    centres = 3 * torch.randn(CLASSES, 8, generator=generator)
    return TensorDataset(centres[labels] + 0.3 * torch.randn(count, 8, generator=generator), labels)


def part(forget: bool) -> Subset:
    """The samples of the class to forget, or all the others."""
    labels = blobs().tensors[1]
    return Subset(blobs(), ((labels == FORGET) == forget).nonzero()[:, 0].tolist())


def loader(forget: bool, **options: Any) -> DataLoader:
    return DataLoader(part(forget), **{"batch_size": 16 if forget else 32, **options})


class Classifier(pl.LightningModule):
    """Somebody's module: it logs, has BatchNorm and Dropout, and knows nothing of forgetting."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES)
        )
        self.requires_grad_(not frozen)
        self.trained_batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log_dict({"val_loss": cross_entropy(logits, batch[1]), "val_acc": (logits.argmax(1) == batch[1]).float().mean()})

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained_batches += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def outside(**values: Any) -> Callable[[], SimpleNamespace]:
    """A place for what a module shall remember of its steps: nobody takes it back, as it is a function that leads there."""
    place = SimpleNamespace(**values)
    return lambda: place


class PlainRunner:
    """Takes batches as they come: the place of `slug_lightning.distributed.strategy.Runner`, without a trainer."""

    def __init__(self, processes: Processes | None = None, precision: str = "32-true") -> None:
        self.processes = processes or Processes()
        self.backward = Backward(self.processes)
        self.precision = precision
        self.is_sharded = False

    def batches(self, loader: Any) -> Iterator[IndexedBatch]:
        return shard_batches(loader, self.processes)

    def passing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def differentiating(self, module: nn.Module, parameters: Any) -> AbstractContextManager[None]:
        return only_differentiating(module, parameters)

    def validating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


@functools.cache
def _trained_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier()
        x, y = blobs().tensors
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            cross_entropy(model.net(x), y).backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(kind: type[Classifier] = Classifier, **options: Any) -> Any:
    """A classifier that knows all four classes."""
    model = kind(**options)
    model.load_state_dict(_trained_weights())
    return model


def accuracy(model: Classifier, forget: bool) -> float:
    model.eval()
    x, y = blobs().tensors
    chosen = (y == FORGET) == forget
    with torch.no_grad():
        found = (model.net(x[chosen]).argmax(1) == y[chosen]).float().mean().item()
    model.train()
    return found


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors, buffers too, that are not bitwise what they were."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer that shows and writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet, "callbacks": list(callbacks), **options}
    )


def fit(callback: pl.Callback, module: pl.LightningModule, **options: Any) -> pl.Trainer:
    """Fit on the retain data, as an owner would who knows of nothing else."""
    made = trainer(callback, **options)
    made.fit(module, loader(False), loader(False))
    return made

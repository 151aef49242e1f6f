"""Devices, strategies and precision: nothing else needs to know them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerState
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from slug_lightning.distributed.backward import DATA, Backward
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.dtensor import reshard
from slug_lightning.utils.names import some_of

SINGLE, DDP, MODEL_PARALLEL = "SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"
REFUSED = {
    "XLA": "XLA computes tensors lazily, and the search would wait for each of them; unlearn on a GPU or CPU",
    "FSDPStrategy": (
        "it flattens the tensors of a layer into one, which can be neither scored nor edited; use FSDP2: "
        "strategy=ModelParallelStrategy(…) with fully_shard in configure_model"
    ),
    "DeepSpeedStrategy": (
        "its engine owns weights and gradients, which can be neither scored nor edited in place; use FSDP2 "
        "(strategy=ModelParallelStrategy(…)) or 'ddp', and load the checkpoint into DeepSpeed afterwards"
    ),
}


def refuse_unsupported(strategy: Strategy) -> None:
    """Refuse any strategy but one device, DDP and FSDP2, as the result would be wrong."""
    # By name: a Trainer of the `pytorch_lightning` package has classes of its own.
    names = [kind.__name__ for kind in type(strategy).__mro__]
    for refused, why in REFUSED.items():
        if any(refused in name for name in names):
            raise UnlearnError(f"Trainer(strategy=…): {type(strategy).__name__} is not supported, {why}")
    if not {SINGLE, DDP, MODEL_PARALLEL} & set(names):
        raise UnlearnError(
            f"Trainer(strategy=…): {type(strategy).__name__} is not supported, as how it shards weights and gradients is "
            "unknown; use one device, 'ddp' or ModelParallelStrategy (FSDP2), and load the patch or checkpoint elsewhere"
        )


class Runner:
    """Moves this rank's batches to the device, and computes in the trainer's precision."""

    def __init__(self, strategy: Strategy, state: TrainerState) -> None:
        self.strategy = strategy
        self.state = state
        module = strategy.lightning_module
        assert module is not None
        self.module: Any = module
        names = {kind.__name__ for kind in type(strategy).__mro__}
        if SINGLE in names:
            self.processes = Processes()
        else:
            data = strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
            mesh = strategy.device_mesh if MODEL_PARALLEL in names else None  # type: ignore[attr-defined]
            group = mesh[DATA].get_group() if mesh else None
            self.processes = Processes(data["rank"], data["num_replicas"], group, in_step=mesh is not None)
        self.is_sharded = self.processes.in_step
        self.precision = str(strategy.precision_plugin.precision)
        self.scaler: GradScaler | None = getattr(strategy.precision_plugin, "scaler", None)
        averages = self.processes.data_world_size if self.is_sharded else 1
        self.backward = Backward(self.processes, self.scaler, averages)

    def prepare(self, datamodule: LightningDataModule) -> None:
        """Let one rank per node download what a datamodule needs, while the others wait."""
        first_here = getattr(self.strategy, "local_rank", 0) == 0
        if first_here if datamodule.prepare_data_per_node else self.processes.is_first:
            datamodule.prepare_data()
        self.processes.all_gather_object("data prepared", None)

    def notes(self) -> list[str]:
        """Say in the report what the losses saw, and what was left out."""
        world_size = self.processes.world_size
        shared = f"{world_size} ranks shared the batches: every loss saw a whole batch of its loader, as on one device"
        sharded = "sharded model: every evaluation was computed whole, and no operations were counted"
        return [shared] * (world_size > 1) + [sharded] * self.is_sharded

    def batches(self, loader: Iterable[Any]) -> Iterator[IndexedBatch]:
        """Read this rank's share of a loader once; its batches arrive converted and on the device."""
        for indexed in shard_batches(loader, self.processes):
            batch = self.module._on_before_batch_transfer(self.strategy.precision_plugin.convert_input(indexed.batch))
            yield indexed._replace(batch=self.strategy.batch_to_device(batch))

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass over data; `reshard` afterwards, also if it fails."""
        try:
            yield
        finally:
            self.reshard()

    def reshard(self) -> None:
        """Let a sharded model hold its shards alone."""
        reshard(self.module)

    @contextmanager
    def differentiating(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, only these parameters get gradients; afterwards the scaler is as it was."""
        state = self.scaler.state_dict() if self.scaler else {}
        # A sharded model has copies of its parameters, which `requires_grad_` would not reach.
        only = _dropping_others if self.is_sharded else only_differentiating
        try:
            with only(module, parameters):
                yield
        finally:
            if self.scaler:
                self.scaler.load_state_dict(state)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Let the trainer say that it validates, so that a module doesn't augment what it is measured on."""
        stage: Any = self.state.stage
        # By its type: a Trainer of the `pytorch_lightning` package has another.
        self.state.stage = type(stage).VALIDATING
        try:
            yield
        finally:
            self.state.stage = stage

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast and default dtype as the trainer's precision wants them."""
        return self.strategy.precision_plugin.forward_context()


@contextmanager
def only_differentiating(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a graph is built for these, also where they are frozen, and for no other parameter.

    Activations in front of the first of them are not kept.
    """
    chosen = {id(p) for p in parameters.values()}
    others = [p for p in module.parameters() if p.requires_grad != (id(p) in chosen)]
    for p in others:
        p.requires_grad_(id(p) in chosen)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(id(p) not in chosen)


@contextmanager
def _dropping_others(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every other parameter's gradient is dropped as soon as it is there."""
    chosen = {id(p) for p in parameters.values()}
    if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
        raise UnlearnError(
            f"layers: {some_of(frozen)}: frozen and sharded, so that FSDP2 computes no gradient; set requires_grad=True in "
            "configure_model, before fully_shard"
        )
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    before = [p.grad for p in others]

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in others]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in zip(others, before, strict=True):
            p.grad = gradient

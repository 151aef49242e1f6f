"""The one place that knows devices, strategies and precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerState
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FSDPModule

from slug_lightning.distributed.backward import DATA, Backward
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import some_of

SINGLE, DDP, MODEL_PARALLEL = "SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"
REFUSED = {
    "XLA": "the tensors of an XLA device are computed late, and the search would wait for each; forget on a GPU or CPU",
    "FSDPStrategy": (
        "it flattens tensors into one, so that a layer has neither a norm nor an edit of its own; use FSDP2: "
        "strategy=ModelParallelStrategy(…) with fully_shard in configure_model"
    ),
    "DeepSpeedStrategy": (
        "its engine keeps weights and gradients to itself, so that neither can be scored or edited in place; use FSDP2 "
        "(strategy=ModelParallelStrategy(…)) or 'ddp', and load the checkpoint into DeepSpeed afterwards"
    ),
}


def refuse_unsupported(strategy: Strategy) -> None:
    """Refuse a strategy under which the result would be wrong, before anything is computed.

    Raises:
        UnlearnError: for anything but one device, DDP and FSDP2.
    """
    # By name: a Trainer of the `pytorch_lightning` package has classes of its own.
    names = [kind.__name__ for kind in type(strategy).__mro__]
    for refused, why in REFUSED.items():
        if any(refused in name for name in names):
            raise UnlearnError(f"Trainer(strategy=…): {type(strategy).__name__} is not supported, {why}")
    if not {SINGLE, DDP, MODEL_PARALLEL} & set(names):
        raise UnlearnError(
            f"Trainer(strategy=…): {type(strategy).__name__} is not supported, it is not known how it spreads weights and "
            "gradients; use one device, 'ddp' or ModelParallelStrategy (FSDP2), and load the patch or checkpoint elsewhere"
        )


class Runner:
    """Brings batches to the device, shares them with the other processes, and computes in the trainer's precision.

    Args:
        strategy: the trainer's.
        state: the trainer's, which says whether it trains or validates.
    """

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
        averages = self.processes.shares if self.is_sharded else 1
        self.scaler: GradScaler | None = getattr(strategy.precision_plugin, "scaler", None)
        self.backward = Backward(self.processes, self.scaler, averages)

    def prepare(self, datamodule: LightningDataModule) -> None:
        """Let one process of a machine download what a datamodule needs, and the others wait for it."""
        first_here = getattr(self.strategy, "local_rank", 0) == 0
        if first_here if datamodule.prepare_data_per_node else self.processes.is_first:
            datamodule.prepare_data()
        self.processes.all_gather_object("data prepared", None)

    def notes(self) -> list[str]:
        """Sentences for the report: what the losses saw, what is not done."""
        notes = []
        if self.processes.world_size > 1:
            notes.append(
                f"{self.processes.world_size} processes shared the batches: every loss saw a whole batch of its loader, as on "
                "one device"
            )
        if self.is_sharded:
            notes.append(
                "a sharded model is run by all processes together: every evaluation was computed whole, and no operations counted"
            )
        return notes

    def batches(self, loader: Iterable[Any]) -> Iterator[IndexedBatch]:
        """Read this process's share of a loader once; its batches arrive converted and on the device."""
        for turn in shard_batches(loader, self.processes):
            batch = self.module._on_before_batch_transfer(self.strategy.precision_plugin.convert_input(turn.batch))
            yield turn._replace(batch=self.strategy.batch_to_device(batch))

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass over data; afterwards, also if it fails, a sharded model holds no tensor whole."""
        try:
            yield
        finally:
            self.reshard()

    def reshard(self) -> None:
        """Let go of the whole tensors that a sharded model still holds after a pass: an edit of a shard must be seen."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def differentiating(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, only these parameters get gradients; afterwards the scaler is as it was."""
        state = self.scaler.state_dict() if self.scaler else {}
        # A sharded model has copies of its parameters that would not notice.
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

    What lies in front of the first of them is not kept.

    Example:
        >>> module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> with only_differentiating(module, {"1.weight": module[1].weight}):
        ...     [name for name, p in module.named_parameters() if p.requires_grad]
        ['1.weight']
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
            f"layers: {some_of(frozen)}: frozen and sharded, so that FSDP2 makes no gradient; set requires_grad=True in "
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

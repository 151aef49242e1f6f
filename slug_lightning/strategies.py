"""The one place that knows devices, strategies and precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from slug_lightning.errors import UnlearnError


def refuse_unsupported(strategy: Strategy) -> None:
    """Refuse a strategy under which the result would be wrong, before anything is computed.

    Raises:
        UnlearnError: for anything but one device: elsewhere each process would see its own gradient, or only its
            shard of a tensor, and the norms and the chosen layer would be wrong.
    """
    # By name too: a Trainer of the `pytorch_lightning` package has classes of its own.
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if not isinstance(strategy, SingleDeviceStrategy) and "SingleDeviceStrategy" not in names:
        raise UnlearnError(
            f"Trainer(strategy=…): {type(strategy).__name__} is not supported, each process would measure another "
            "gradient; forget on one device (devices=1, strategy='auto') and load the patch or checkpoint elsewhere"
        )


class Runner:
    """Brings batches to the device and computes in the trainer's precision.

    Args:
        strategy: the trainer's.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Read a loader once; its batches arrive converted and on the device."""
        module: Any = self.strategy.lightning_module
        for batch in loader:
            batch = module._on_before_batch_transfer(self.strategy.precision_plugin.convert_input(batch))
            yield self.strategy.batch_to_device(batch)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Let the trainer say that it validates, so that a module doesn't augment what it is measured on."""
        module: Any = self.strategy.lightning_module
        state = module.trainer.state
        stage, state.stage = state.stage, type(state.stage).VALIDATING
        try:
            yield
        finally:
            state.stage = stage

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast and default dtype as the trainer's precision wants them."""
        return self.strategy.precision_plugin.forward_context()

"""What is refused, and that it says why and what to do instead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from _callback import unlearn_callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from slug_lightning.distributed.strategy import refuse_unsupported
from slug_lightning.errors import UnlearnError


def named(name: str, base: type = DDPStrategy) -> Strategy:
    """A strategy whose library or hardware is not here."""
    return object.__new__(type(name, (base,), {}))


class SomebodysStrategy(Strategy):
    """One that nobody here knows."""

    all_gather = barrier = broadcast = is_global_zero = model_to_device = reduce = root_device = None


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "FSDPStrategy is not supported.*neither scored.*ModelParallelStrategy"),
        (named("DeepSpeedStrategy"), "DeepSpeedStrategy is not supported.*engine.*FSDP2"),
        (named("SingleDeviceXLAStrategy", SingleDeviceStrategy), "XLA.*not supported.*unlearn on a GPU or CPU"),
        (named("XLAStrategy"), "XLA.*not supported"),
        (SomebodysStrategy(), "SomebodysStrategy is not supported, .*unknown; use one device, 'ddp'"),
    ],
)
def test_a_strategy_under_which_the_answer_would_be_wrong_is_refused_in_setup(strategy, message):
    with pytest.raises(UnlearnError, match=message):
        unlearn_callback().setup(SimpleNamespace(strategy=strategy), None, "fit")


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), ModelParallelStrategy()])
def test_one_device_ddp_and_fsdp2_are_supported(strategy):
    refuse_unsupported(strategy)

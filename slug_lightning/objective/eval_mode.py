"""Put a module into evaluation mode, and restore everything afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchmetrics
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode afterwards.

    Nothing else is restored: `preserve_state` writes buffers, which a graph that still waits for its backward pass, as that of
    a loss on the original's logits, may need unchanged.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, buffers, metric states and random states are as before."""
    restore = snapshot(module)
    try:
        with eval_mode(module):
            yield
    finally:
        restore()


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Copy buffers, metric states and random states; return a function that puts them back."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    # In a list: a torchmetrics object's hash changes with its states.
    metrics = [
        (m, {key: _copied(value) for key, value in m.metric_state.items()}, m._update_count, m._computed)
        for m in metrics_in(module)
    ]
    random_states = _collect_rng_states()

    def restore() -> None:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for metric, state, count, computed in metrics:
            for key, value in state.items():
                setattr(metric, key, _copied(value))
            metric._update_count, metric._computed = count, computed
        _set_rng_states(random_states)

    return restore


def metrics_in(module: nn.Module) -> Iterator[torchmetrics.Metric]:
    return (m for m in module.modules() if isinstance(m, torchmetrics.Metric))


def _copied(state: Any) -> Any:
    return [t.detach().clone() for t in state] if isinstance(state, list) else state.detach().clone()

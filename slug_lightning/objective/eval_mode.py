"""Put a module into evaluation mode for a while, and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode afterwards.

    It touches nothing else. `preserve_state` writes buffers, which a graph that waits for its backward pass,
    as that of a loss on the original's logits, may need as they are.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(net):
        ...     [m.training for m in net.modules()]
        [False, False, False]
        >>> [m.training for m in net.modules()]
        [True, True, False]
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
    """Evaluation mode inside; afterwards modes, buffers, metric states and random numbers are as before.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with preserve_state(net):
        ...     net.running_mean.add_(1), net.training
        (tensor([1., 1.]), False)
        >>> net.running_mean, net.training
        (tensor([0., 0.]), True)
    """
    restore = snapshot(module)
    try:
        with eval_mode(module):
            yield
    finally:
        restore()


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Remember buffers, metric states and random numbers; gives what puts them back."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    # In a list: a torchmetrics object's hash changes with its states.
    metrics = [
        (m, {key: _copied(value) for key, value in m.metric_state.items()}, m._update_count, m._computed)
        for m in metrics_in(module)
    ]
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for metric, state, count, computed in metrics:
            for key, value in state.items():
                setattr(metric, key, _copied(value))
            metric._update_count, metric._computed = count, computed
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return restore


def metrics_in(module: nn.Module) -> Iterator[torchmetrics.Metric]:
    return (m for m in module.modules() if isinstance(m, torchmetrics.Metric))


def _copied(state: Any) -> Any:
    return [t.detach().clone() for t in state] if isinstance(state, list) else state.detach().clone()

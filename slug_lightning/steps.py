"""Call a LightningModule's own steps outside the training loop, leave no trace, and read what they log."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slug_lightning.errors import UnlearnError

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, buffers, metric states and random numbers are as before.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with untouched(net):
        ...     net.running_mean.add_(1), net.training
        (tensor([1., 1.]), False)
        >>> net.running_mean, net.training
        (tensor([0., 0.]), True)
    """
    modes = {m: m.training for m in module.modules()}
    restore = _snapshot(module)
    try:
        module.eval()
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        restore()


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """Remember buffers, metric states and random numbers; gives what puts them back."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    # In a list: a torchmetrics object's hash changes with its states.
    metrics = [
        (m, {key: _copied(value) for key, value in m.metric_state.items()}, m._update_count, m._computed)
        for m in _metrics_in(module)
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


def _metrics_in(module: nn.Module) -> Iterator[torchmetrics.Metric]:
    return (m for m in module.modules() if isinstance(m, torchmetrics.Metric))


def _copied(state: Any) -> Any:
    return [t.detach().clone() for t in state] if isinstance(state, list) else state.detach().clone()


class LogReader:
    """Stands in for a module's `log` and `log_dict`: keeps what is logged as means weighted by samples.

    Example:
        >>> reader = LogReader()
        >>> for value, count in ((1.0, 1), (0.0, 3)):
        ...     reader.samples = count
        ...     reader.log("accuracy", value)
        >>> reader.values()
        {'accuracy': 0.25}
    """

    def __init__(self) -> None:
        self.samples = 1
        """Samples of the batch at hand: the weight of what is logged without `batch_size`."""
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, int] = {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        """The lowest and the highest value that was logged."""
        self.objects: dict[str, torchmetrics.Metric] = {}

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Take one value as `LightningModule.log` would: a number, a one-element tensor or a torchmetrics object."""
        if isinstance(value, torchmetrics.Metric):
            self.objects[name] = value
            return
        weight = self.samples if batch_size is None else batch_size
        value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach().squeeze()
        value = value.double() if value.device.type != "mps" else value.float()
        # A batch without a single sample of this kind logs a mean over nothing, which is NaN.
        if weight:
            low, high = self.ranges.get(name, (value, value))
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0) + weight
            self.ranges[name] = torch.minimum(low, value), torch.maximum(high, value)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """Take several values at once, also a torchmetrics `MetricCollection`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, batch_size=batch_size, **kwargs)

    def state(self) -> tuple[dict, dict, dict, dict]:
        """What was logged so far, for `restore`."""
        return dict(self.sums), dict(self.weights), dict(self.objects), dict(self.ranges)

    def restore(self, state: tuple[dict, dict, dict, dict]) -> None:
        """Go back to what was logged by then."""
        self.sums, self.weights, self.objects, self.ranges = map(dict, state)

    def logged(self) -> list[str]:
        """The names of what was logged so far."""
        return [*self.sums, *self.objects]

    def values(self) -> dict[str, float]:
        """What was logged so far, by name."""
        found = {name: float(total) / self.weights[name] for name, total in self.sums.items()}
        return found | {name: float(metric.compute()) for name, metric in self.objects.items()}


@contextmanager
def read_logs(module: nn.Module) -> Iterator[LogReader]:
    """Let `module.log` reach a reader instead of the trainer, which refuses logging outside its loops.

    Metric objects of the module start empty.
    """
    for metric in _metrics_in(module):
        metric.reset()
    reader = LogReader()
    # On the instance, so that the class and every other instance stay as they are.
    own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update(log=reader.log, log_dict=reader.log_dict)
    try:
        yield reader
    finally:
        del vars(module)["log"], vars(module)["log_dict"]
        vars(module).update(own)


class Attempt:
    """One batch's step, which can be run without consequences.

    Args:
        module: whose step it is.
        run: runs it.
        reader: what it logs to, if to anything.

    Example:
        >>> net, reader = nn.BatchNorm1d(2), LogReader()
        >>> step = Attempt(net, lambda: reader.log("loss", 1.0), reader)
        >>> with step.undone():
        ...     step()
        ...     step.seen()
        [tensor(1., dtype=torch.float64)]
        >>> step.seen()
        []
    """

    def __init__(self, module: nn.Module, run: Callable[[], Any], reader: LogReader | None = None) -> None:
        self.module = module
        self.run = run
        self.reader = reader or LogReader()

    def __call__(self) -> None:
        """Run the step."""
        self.run()

    @contextmanager
    def undone(self, only_if_it_fails: bool = False) -> Iterator[None]:
        """What happens inside has not happened afterwards."""
        restore, log = _snapshot(self.module), self.reader.state()
        try:
            yield
        except BaseException:
            only_if_it_fails = False
            raise
        finally:
            if not only_if_it_fails:
                restore()
                self.reader.restore(log)

    def seen(self) -> list[Any]:
        """What was logged so far: sums, and the states of metric objects."""
        return tree_leaves([self.reader.sums, [metric.metric_state for metric in _metrics_in(self.module)]])


def loss_in(output: Any) -> Tensor | None:
    """Find the loss in what a step returns: a tensor, a dict with "loss", or None to leave the batch out.

    Raises:
        UnlearnError: if it is something else, or not a scalar.

    Example:
        >>> loss_in({"loss": torch.tensor(2.0), "predictions": torch.zeros(3)})
        tensor(2.)
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnlearnError(
            "training_step: it must return a scalar loss, a dict with 'loss' or None, not "
            f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}; or define forget_step and retain_step"
        )
    return loss.squeeze()


def call_step(step: Callable[..., Any], batch: Any, number: int) -> Any:
    """Call a step with as many arguments as it takes: `batch`, then `batch_idx`, then `dataloader_idx`.

    Example:
        >>> call_step(lambda batch: batch, "b", 3), call_step(lambda batch, batch_idx: batch_idx, "b", 3)
        ('b', 3)
    """
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return step(batch, number)
    return step(*(batch, number, 0)[: sum(kind in POSITIONAL for kind in kinds)])


def batch_samples(batch: Any) -> int:
    """Count the samples of a batch: the first dimension of the first tensor in it.

    Example:
        >>> batch_samples({"image": torch.zeros(5, 3, 8, 8), "label": torch.zeros(5)})
        5
    """
    return extract_batch_size(batch)

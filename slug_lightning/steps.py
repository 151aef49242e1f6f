"""Call a LightningModule's own steps outside the training loop, leave no trace, and read what they log."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slug_lightning.errors import UnlearnError
from slug_lightning.processes import Processes

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode afterwards.

    It touches nothing else. `untouched` writes buffers, which a graph that waits for its backward pass,
    as that of a loss on the original's logits, may need as they are.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
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
    restore = _snapshot(module)
    try:
        with evaluating(module):
            yield
    finally:
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


class Logged(NamedTuple):
    """One value that a step has logged.

    Attributes:
        number: of the batch.
        name: as logged.
        value: a mean over samples; a tensor while it may still be on its way on a device.
        weight: of how many samples.
    """

    number: int
    name: str
    value: Tensor | float
    weight: int


class LogReader:
    """Stands in for a module's `log` and `log_dict`: keeps what is logged, and makes means weighted by samples.

    Args:
        metrics: the module's metric objects.
        processes: that log, too.

    Example:
        >>> reader = LogReader()
        >>> for value, count in ((1.0, 1), (0.0, 3)):
        ...     reader.samples = count
        ...     reader.log("accuracy", value)
        >>> reader.values()
        {'accuracy': 0.25}
    """

    def __init__(self, metrics: Sequence[torchmetrics.Metric] = (), processes: Processes | None = None) -> None:
        self.number = 0
        """Of the batch at hand."""
        self.samples = 1
        """Samples of the batch at hand: the weight of what is logged without `batch_size`."""
        self.entries: list[Logged] = []
        self.objects: dict[str, torchmetrics.Metric] = {}
        self._metrics = metrics
        self._processes = processes or Processes()
        self._shared = 0

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
            self.entries.append(Logged(self.number, name, value.clone(), weight))

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """Take several values at once, also a torchmetrics `MetricCollection`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, batch_size=batch_size, **kwargs)

    def state(self) -> tuple[int, dict[str, torchmetrics.Metric]]:
        """What was logged so far, for `restore`."""
        return len(self.entries), dict(self.objects)

    def restore(self, state: tuple[int, dict[str, torchmetrics.Metric]]) -> None:
        """Go back to what was logged by then."""
        del self.entries[state[0] :]
        self.objects = dict(state[1])

    def share(self) -> None:
        """Let every process know what all have logged since the last time, in the order of the batches."""
        if self._processes.count == 1:
            return
        own = [entry._replace(value=float(entry.value)) for entry in self.entries[self._shared :]]
        # By identity: metric objects make a new one when they are compared.
        numbers = {id(metric): number for number, metric in enumerate(self._metrics)}
        if strange := [name for name, metric in self.objects.items() if id(metric) not in numbers]:
            raise UnlearnError(f"{strange}: the logged metric object is no attribute of the module; make it one")
        places = {name: numbers[id(metric)] for name, metric in self.objects.items()}
        found = self._processes.exchange("what is logged", (own, places), each_share=True)
        # As one device would have logged it, so that the sums have the same bits.
        self.entries[self._shared :] = sorted((e for entries, _ in found for e in entries), key=lambda entry: entry.number)
        self._shared = len(self.entries)
        for _, places in found:
            self.objects |= {name: self._metrics[place] for name, place in places.items()}

    def logged(self) -> list[str]:
        """The names of what was logged so far."""
        return [*dict.fromkeys(entry.name for entry in self.entries), *self.objects]

    def of(self, name: str) -> tuple[list[float], list[int]]:
        """The values logged under a name, and their weights."""
        found = [entry for entry in self.entries if entry.name == name]
        return [float(entry.value) for entry in found], [entry.weight for entry in found]

    def values(self) -> dict[str, float]:
        """What was logged so far, by name; of several processes, after `share`."""
        means = {}
        for name in dict.fromkeys(entry.name for entry in self.entries):
            values, weights = self.of(name)
            means[name] = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
        return means | {name: _computed(metric, self._processes) for name, metric in sorted(self.objects.items())}


def _computed(metric: torchmetrics.Metric, processes: Processes) -> float:
    """A metric object's value over the samples of all processes."""
    if processes.count == 1:
        return float(metric.compute())
    own = [m for m in metric.modules() if isinstance(m, torchmetrics.Metric)]
    updated = processes.exchange("metric objects", [m._update_count > 0 for m in own], each_share=True)

    def gather(any_data: Sequence[bool], state: Tensor, group: Any = None) -> list[Tensor]:
        found = processes.exchange("a metric's state", state.cpu(), each_share=True)
        return [other.to(state.device) for other, has in zip(found, any_data, strict=True) if has or not any(any_data)]

    before = [(m.dist_sync_fn, m.distributed_available_fn, m._to_sync) for m in own]
    for m, any_data in zip(own, zip(*updated, strict=True), strict=True):
        m.dist_sync_fn, m.distributed_available_fn, m._to_sync = partial(gather, any_data), lambda: True, True
        m._computed = None  # one that remembers its value would leave the others waiting
    try:
        with warnings.catch_warnings():  # torchmetrics doesn't know that other processes have seen samples
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            return float(metric.compute())
    finally:
        for m, (sync, available, to_sync) in zip(own, before, strict=True):
            m.dist_sync_fn, m.distributed_available_fn, m._to_sync = sync, available, to_sync


@contextmanager
def read_logs(module: nn.Module, processes: Processes | None = None) -> Iterator[LogReader]:
    """Let `module.log` reach a reader instead of the trainer, which refuses logging outside its loops.

    Metric objects of the module start empty.
    """
    for metric in _metrics_in(module):
        metric.reset()
    reader = LogReader(list(_metrics_in(module)), processes)
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
        [0, 'loss', tensor(1., dtype=torch.float64), 1]
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
        """What was logged so far: values, and the states of metric objects."""
        return tree_leaves([self.reader.entries, [metric.metric_state for metric in _metrics_in(self.module)]])


class Collectives(TorchDispatchMode):
    """Sees whether what runs inside communicates with other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen |= "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


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
    """Count the samples of a batch: the first dimension of the first tensor in it; 1 if that is a scalar.

    What lies beside the tensors, such as texts, is not counted: a sample may have several.

    Args:
        batch: tensors in containers: mappings, dataclasses, or anything that can be iterated.

    Raises:
        UnlearnError: if there is no tensor in it.

    Example:
        >>> batch_samples({"text": ["a cat", "a dog"], "image": torch.zeros(2, 3, 8, 8)})
        2
    """
    first = next(_tensors_in(batch), None)
    if first is None:
        raise UnlearnError(
            f"a batch ({type(batch).__name__}) holds no tensor, so that its samples cannot be counted; let the loader add one "
            "of shape [B, ...], such as labels or numbers of the samples"
        )
    return len(first) if first.ndim else 1


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_in(value)
    elif is_dataclass(content) and not isinstance(content, type):
        for one in fields(content):
            yield from _tensors_in(getattr(content, one.name))
    elif isinstance(content, Iterable) and not isinstance(content, (str, bytes, np.ndarray)):
        for value in content:
            yield from _tensors_in(value)


def same_draws(number: int) -> None:
    """Random numbers that depend on the batch's number alone: two passes differ by the edit, and not by luck.

    The caller's random state is put back by `untouched`.

    Example:
        >>> with untouched(nn.Identity()):
        ...     draws = [same_draws(number) or torch.rand(1).item() for number in (3, 4, 3)]
        >>> draws[0] == draws[2] != draws[1]
        True
    """
    seed = torch.manual_seed if _accelerator_draws() else torch.default_generator.manual_seed
    seed(number)
    np.random.seed(number)
    random.seed(number)


def _accelerator_draws() -> bool:
    """Whether a device other than the CPU may draw random numbers.

    Where none does, `torch.manual_seed` keeps the seed in case one is used later, each time with a formatted stack: nine tenths
    of the time of a tiny model's batches. Asking whether there is a CUDA device could spoil a later fork; a CUDA that nobody has
    initialised draws nothing.
    """
    return torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available()

"""Read what a LightningModule's own steps log outside the training loop, and run a step without consequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.eval_mode import metrics_in, snapshot


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
        if self._processes.world_size == 1:
            return
        own = [entry._replace(value=float(entry.value)) for entry in self.entries[self._shared :]]
        # By identity: metric objects make a new one when they are compared.
        numbers = {id(metric): number for number, metric in enumerate(self._metrics)}
        if strange := [name for name, metric in self.objects.items() if id(metric) not in numbers]:
            raise UnlearnError(f"{strange}: the logged metric object is no attribute of the module; make it one")
        places = {name: numbers[id(metric)] for name, metric in self.objects.items()}
        found = self._processes.all_gather_object("what is logged", (own, places), each_share=True)
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
    if processes.world_size == 1:
        return float(metric.compute())
    own = [m for m in metric.modules() if isinstance(m, torchmetrics.Metric)]
    updated = processes.all_gather_object("metric objects", [m._update_count > 0 for m in own], each_share=True)

    def gather(any_data: Sequence[bool], state: Tensor, group: Any = None) -> list[Tensor]:
        found = processes.all_gather_object("a metric's state", state.cpu(), each_share=True)
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
    for metric in metrics_in(module):
        metric.reset()
    reader = LogReader(list(metrics_in(module)), processes)
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
        restore, log = snapshot(self.module), self.reader.state()
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
        return tree_leaves([self.reader.entries, [metric.metric_state for metric in metrics_in(self.module)]])

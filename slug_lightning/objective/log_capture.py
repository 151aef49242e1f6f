"""Read what a LightningModule's steps log outside of Lightning's loops, and undo a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torchmetrics
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.eval_mode import metrics_in
from slug_lightning.objective.step_state import StepState


class Logged(NamedTuple):
    """One logged value: a mean over `weight` samples of batch `number`; a tensor while it may be on its way on a device."""

    number: int
    name: str
    value: Tensor | float
    weight: int


class LogReader:
    """Stands in for a module's `log` and `log_dict`, and computes means weighted by samples."""

    def __init__(self, metrics: Sequence[torchmetrics.Metric] = (), processes: Processes | None = None) -> None:
        self.number = 0
        """Index of the current batch."""
        self.samples = 1
        """Samples of the current batch: the weight of what is logged without `batch_size`."""
        self.entries: list[Logged] = []
        self.objects: dict[str, torchmetrics.Metric] = {}
        self._metrics = metrics
        self._processes = processes or Processes()
        self._shared = 0

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Log as `LightningModule.log`: a number, a one-element tensor or a torchmetrics object."""
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
        """Log as `LightningModule.log_dict`, also a torchmetrics `MetricCollection`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, batch_size=batch_size, **kwargs)

    def state(self) -> tuple[int, dict[str, torchmetrics.Metric]]:
        """What was logged so far, for `restore`."""
        return len(self.entries), dict(self.objects)

    def restore(self, state: tuple[int, dict[str, torchmetrics.Metric]]) -> None:
        """Drop what was logged since."""
        del self.entries[state[0] :]
        self.objects = dict(state[1])

    def share(self) -> None:
        """Gather what all ranks have logged since the last call, in the order of the batches."""
        if self._processes.world_size == 1:
            return
        own = [entry._replace(value=float(entry.value)) for entry in self.entries[self._shared :]]
        # By identity: metric objects make a new one when they are compared.
        numbers = {id(metric): number for number, metric in enumerate(self._metrics)}
        if unknown := [name for name, metric in self.objects.items() if id(metric) not in numbers]:
            raise UnlearnError(f"{unknown}: a logged metric object must be an attribute of the module")
        objects = {name: numbers[id(metric)] for name, metric in self.objects.items()}
        found = self._processes.all_gather_object("logged values", (own, objects), each_data_rank=True)
        # As one device would have logged it, so that the sums have the same bits.
        self.entries[self._shared :] = sorted((e for entries, _ in found for e in entries), key=lambda entry: entry.number)
        self._shared = len(self.entries)
        for _, objects in found:
            self.objects |= {name: self._metrics[number] for name, number in objects.items()}

    def logged(self) -> list[str]:
        """Names of what was logged so far."""
        return [*dict.fromkeys(entry.name for entry in self.entries), *self.objects]

    def of(self, name: str) -> tuple[list[float], list[int]]:
        """Values logged under a name, and their weights."""
        found = [entry for entry in self.entries if entry.name == name]
        return [float(entry.value) for entry in found], [entry.weight for entry in found]

    def samples_of(self, name: str) -> int:
        """How many samples a value is the mean of; 0 of a metric object."""
        return sum(self.of(name)[1])

    def values(self) -> dict[str, float]:
        """Means of what was logged so far, by name; over all ranks, after `share`."""
        means = {}
        for name in dict.fromkeys(entry.name for entry in self.entries):
            values, weights = self.of(name)
            means[name] = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
        return means | {name: _computed(metric, self._processes) for name, metric in sorted(self.objects.items())}


def _computed(metric: torchmetrics.Metric, processes: Processes) -> float:
    """Compute a metric object's value over the samples of all ranks."""
    if processes.world_size == 1:
        return float(metric.compute())
    own = [m for m in metric.modules() if isinstance(m, torchmetrics.Metric)]
    updated = processes.all_gather_object("metric objects", [m._update_count > 0 for m in own], each_data_rank=True)

    def gather(any_data: Sequence[bool], state: Tensor, group: Any = None) -> list[Tensor]:
        found = processes.all_gather_object("state of a metric", state.cpu(), each_data_rank=True)
        return [other.to(state.device) for other, has in zip(found, any_data, strict=True) if has or not any(any_data)]

    before = [(m.dist_sync_fn, m.distributed_available_fn, m._to_sync) for m in own]
    for m, any_data in zip(own, zip(*updated, strict=True), strict=True):
        m.dist_sync_fn, m.distributed_available_fn, m._to_sync = partial(gather, any_data), lambda: True, True
        m._computed = None  # one that remembers its value would leave the others waiting
    try:
        with warnings.catch_warnings():  # torchmetrics doesn't know that other ranks have seen samples
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            return float(metric.compute())
    finally:
        for m, (sync, available, to_sync) in zip(own, before, strict=True):
            m.dist_sync_fn, m.distributed_available_fn, m._to_sync = sync, available, to_sync


@contextmanager
def read_logs(module: nn.Module, processes: Processes | None = None, wanted: Sequence[str] | None = None) -> Iterator[LogReader]:
    """Let `module.log` reach a reader instead of the trainer, which refuses logging outside its loops; reset metric objects.

    Meanwhile a module that has `wanted_metrics` finds there which values are wanted, if that is known.
    """
    metrics = list(metrics_in(module))
    for metric in metrics:
        metric.reset()
    reader = LogReader(metrics, processes)
    # On the instance, so that the class and every other instance stay as they are.
    own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    added: dict[str, Any] = {"log": reader.log, "log_dict": reader.log_dict}
    if hasattr(module, "wanted_metrics"):
        own |= {name: value for name, value in vars(module).items() if name == "wanted_metrics"}
        added["wanted_metrics"] = wanted
    vars(module).update(added)
    try:
        yield reader
    finally:
        for name in added:
            del vars(module)[name]
        vars(module).update(own)


class Attempt:
    """One batch's step, whose effects on the module and its log can be undone."""

    def __init__(
        self, module: nn.Module, run: Callable[[], Any], reader: LogReader | None = None, state: StepState | None = None
    ) -> None:
        self.module = module
        self.run = run
        self.reader = reader or LogReader()
        self.state = state or StepState(module)

    def __call__(self) -> None:
        self.run()

    @property
    def is_telling(self) -> bool:
        """Whether what `seen` lists of the last run is all that another run can be compared by."""
        return True

    @contextmanager
    def undone(self, only_if_it_fails: bool = False) -> Iterator[None]:
        """Undo afterwards what happens inside."""
        random_states, log = _collect_rng_states(), self.reader.state()
        try:
            with self.state.undone(only_if_it_fails):
                yield
        except BaseException:
            only_if_it_fails = False
            raise
        finally:
            if not only_if_it_fails:
                _set_rng_states(random_states)
                self.reader.restore(log)

    def seen(self) -> list[Any]:
        """List what was logged so far: values, and the states of metric objects."""
        return tree_leaves([self.reader.entries, [metric.metric_state for metric in metrics_in(self.module)]])

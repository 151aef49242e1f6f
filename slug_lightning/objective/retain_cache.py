"""Cache what a run computes on the retain set, for later requests at the same weights."""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from slug_lightning.objective.curvature import Curvature
from slug_lightning.objective.data_checks import digest_of_data
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.gradients import NoLossError
from slug_lightning.objective.log_capture import Logged, LogReader
from slug_lightning.objective.objective import Objective
from slug_lightning.objective.stored_statistics import PREFIX, pack, unpack
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.digests import digest
from slug_lightning.tensors.file_store import Entry, cache_path, read_entry, write_entry
from slug_lightning.utils.loaders import First

NOT_CACHED = "retain: not cached, as the batches hold objects that cannot be compared, or the first one has no loss"
STALE = "retain: cached {} not used but computed again: the first batch no longer gives the same {}"
LIBRARIES = ("slug-lightning", "lightning", "torch", "transformers", "open_clip_torch", "diffusers")
SLACK = 0.01
"""Gradients of one batch may differ by this part of their norm: some GPU kernels add in another order each time."""


class RetainCache:
    """Keep the retain gradient and the retain metrics of the original model for later requests at the same weights.

    A cached result is used only if these are the same: weights and buffers, the content of every retain batch, the class names
    of the module and its submodules, its `hparams`, the candidates, the precision, the kind of device, and the versions of
    torch, lightning, slug-lightning, transformers, open_clip and diffusers. To compare them, the whole retain set is read.

    Code is not compared. Instead, the first batch is computed again each time, and must give the same loss or logged values to
    the last bit, and the same norm and sum of each gradient up to rounding. If it does not, everything is computed again, and
    a note in the report says so. A change of code that the first batch does not show needs another `key`.

    Args:
        folder: where other processes find it, too. Damaged or altered files are computed again, with a warning. Nothing is
            ever removed: a gradient takes 4 bytes per parameter of the candidates. Without a folder, the last gradient is kept
            in memory; so is that of a sharded model, of which each rank holds a part.
        key: version of your code. Change it with a loss, a step or a hook whose effect the first batch may not show, as one
            that treats later batches differently, or that only changes a gradient by less than a hundredth of its norm.

    Example:
        >>> from slug_lightning.callbacks import UnlearnCallback
        >>> from slug_lightning.methods import Runtime
        >>> cache = RetainCache(key="loss with label smoothing")
        >>> callbacks = [UnlearnCallback(runtime=Runtime(retain_cache=cache)) for _ in range(2)]
        >>> cache.reused
        0
    """

    def __init__(self, folder: Optional[Union[str, Path]] = None, key: str = "") -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = key
        self.reused = 0
        """How often a cached gradient was used."""
        self._last: tuple[dict[str, Any], Entry] | None = None

    def gradient(
        self, objective: Objective, parameters: Mapping[str, Tensor], notes: list[str], watch: Curvature | None = None
    ) -> dict[str, Tensor]:
        """Return the gradient of the retain set by parameter name, bitwise as `Objective.gradient` computed it.

        The statistics that `watch` collects are kept with it, and set where the gradient is taken from the cache. `notes` are
        the report's: they say what was taken from the cache, and why something was not.
        """
        key = self._key_of(objective, "train", list(parameters))
        if key is not None and watch is not None:
            key["statistics"] = watch.asked
        first = None if key is None else _first_batch(objective, parameters)
        if key is None or first is None:
            notes.append(NOT_CACHED)
            return objective.gradient("retain", parameters, watch).tensors
        is_first, found = objective.processes.is_first, None
        path = None if self.folder is None or objective.runner.is_sharded else cache_path(self.folder, "retain-gradient", key)
        if path is not None:
            found = read_entry(path, key, lambda entry: _check_gradient(entry, parameters, watch), warn=is_first)
        elif self._last is not None and self._last[0] == key:
            found = self._last[1]
        agrees = found is not None and _agree(found.data["first"] if watch else found.data, first)
        told = None if found is None or not agrees else digest_of(found.tensors, "") if path else "in memory"
        everywhere = objective.processes.all_gather_object("cached gradient", (told, found is not None and not agrees))
        if found is not None and told is not None and {other for other, _ in everywhere} == {told}:
            self.reused += 1
            notes.append(f"retain: gradient taken from {path or 'memory'}")
            # Copies of what is mapped: else the gradient would be the file, whatever becomes of it.
            if watch is not None:
                watch.statistics = unpack(found.data["statistics"], found.tensors, watch, copy=path is not None)
            return {name: found.tensors[name].to(p.device, copy=path is not None) for name, p in parameters.items()}
        if any(is_stale for _, is_stale in everywhere):
            notes.append(STALE.format("gradient", "loss and gradient"))
        found = self._last = None  # two gradients may not fit into memory
        tensors = objective.gradient("retain", parameters, watch).tensors
        entry = Entry(first, tensors)
        if watch is not None and watch.statistics is not None:
            described, collected = pack(watch.statistics)
            entry = Entry({"first": first, "statistics": described}, tensors | collected)
        if path is None:
            self._last = key, entry
        elif is_first:
            write_entry(path, key, *entry)
        return tensors

    def measured(self, objective: Objective, split: str, notes: list[str]) -> dict[str, float]:
        """Return the metrics of the unedited model on the retain set, bitwise as `Objective.measured`; cached only in a folder.

        Either way, `objective.complete` holds all that was logged. Values of torchmetrics objects are not cached.
        """
        key = None if objective.runner.is_sharded or self.folder is None else self._key_of(objective, split)
        if key is None or self.folder is None:
            return objective.measured("retain", split)
        path = cache_path(self.folder, "retain-measured", key)
        is_first = objective.processes.is_first
        found = read_entry(path, key, lambda entry: _check_values(entry, objective)) if is_first else None
        entries = objective.processes.broadcast("cached measurements", found and _unpacked(found.data))
        if entries is not None:
            if _logs_again(objective, split, entries):
                notes.append(f"retain: values on {split} data taken from {path}")
                return objective.recall("retain", split, entries)
            notes.append(STALE.format(f"values on {split} data", "values"))
        values = objective.measured("retain", split)
        reader = objective.complete["retain", split]
        if is_first and not reader.objects:
            write_entry(path, key, _packed(reader.entries), {})
        return values

    def _key_of(self, objective: Objective, split: str, candidates: Sequence[str] = ()) -> dict[str, Any] | None:
        """Collect what a pass over the retain set depends on, the same on every rank; None if the batches cannot be digested."""
        module, processes = objective.module, objective.processes
        weights = digest_of(dict(module.named_parameters()) | dict(module.named_buffers()), "")
        classes = {name: _class_name(part) for name, part in module.named_modules()}
        own = weights, digest([classes, dict(module.hparams)], _class_name)
        found = dict.fromkeys(processes.all_gather_object("weights and settings", own))  # most often the same on all ranks
        data = digest_of_data(objective, "retain", split)
        if data is None:
            return None
        return {
            "user's key": self.key,
            "weights and settings": [list(other) for other in found],
            "data": data,
            "metrics": [] if candidates else objective.names["retain"],
            "candidates": sorted(candidates),
            "precision": objective.runner.precision,
            "matrix products": torch.get_float32_matmul_precision(),
            "device": module.device.type,
            "processes": processes.world_size if objective.runner.is_sharded else None,
            "versions": {name: version(name) for name in LIBRARIES if _is_installed(name)},
        }


def _is_installed(distribution: str) -> bool:
    return find_spec(distribution.replace("-", "_").removesuffix("_torch")) is not None


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _first_batch(objective: Objective, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]] | None:
    """Compute the first batch alone: its loss to the last bit, and norm and sum of each gradient.

    Returns:
        One item for a gradient that all ranks share, one for each rank if it is sharded; None if the batch has no loss.
    """
    first = copy.copy(objective)
    first.loaders = {"retain": {"train": First(objective.loaders["retain"]["train"], 1)}}
    first.progress = lambda batches, _: batches
    try:
        with preserve_state(objective.module):
            gradient = first.gradient("retain", parameters)
    except NoLossError:
        return None
    objective.forward_samples, objective.backward_samples = first.forward_samples, first.backward_samples
    sizes = {name: [t.norm().item(), t.sum().item()] for name, t in gradient.tensors.items()}
    everywhere = objective.processes.all_gather_object("first batch", {"loss": repr(gradient.loss), "gradient": sizes})
    return everywhere if objective.runner.is_sharded else everywhere[:1]


def _agree(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> bool:
    """Compare two results of `_first_batch`."""
    if [first["loss"] for first in before] != [first["loss"] for first in now]:
        return False
    return all(
        abs(norm - sizes[name][0]) <= SLACK * norm and abs(total - sizes[name][1]) <= SLACK * norm
        for first, sizes in zip(before, (other["gradient"] for other in now), strict=True)
        for name, (norm, total) in first["gradient"].items()
    )


def _check_gradient(entry: Entry, parameters: Mapping[str, Tensor], watch: Curvature | None) -> None:
    shapes = {name: (p.shape, torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    found = {name: tensor for name, tensor in entry.tensors.items() if watch is None or not name.startswith(PREFIX)}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} != shapes:
        raise ValueError("it holds other tensors than the candidates")
    first = entry.data
    if watch is not None:
        unpack(entry.data["statistics"], entry.tensors, watch)
        first = entry.data["first"]
    _agree(first, first)  # raises for what says nothing of the first batch


def _check_values(entry: Entry, objective: Objective) -> None:
    entries = _unpacked(entry.data)
    if any(logged.weight <= 0 for logged in entries) or not {e.name for e in entries}.issuperset(objective.names["retain"]):
        raise ValueError("it holds other values than the metrics, or values of no sample")


def _logs_again(objective: Objective, split: str, entries: Sequence[Logged]) -> bool:
    """Whether the first batch, and those that other ranks run at the same time, log what they logged before, bit for bit."""
    seen: list[Logged] = []

    def stop(reader: LogReader) -> bool:
        seen.extend(reader.entries)
        return True

    objective.measure("retain", split, stop=stop)
    numbers = {0} | {entry.number for entry in seen}
    return _packed(seen) == _packed([entry for entry in entries if entry.number in numbers])


def _packed(entries: Sequence[Logged]) -> list[list[Any]]:
    """Entries as plain data, with every bit of every value, also of a NaN."""
    return [[e.number, e.name, struct.pack(">d", float(e.value)).hex(), e.weight] for e in entries]


def _unpacked(packed: Sequence[Sequence[Any]]) -> list[Logged]:
    return [Logged(int(n), str(name), struct.unpack(">d", bytes.fromhex(v))[0], int(weight)) for n, name, v, weight in packed]

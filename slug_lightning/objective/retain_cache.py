"""What is known of the data to keep, for later requests at the same weights."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slug_lightning.objective.data_checks import digest_of_data, first_loss
from slug_lightning.objective.log_capture import Logged, LogReader
from slug_lightning.objective.module_digest import digest_of_module
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.bits import digest_of
from slug_lightning.utils.files import atomic_write

FORMAT = "slug-lightning retained 1"
CANNOT_TELL = "retain: nothing was taken from the cache, or put there, as the data or the module hold what cannot be told apart"
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error)


class RetainCache:
    """Keeps what was computed from the data to keep, so that the next request at the same weights need not do so again.

    Something is used again only where weights and buffers, the content of every batch, the module's code, constants and
    settings (`digest_of_module`), the precision, the kind of device, the candidates and the versions are the same, and the
    first batch, run anew, gives bitwise the same. To know this, all of the data are read. Where it cannot be told, nothing is
    kept, and the report's notes say so.

    Args:
        folder: where to keep it for other processes, as safetensors and JSON; what is damaged or altered is computed anew,
            with a warning. Nothing is ever removed from it: a gradient has the size of the candidates in fp32. Without a
            folder the last gradient is kept in memory; so it is of sharded models, of which each process has a part.

    Example:
        >>> from slug_lightning.callbacks import UnlearnCallback
        >>> cache = RetainCache()
        >>> callbacks = [UnlearnCallback(retain_cache=cache) for _ in range(2)]
        >>> cache.reused
        0
    """

    def __init__(self, folder: Optional[Union[str, Path]] = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.reused = 0
        """How often a gradient was used again."""
        self._last: tuple[dict[str, Any], dict[str, Tensor]] | None = None

    def gradient(self, objective: Objective, parameters: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
        """The gradient of what is kept: the one that was kept, if it is the one that is asked for, else a new one.

        Args:
            objective: differentiates; its module is in evaluation mode.
            parameters: the candidates, by name.
            notes: of the report; they get a sentence if a kept one is used.

        Returns:
            As `Objective.gradient`, by tensor name; bitwise what was computed then.
        """
        key = key_of(objective, "train", list(parameters))
        if key is None:
            notes.append(CANNOT_TELL)
            return objective.gradient("retain", parameters).tensors
        path = None if objective.runner.is_sharded else self._path("gradient", key, "safetensors")
        details = {"key": key, "first loss": first_loss(objective, "retain", "train")}
        is_first = objective.processes.is_first
        found = self._last if path is None else _read(path, key, is_first, parameters)
        told = None if found is None or found[0] != details else digest_of(found[1], "") if path else "in memory"
        everywhere = set(objective.processes.all_gather_object("a kept gradient", told))
        if found is not None and len(everywhere) == 1 and None not in everywhere:
            self.reused += 1
            notes.append(f"retain: gradient taken from {path or 'memory'}")
            return {name: found[1][name].to(p.device) for name, p in parameters.items()}
        found = self._last = None  # not two at a time
        tensors = objective.gradient("retain", parameters).tensors
        if path is None:
            self._last = details, tensors
        elif is_first:
            _write(path, details, tensors)
        return tensors

    def measured(self, objective: Objective, split: str, notes: list[str]) -> dict[str, float]:
        """What the unedited model logs on the data to keep, measured now or before; kept only in a folder.

        Either way, `objective.complete` holds all that was logged. The states of torchmetrics objects cannot be kept.

        Args:
            objective: measures.
            split: "val" or "test".
            notes: as in `gradient`.

        Returns:
            As `Objective.measured`, to the last bit.
        """
        key = None if objective.runner.is_sharded or self.folder is None else key_of(objective, split)
        path = None if key is None else self._path("measured", key, "json")
        if key is None or path is None:
            return objective.measured("retain", split)
        is_first = objective.processes.is_first
        found = _read(path, key, is_first) if is_first else None
        entries = objective.processes.broadcast("kept measurements", found and _unpacked(found[0]["entries"]))
        if entries is not None and _is_confirmed(objective, split, entries):
            notes.append(f"retain: values on {split} data taken from {path}")
            return objective.recall("retain", split, entries)
        values = objective.measured("retain", split)
        reader = objective.complete["retain", split]
        if is_first and not reader.objects:
            _write(path, {"key": key, "entries": _packed(reader.entries)}, {})
        return values

    def _path(self, what: str, key: Mapping[str, Any], ending: str) -> Path | None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return None if self.folder is None else self.folder / f"retain-{what}-{name}.{ending}"


def key_of(objective: Objective, split: str, candidates: Sequence[str] = ()) -> dict[str, Any] | None:
    """All that the result of a pass over the data to keep depends on, as plain data.

    Args:
        objective: whose pass it is.
        split: which data.
        candidates: names of the tensors to differentiate; none for a measurement.

    Returns:
        The same in every process, or None where it cannot be told.
    """
    module, processes = objective.module, objective.processes
    weights = digest_of(dict(module.named_parameters()) | dict(module.named_buffers()), "")
    try:
        code = digest_of_module(module)
    except Exception:  # it looks into objects of all kinds, and what they do then is not known
        code = None
    found = dict.fromkeys(
        processes.all_gather_object("weights and code", (weights, code))
    )  # most often the same in all processes
    data = digest_of_data(objective, "retain", split)
    if data is None or any(code is None for _, code in found):
        return None
    return {
        "weights": [weights for weights, _ in found],
        "data": data,
        "objective": {
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "code": [code for _, code in found],
            "metrics": [] if candidates else objective.names["retain"],
            "candidates": sorted(candidates),
            "precision": objective.runner.precision,
            "matrix products": torch.get_float32_matmul_precision(),
            "device": module.device.type,
            "processes": processes.world_size if objective.runner.is_sharded else None,
            "versions": {name: version(name) for name in ("slug-lightning", "lightning", "torch")},
        },
    }


def _is_confirmed(objective: Objective, split: str, entries: Sequence[Logged]) -> bool:
    """Whether the first batch, and those that other processes run at the same time, log what they have logged before."""
    seen: list[Logged] = []

    def stop(reader: LogReader) -> bool:
        seen.extend(reader.entries)
        return True

    objective.measure("retain", split, stop=stop)
    numbers = {0} | {entry.number for entry in seen}
    same = _packed(seen) == _packed([entry for entry in entries if entry.number in numbers])
    return same and {entry.name for entry in entries}.issuperset(objective.names["retain"])


def _packed(entries: Sequence[Logged]) -> list[list[Any]]:
    """As JSON keeps it, with every bit of every value, also of a NaN."""
    return [[e.number, e.name, struct.pack(">d", float(e.value)).hex(), e.weight] for e in entries]


def _unpacked(packed: Sequence[Sequence[Any]]) -> list[Logged]:
    entries = [
        Logged(int(number), str(name), struct.unpack(">d", bytes.fromhex(value))[0], int(weight))
        for number, name, value, weight in packed
    ]
    if any(entry.weight <= 0 for entry in entries):
        raise ValueError("a value without a sample")
    return entries


def _write(path: Path, details: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an entry; that this fails is no reason to end a run."""
    text = json.dumps(details, sort_keys=True)
    metadata = {"format": FORMAT, "details": text, "sha256": digest_of(tensors, text)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: many requests may start at the same time, and write the same file.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, atomic_write(path, Path(folder)) as part:
            if path.suffix == ".json":
                part.write_text(json.dumps(metadata))
            else:  # copies, as safetensors refuses tensors that share memory
                save_file({name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}, part, metadata=metadata)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"RetainCache: {path} could not be written ({error})", stacklevel=3)


def _read(
    path: Path, key: Mapping[str, Any], is_first: bool, parameters: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read an entry; of one that is not whole, or not what its name says, only a warning is left.

    Args:
        path: of the entry.
        key: that it must have.
        is_first: whether this process warns.
        parameters: whose gradient it must be.
    """
    if not path.exists():
        return None
    try:
        return _checked(*_loaded(path), key, parameters or {})
    except UNREADABLE as error:
        if is_first:
            warnings.warn(f"RetainCache: {path} is not used, and computed anew: {error}", stacklevel=3)
        return None


def _loaded(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What is in a file; nothing in it is executed."""
    if path.suffix == ".json":
        return json.loads(path.read_text()), {}
    with safe_open(path, framework="pt") as file:
        # Copies: else the tensors would be the file, whatever becomes of it.
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _checked(
    metadata: Any, tensors: dict[str, Tensor], key: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"it is not of the format {FORMAT!r}")
    if metadata["sha256"] != digest_of(tensors, metadata["details"]):
        raise ValueError("the content does not match its digest; it was altered or damaged")
    details = json.loads(metadata["details"])
    if details["key"] != key:
        raise ValueError("it belongs to other weights, data or objectives")
    shapes = {name: (p.shape, torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != shapes:
        raise ValueError("it holds other tensors than the candidates")
    if not parameters:
        _unpacked(details["entries"])
    return details, tensors

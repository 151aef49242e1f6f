"""Cache files: named by their key, written atomically, checked on every reading, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slug_lightning.tensors.bits import digest_of
from slug_lightning.utils.files import atomic_write

FORMAT = "slug-lightning cache 1"
# What reading a file of unknown content can raise, `RuntimeError` including `RecursionError` of nested JSON.
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)


class Entry(NamedTuple):
    """Content of a cache file: plain data, and tensors that are mapped from the file."""

    data: Any
    tensors: dict[str, Tensor]


def cache_path(folder: str | Path, name: str, key: Any) -> Path:
    """Path of the file for a key, which is plain data."""
    return Path(folder) / f"{name}-{hashlib.sha256(_json(key).encode()).hexdigest()[:12]}.safetensors"


def write_entry(path: Path, key: Any, data: Any, tensors: Mapping[str, Tensor], required: bool = False) -> None:
    """Write a cache file, also while other processes write the same one; unless `required`, a failure only warns."""
    header = {"format": FORMAT, "key": _json(key), "data": _json(data)}
    header["sha256"] = digest_of(tensors, "\0".join(header.values()))
    # Copies, as safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, atomic_write(path, Path(folder)) as part:
            save_file(copies, part, metadata=header)
    except (OSError, SafetensorError) as error:
        if required:
            raise
        warnings.warn(f"Cannot write cache file {path}: {error}", stacklevel=3)


def read_entry(path: Path, key: Any, check: Callable[[Entry], None] = lambda _: None, warn: bool = True) -> Entry | None:
    """Read a cache file, or return None, with a warning if it is damaged, was altered or belongs to another key.

    `check` raises an error for content that the caller cannot use.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if header["sha256"] != digest_of(tensors, "\0".join([header["format"], header["key"], header["data"]])):
            raise ValueError("its content does not match its digest")
        if header["key"] != _json(key):
            raise ValueError("it belongs to another key")
        entry = Entry(json.loads(header["data"]), tensors)
        check(entry)
    except _UNREADABLE as error:
        if warn:
            warnings.warn(f"Ignoring cache file {path}, its content is computed again: {error}", stacklevel=3)
        return None
    return entry


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True)

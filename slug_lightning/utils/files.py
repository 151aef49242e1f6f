"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` at the end; on an error `path` stays as it was.

    Where others may be writing the same file, give a `folder`, on the same disk, for the temporary one.
    """
    part = (folder or path.parent) / (path.name + ".part")
    try:
        yield part
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

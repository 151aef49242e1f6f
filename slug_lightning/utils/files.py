"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Write a file whole or not at all: inside, under another name.

    Args:
        path: of the file.
        folder: where the part lies meanwhile, if others may be writing the same file; on the same disk.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.json"
        >>> with atomic_write(path) as part:
        ...     _ = part.write_text("{}")
        ...     path.exists()
        False
        >>> path.read_text()
        '{}'
    """
    part = (folder or path.parent) / (path.name + ".part")
    try:
        yield part
        part.chmod(0o644)  # safetensors leaves what only its owner reads
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

"""A report as a JSON file, the same for every kind of report."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R", bound="JsonFile")


class JsonFile(ABC):
    """What is plain data by `to_dict` and comes back from it by `from_dict` can be written to a file and read."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[R], data: dict[str, Any]) -> R:
        """The inverse of `to_dict`."""

    def to_json(self, path: str | Path) -> None:
        """Write the plain data as JSON; what isn't finite is written as null."""
        Path(path).write_text(json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls: type[R], path: str | Path) -> R:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))


def renamed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give entries of a report written by version 0.1 the keys that they have now."""
    return [{"constraint_usage" if key == "damage" else key: value for key, value in entry.items()} for entry in entries]


def _finite(value: Any) -> Any:
    """Plain data with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value

"""What every kind of report shares: plain data, a JSON file and the closing text."""

from __future__ import annotations

import io
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from rich.console import Console
from rich.table import Table

R = TypeVar("R", bound="Report")
NOT_PLAIN = {"patch", "gallery"}
"""What a report carries and its file does not."""


class Report(ABC):
    """A dataclass of plain data."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    cost: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return a copy as plain data, without patch and gallery."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in NOT_PLAIN}

    @classmethod
    def from_dict(cls: type[R], data: dict[str, Any]) -> R:
        """Build the report that `to_dict` described, also of version 0.1; what a newer version added is left out."""
        known = {name: data[name] for name in {f.name for f in fields(cls)} - NOT_PLAIN if name in data}
        for name in known.keys() & {"trace", "rounds"}:
            known[name] = [{"constraint_usage" if k == "damage" else k: v for k, v in entry.items()} for entry in known[name]]
        return cls(**known)

    def to_json(self, path: str | Path) -> None:
        """Write the plain data as JSON; what isn't finite is written as null."""
        finite = json.loads(json.dumps(self.to_dict()), parse_constant=lambda _: None)
        Path(path).write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls: type[R], path: str | Path) -> R:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def to_text(self, width: int = 100) -> str:
        """Return the closing tables and lines, as text of at most `width` columns."""
        stream = io.StringIO()
        console = Console(file=stream, width=width, no_color=True, markup=False, emoji=False, highlight=False)
        for shown in self._shown(width):
            console.print(shown)
        return stream.getvalue().rstrip("\n")

    @abstractmethod
    def _shown(self, width: int) -> Iterator[Table | str]:
        """Give the tables and lines of the closing text."""

    def _cost_and_notes(self, evaluations: int, width: int) -> Iterator[str]:
        seconds = self.cost.get("seconds", {})
        total = sum(seconds.values()) or 1.0
        phases = ", ".join(f"{phase} {spent:.1f} s ({100 * spent / total:.0f}%)" for phase, spent in seconds.items())
        yield f"{evaluations} evaluations" + (f"; {phases}" if phases else "")
        for unit, ratio in self.cost.get("ratio", {}).items():
            yield f"whole run: {ratio:.2f} x the {unit} of its gradient passes"
        for note in self.notes:
            yield from textwrap.wrap(note, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Report):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def table(
    title: str, columns: Sequence[str], words: int = 1, bold: bool = False, overflow: Literal["ellipsis", "fold"] = "ellipsis"
) -> Table:
    """Make a table whose first columns hold words, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold" if bold else None)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < words else "right", overflow=overflow)
    return made


def number(value: float | None) -> str:
    """Format to four decimals, or three digits of what is small; None is what JSON gives back for NaN and infinity."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"

"""Which passages are still remembered, and which rest: iterative unlearning refinement (ICU, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Status:
    """State of one passage."""

    remembered: bool = True
    epochs: int = 0
    """In which it was trained on."""
    returns: int = 0
    """How often it was remembered again after it had been forgotten."""


class Refinement:
    """The status of every passage, epoch by epoch. A passage rests as soon as one criterion calls it forgotten.

    With `rests=False`, all passages are trained on to the end.
    """

    def __init__(self, count: int, rests: bool = True) -> None:
        self.rests = rests
        self.passages = [Status() for _ in range(count)]

    @property
    def remembered(self) -> list[int]:
        """Numbers of the passages that no criterion calls forgotten."""
        return [i for i, passage in enumerate(self.passages) if passage.remembered]

    @property
    def active(self) -> list[int]:
        """Numbers of the passages to train on."""
        return self.remembered if self.rests else list(range(len(self.passages)))

    def trained(self) -> None:
        """Count an epoch for the active passages."""
        for i in self.active:
            self.passages[i].epochs += 1

    def update(self, forgotten: Sequence[bool]) -> None:
        """Set for each passage whether it is forgotten now."""
        for passage, now in zip(self.passages, forgotten, strict=True):
            passage.returns += not (passage.remembered or now)
            passage.remembered = not now

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(passage) for passage in self.passages]

    def restore(self, data: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `to_list`."""
        self.passages = [Status(**passage) for passage in data]

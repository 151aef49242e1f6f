"""Which passages are still remembered, which rest, and when all is done: iterative unlearning refinement (ICU, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Status:
    """What has become of one passage.

    Attributes:
        remembered: whether it is still to be trained on.
        epochs: for how many it was.
        returns: how often it was remembered again after it had rested.
    """

    remembered: bool = True
    epochs: int = 0
    returns: int = 0


class Refinement:
    """The status of every passage, epoch by epoch. A passage rests as soon as one criterion calls it forgotten.

    Args:
        count: number of passages.
        rests: whether forgotten passages rest; else all of them are trained on to the end.

    Example:
        >>> refinement = Refinement(3)
        >>> refinement.update([False, True, True])
        >>> refinement.active
        [0]
        >>> refinement.update([True, False, True])
        >>> refinement.active, refinement.passages[1].returns
        ([1], 1)
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
        """Count an epoch for those it has trained on."""
        for i in self.active:
            self.passages[i].epochs += 1

    def update(self, forgotten: Sequence[bool]) -> None:
        """Tell remembered passages from forgotten ones.

        Args:
            forgotten: of each passage, whether it is forgotten now.
        """
        for passage, now in zip(self.passages, forgotten, strict=True):
            passage.returns += not (passage.remembered or now)
            passage.remembered = not now

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(passage) for passage in self.passages]

    def restore(self, data: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `to_list`."""
        self.passages = [Status(**passage) for passage in data]

"""Progress in the kind of bar that the Trainer shows."""

from __future__ import annotations

from typing import Any

from slug_lightning.utils.progress import Progress


def progress_of(trainer: Any) -> Progress:
    """The trainer's kind of bar, on rank 0."""
    return Progress(trainer.progress_bar_callback if trainer.is_global_zero else None)

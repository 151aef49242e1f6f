"""Show how far a run is where the Trainer shows it."""

from __future__ import annotations

from typing import Any

from slug_lightning.utils.progress import Progress


def progress_of(trainer: Any) -> Progress:
    """In the first of several processes, the kind of the trainer's bar."""
    return Progress(trainer.progress_bar_callback if trainer.is_global_zero else None)

"""When forgetting happens inside a Trainer."""

from slug_lightning.callbacks.icu import ICUCallback
from slug_lightning.callbacks.unlearn import UnlearnCallback

__all__ = ["ICUCallback", "UnlearnCallback"]

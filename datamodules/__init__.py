"""Where forget and retain come from."""

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.datamodules.emoji import EmojiDataModule

__all__ = ["EmojiDataModule", "UnlearnDataModule"]

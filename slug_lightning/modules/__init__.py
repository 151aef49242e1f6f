"""What forgetting means for a kind of model."""

from slug_lightning.modules.base import UnlearnModule
from slug_lightning.modules.classifier import ClassifierModule
from slug_lightning.modules.clip import ClipModule, EmbeddedClip

__all__ = ["ClassifierModule", "ClipModule", "EmbeddedClip", "UnlearnModule"]

"""Datamodules with data to forget and to retain."""

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.datamodules.concept import ConceptDataModule
from slug_lightning.datamodules.demo.canvas import CanvasDataModule
from slug_lightning.datamodules.demo.emoji import EmojiDataModule
from slug_lightning.datamodules.demo.python_docs import PythonDocsDataModule
from slug_lightning.datamodules.demo.questions import EmojiQuestionDataModule
from slug_lightning.datamodules.image_text.image_text import ImageTextDataModule
from slug_lightning.datamodules.image_text.pairs import ImageTextFolder, ImageTextShards
from slug_lightning.datamodules.image_text.questions import VisualQuestionDataModule
from slug_lightning.datamodules.image_text.text_to_image import TextToImageDataModule
from slug_lightning.datamodules.samples import SampleDataModule
from slug_lightning.datamodules.text.passages import PassageDataModule

__all__ = [
    "CanvasDataModule",
    "ConceptDataModule",
    "EmojiDataModule",
    "EmojiQuestionDataModule",
    "ImageTextDataModule",
    "ImageTextFolder",
    "ImageTextShards",
    "PassageDataModule",
    "PythonDocsDataModule",
    "SampleDataModule",
    "TextToImageDataModule",
    "UnlearnDataModule",
    "VisualQuestionDataModule",
]

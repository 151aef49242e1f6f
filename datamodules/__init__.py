"""Where forget and retain come from."""

from slug_lightning.datamodules.base import UnlearnDataModule
from slug_lightning.datamodules.canvas import CanvasDataModule
from slug_lightning.datamodules.concept import ConceptDataModule
from slug_lightning.datamodules.emoji import EmojiDataModule
from slug_lightning.datamodules.emoji_questions import EmojiQuestionDataModule
from slug_lightning.datamodules.image_text import ImageTextDataModule
from slug_lightning.datamodules.pairs import ImageTextFolder, ImageTextShards
from slug_lightning.datamodules.passages import PassageDataModule
from slug_lightning.datamodules.python_docs import PythonDocsDataModule
from slug_lightning.datamodules.questions import VisualQuestionDataModule
from slug_lightning.datamodules.text_to_image import TextToImageDataModule

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
    "TextToImageDataModule",
    "UnlearnDataModule",
    "VisualQuestionDataModule",
]

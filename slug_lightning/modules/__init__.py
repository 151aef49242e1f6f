"""LightningModules by model family."""

from slug_lightning.modules.base import UnlearnModule
from slug_lightning.modules.causal_lm import CausalLMModule, EmbeddedLM
from slug_lightning.modules.classifier import ClassifierModule
from slug_lightning.modules.clip import ClipModule, EmbeddedClip
from slug_lightning.modules.diffusion import DiffusionModule, EmbeddedCanvas
from slug_lightning.modules.vlm import EmbeddedVLM, VLMModule

__all__ = [
    "CausalLMModule",
    "ClassifierModule",
    "ClipModule",
    "DiffusionModule",
    "EmbeddedCanvas",
    "EmbeddedClip",
    "EmbeddedLM",
    "EmbeddedVLM",
    "UnlearnModule",
    "VLMModule",
]

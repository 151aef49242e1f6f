"""Classifiers of images or anything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slug_lightning.modules.base import UnlearnModule, negative_log_likelihood


class ClassifierModule(UnlearnModule):
    """Wrap a classifier: cross-entropy as both losses, accuracy as the metric, chance as the target.

    `nll`, the mean negative log-likelihood of the labels in nats, is logged as well.

    Args:
        model: returns logits, `[B, num_classes]`, for the first element of a batch; the second holds the labels, `[B]`.
        num_classes: number of classes.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Example:
        >>> module = ClassifierModule(nn.Linear(4, 10), num_classes=10)
        >>> module.forget_metric, module.chance
        ('accuracy', 0.1)
    """

    def __init__(self, model: nn.Module, num_classes: int, *, learning_rate: float = 1e-5) -> None:
        super().__init__(model, _loss, learning_rate=learning_rate)
        self.num_classes = num_classes
        self.chance = 1 / num_classes
        self.forget_metric = self.retain_metric = "accuracy"

    def embed(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits, `[B, num_classes]`: classes that the model confuses with each other are near."""
        return self.model(batch[0])

    def labels(self, batch: Any) -> dict[str, list[str]]:
        """Return the class of each sample, by its number."""
        return {"class": [str(label) for label in batch[1].tolist()]}

    def scores(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return whether the highest logit is the label's, and the label's negative log-likelihood in nats, each `[B]`."""
        logits, labels = self.model(batch[0]), batch[1]
        return {"accuracy": (logits.argmax(1) == labels).float(), "nll": negative_log_likelihood(logits, labels)}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])

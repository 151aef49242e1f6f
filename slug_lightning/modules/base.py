"""A LightningModule around any `nn.Module`, from a loss and a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slug_lightning.tensors.dtensor import shard
from slug_lightning.utils.modules import WrapsModel


class UnlearnModule(pl.LightningModule, WrapsModel):
    """Wrap a model as a LightningModule that can unlearn, from a loss and a score.

    Args:
        model: any module. Patches and plain weights carry its own tensor names.
        loss: takes the model and a batch, returns the mean loss, a scalar. Used for forget and retain batches; None in
            subclasses that override both steps.
        score: takes the model and a batch, returns one number per sample, `[B]`, such as 1 where the answer is right; its
            mean over a set is the metric "score". Without it, the loss is the metric.
        forget_loss: used for forget batches instead of `loss`.
        chance: the score of a model that guesses; the default target of forgetting.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> def right(model, batch):
        ...     return (model(batch[0]).argmax(1) == batch[1]).float()
        >>> module = UnlearnModule(net, loss, right, chance=1 / 3)
        >>> module.forget_metric, module.chance
        ('score', 0.3333333333333333)
    """

    forget_metric: Optional[str] = None
    retain_metric: Optional[str] = None
    forget_target: Optional[float] = None
    chance: Any = None
    towers: Optional[Mapping[str, str | Sequence[str]]] = None
    """Patterns of parameter names by tower, for a model whose towers are ranked separately."""
    methods: tuple[str, ...] = ()
    """Names of methods of the model, besides `forward`, that the losses call: FSDP2 must register them."""

    def __init__(
        self,
        model: nn.Module,
        loss: Optional[Callable[[nn.Module, Any], Tensor]],
        score: Optional[Callable[[nn.Module, Any], Tensor]] = None,
        *,
        forget_loss: Optional[Callable[[nn.Module, Any], Tensor]] = None,
        chance: Optional[float] = None,
        learning_rate: float = 1e-5,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss: Any = loss
        self.score = score
        self.forget_loss: Any = forget_loss or loss
        self.learning_rate = learning_rate
        if score is not None:
            self.forget_metric = self.retain_metric = "score"
            self.chance = chance

    def configure_model(self) -> None:
        """Shard the model under `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"], self.methods)

    def forget_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a forget batch, which the edit raises."""
        return self.forget_loss(self.model, batch)

    def retain_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a retain batch, which the edit keeps low."""
        return self.loss(self.model, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Continue training with the retain loss."""
        loss = self.retain_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def scores(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """Return scores by metric name, one number per sample, `[B]`; NaN where a sample has none."""
        return {} if self.score is None else {"score": self.score(self.model, batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean of every score over the samples that have one."""
        for name, values in self.scores(batch, batch_idx).items():
            valid = values[~values.isnan()]
            if len(valid):
                # In 64 bits, so that 38 of 40 is exactly the bound 0.95; MPS has no 64 bits.
                precise = torch.float32 if valid.device.type == "mps" else torch.float64
                self.log(name, valid.mean(dtype=precise), batch_size=len(valid), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-log p(label)` of each sample, in nats, `[B]`; NaN for a label that no logit stands for.

    Args:
        logits: `[B, C]`.
        labels: `[B]`.

    Example:
        >>> negative_log_likelihood(torch.zeros(2, 4), torch.tensor([3, -1]))
        tensor([1.3863,    nan])
    """
    known = (labels >= 0) & (labels < logits.shape[1])
    values = cross_entropy(logits.float(), labels.where(known, 0).long(), reduction="none")
    return values.masked_fill(~known, torch.nan)

"""Causal language models that recite passages: the module for ICU and its baselines, and for SLUG."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from slug_lightning.embedded import LM
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import ICU, LMLoss, Reference, sequence_nll
from slug_lightning.lm.metrics import MemorizationAccuracy, Perplexity
from slug_lightning.lm.models import load_causal_lm, load_tokenizer, logits_of
from slug_lightning.lm.reference import AdaptersOff, FrozenCopy
from slug_lightning.lm.sequences import Sequences
from slug_lightning.lm.topk import TopK
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.utils.pretrained import refuse_adapters


def adam(parameters: Any) -> torch.optim.Optimizer:
    """ICU's optimizer (arXiv 2407.20271, appendix): Adam with learning rate 5e-6 and betas 0.9 and 0.98."""
    return torch.optim.Adam(parameters, lr=5e-6, betas=(0.9, 0.98))


class CausalLMModule(UnlearnModule):
    """A transformers causal language model that forgets passages which it recites.

    In training (ICU and the baselines), a batch is what `slug_lightning.datamodules.PassageDataModule` serves: passages to
    forget, the retain texts that each is paired with, and each passage's weight. In evaluation, and for SLUG
    (`UnlearnCallback`), it is any mapping with `input_ids` and `attention_mask`, `[B, T]`, padded on the right; the loss is then
    the mean over sequences of the mean negative log-likelihood of their tokens, in nats, and the metrics are
    `memorization_accuracy`, in [0, 1], a mean over sequences, and `perplexity`, at least 1, over all tokens that count.

    Args:
        model: name or folder of a transformers causal language model, or the model.
        tokenizer: name, folder or object; default: that of `model`, where this is a name or folder. It needs no padding token.
        loss: default: `ICU()`; or a baseline of `slug_lightning.lm.losses`.
        reference: where the original model's distribution comes from, for losses that need it: "copy" (a frozen copy: as many
            bytes as the model, on its device), "adapters" (the model with its PEFT adapters disabled: none) or "top-k"
            (computed once and stored on disk: 6 bytes for each of `top_k` tokens per position).
        top_k: how many of the most likely tokens "top-k" stores for each position.
        reference_dir: folder where "top-k" stores them.
        optimizer: makes the optimizer of the parameters that are not frozen.
        scheduler: makes its learning-rate scheduler, which acts after every step. Use a warm-up: Adam's first steps are as large
            as all others, whatever the gradient.
        dropout: whether dropout acts in training; off by default, as in ICU. Gradient checkpointing of transformers needs it on.

    Raises:
        UnlearnError: if model, tokenizer or reference cannot be made; in a step, if sequences are longer than the model's
            context.

    Example:
        >>> from slug_lightning.modules import EmbeddedLM
        >>> module = EmbeddedLM()
        >>> sequences = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
        >>> bool(module.forget_step(sequences, 0) > 0)
        True
    """

    forget_metric = "memorization_accuracy"
    retain_metric = "perplexity"
    higher_is_better = {"memorization_accuracy": True, "perplexity": False}

    def __init__(
        self,
        model: Union[str, Path, nn.Module],
        *,
        tokenizer: Any = None,
        loss: Optional[LMLoss] = None,
        reference: Literal["copy", "adapters", "top-k"] = "copy",
        top_k: int = 64,
        reference_dir: Optional[str] = None,
        optimizer: OptimizerCallable = adam,
        scheduler: Optional[LRSchedulerCallable] = None,
        dropout: bool = False,
    ) -> None:
        if tokenizer is None and not isinstance(model, nn.Module):
            tokenizer = model
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        if not isinstance(model, nn.Module):
            model = load_causal_lm(model)
        refuse_adapters("model", model)
        if reference == "top-k" and reference_dir is None:
            raise UnlearnError("reference_dir must be a folder where reference='top-k' stores the original's distribution")
        super().__init__(model, mean_nll)
        self.tokenizer = tokenizer
        self.lm_loss: LMLoss = loss or ICU()
        self.kind = reference
        self.top_k = top_k
        self.reference_dir = reference_dir
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.dropout = dropout
        self.reference: Optional[Reference] = None
        self.memorization_accuracy = MemorizationAccuracy()
        self.perplexity = Perplexity()

    def logits(self, sequences: Sequences) -> Tensor:
        """Compute the model's logits, `[B, T, V]`."""
        return logits_of(self.model, sequences)

    # ---- training

    def setup(self, stage: str) -> None:
        """Make the reference while the model is the original: a checkpoint is restored after this.

        A second fit of the same module keeps the first reference.
        """
        if stage == "fit":
            self.model.train()  # what transformers loads is in evaluation mode, of which Lightning warns
        if stage != "fit" or not self.lm_loss.needs_reference or self.reference is not None:
            return
        if self.kind == "adapters":
            self.reference = AdaptersOff(self.model)
            self.reference.digest()  # now, before the trainer's precision rounds the weights
        elif self.kind == "copy":
            self.reference = FrozenCopy(self.model)
        else:
            assert self.reference_dir is not None
            self.model.to(self.trainer.strategy.root_device)
            self.reference = TopK(self.model, self.reference_dir, self.top_k)
            data: Any = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "every_batch"):
                raise UnlearnError("reference: 'top-k' must know all passages before training; fit with a PassageDataModule")
            self.reference.prepare(data.every_batch())

    def on_train_start(self) -> None:
        """Switch dropout off, unless asked for; also in a fit that resumes within an epoch."""
        self.model.train(self.dropout)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the passages' losses by weight; for plain sequences, take their mean negative log-likelihood."""
        if "forget" not in batch:
            return super().training_step(batch, batch_idx)
        parts = self.lm_loss(self.logits, batch, self.reference)
        totals = {name: (batch["weight"] * values).sum() for name, values in parts.items()}
        loss = torch.stack(list(totals.values())).sum()
        logged = {f"loss/{name}": total.detach() for name, total in totals.items()} | {"loss/total": loss.detach()}
        # By their weights, the mean of the ranks' sums is the global mean.
        self.log_dict(logged, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch["weight"]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which original the run started from."""
        if self.reference is not None:
            checkpoint["original"] = self.reference.digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another original."""
        if self.reference is not None and checkpoint.get("original", self.reference.digest()) != self.reference.digest():
            raise UnlearnError(
                "model: the checkpoint's run began from another model; build the module from the original weights (not from the "
                "checkpoint), and pass the checkpoint as ckpt_path"
            )

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log memorization accuracy and perplexity."""
        logits = self.logits(batch)
        self.memorization_accuracy.update(logits[:, :-1].argmax(-1), batch)
        self.perplexity.update(logits, batch)
        for name in ("memorization_accuracy", "perplexity"):
            self.log(name, getattr(self, name), on_epoch=True)


class EmbeddedLM(CausalLMModule):
    """The small language model that ships with the package: it recites parts of Python's language reference.

    The options are those of `CausalLMModule`.

    Example:
        >>> type(EmbeddedLM().model).__name__
        'LlamaForCausalLM'
    """

    def __init__(
        self,
        *,
        loss: Optional[LMLoss] = None,
        optimizer: OptimizerCallable = adam,
        scheduler: Optional[LRSchedulerCallable] = None,
    ) -> None:
        super().__init__(LM, loss=loss, optimizer=optimizer, scheduler=scheduler)


def mean_nll(model: nn.Module, sequences: Sequences) -> Tensor:
    """Mean over sequences of the mean negative log-likelihood of their tokens, in nats."""
    return sequence_nll(logits_of(model, sequences), sequences).mean()

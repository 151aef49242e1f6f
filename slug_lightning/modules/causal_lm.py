"""Causal language models that recite: the module for ICU and its baselines, and for SLUG on passages."""

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
from slug_lightning.lm.original import logits_of
from slug_lightning.lm.pretrained import load_causal_lm, load_tokenizer
from slug_lightning.lm.reference import AdaptersOff, FrozenCopy
from slug_lightning.lm.sequences import Sequences
from slug_lightning.lm.topk import TopK
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.utils.pretrained import refuse_adapters


def adam(parameters: Any) -> torch.optim.Optimizer:
    """ICU's optimizer (arXiv 2407.20271, appendix): Adam with learning rate 5e-6 and betas 0.9 and 0.98."""
    return torch.optim.Adam(parameters, lr=5e-6, betas=(0.9, 0.98))


class CausalLMModule(UnlearnModule):
    """A transformers causal language model that is to forget passages that it recites.

    In training (ICU and the baselines), a batch is what `slug_lightning.datamodules.PassageDataModule` serves: passages to
    forget, a pair of each to keep, and what each passage counts. In evaluation, and for SLUG (`UnlearnCallback`), it is any
    mapping with `input_ids` and `attention_mask`, `[B, T]`, padded on the right; the loss is then the mean over sequences of
    the mean negative log-likelihood of their tokens, in nats, and the metrics are `memorization_accuracy`, in [0, 1], a mean
    over sequences, and `perplexity`, at least 1, over all tokens that count.

    Dropout is off in training too, unless `dropout` says otherwise (ICU's setting): the model is in evaluation mode.

    Args:
        model: name or folder of a transformers causal language model, or the model.
        tokenizer: name, folder or object; default: the one that belongs to `model` by its name. It needs no padding token:
            what is padded is masked.
        loss: what training descends: `ICU()`, or a baseline of `slug_lightning.lm.losses`.
        reference: where the original model's distribution comes from, for losses that need it: "copy" (a frozen copy: as many
            bytes as the model, on its device), "adapters" (the model with its PEFT adapters switched off: none) or "top-k"
            (computed once and kept on disk: 6 bytes for each of `top_k` tokens a position).
        top_k: how many of the likeliest tokens "top-k" keeps of each position.
        reference_dir: folder where "top-k" keeps them.
        optimizer: makes the optimizer of the parameters that are not frozen.
        scheduler: makes what changes its rate from step to step. A warm-up is worth having: Adam's first steps are as long as all
            others, whatever the gradient.
        dropout: whether the model's dropout acts while it is trained. Gradient checkpointing of transformers needs it on.

    Raises:
        UnlearnError: if the model's tokenizer is missing, or the reference cannot be had; in every step, if sequences are longer
            than the model's context.

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
            raise UnlearnError("reference_dir: reference='top-k' keeps the original's distribution on disk; name a folder")
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
        """What the model predicts at each position, `[B, T, V]`."""
        return logits_of(self.model, sequences)

    # ---- training

    def setup(self, stage: str) -> None:
        """Keep what the original model says, while it is there: a checkpoint is restored after this.

        A second fit of the same module keeps the first reference: it is the original that counts.
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
                raise UnlearnError("reference: 'top-k' must know all passages beforehand; fit with a PassageDataModule")
            self.reference.prepare(data.every_batch())

    def on_train_start(self) -> None:
        """Switch dropout off, unless it was asked for: also of a fit that goes on within an epoch."""
        self.model.train(self.dropout)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of each passage times what it counts, summed; of plain sequences, their mean negative log-likelihood."""
        if "forget" not in batch:
            return super().training_step(batch, batch_idx)
        parts = self.lm_loss(self.logits, batch, self.reference)
        totals = {name: (batch["weight"] * values).sum() for name, values in parts.items()}
        loss = torch.stack(list(totals.values())).sum()
        logged = {f"loss/{name}": total.detach() for name, total in totals.items()} | {"loss/total": loss.detach()}
        # Weights make the sum of each process a part of the global mean: the mean over processes is that mean.
        self.log_dict(logged, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch["weight"]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell which original the run refers to."""
        if self.reference is not None:
            checkpoint["original"] = self.reference.digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on against another original than before."""
        if self.reference is not None and checkpoint.get("original", self.reference.digest()) != self.reference.digest():
            raise UnlearnError(
                "model: the checkpoint belongs to a run that began from another model; build the module from the original "
                "weights (not from the checkpoint), and pass the checkpoint as ckpt_path"
            )

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log how much is recited, and the perplexity."""
        logits = self.logits(batch)
        self.memorization_accuracy.update(logits[:, :-1].argmax(-1), batch)
        self.perplexity.update(logits, batch)
        for name in ("memorization_accuracy", "perplexity"):
            self.log(name, getattr(self, name), on_epoch=True)


class EmbeddedLM(CausalLMModule):
    """The language model that ships with the package: small, ours, trained on Python's language reference, parts of it by heart.

    Args:
        loss: as in `CausalLMModule`.
        optimizer: likewise.
        scheduler: likewise.

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

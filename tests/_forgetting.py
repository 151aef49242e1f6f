"""A fit that makes the tiny language model forget what it recites, and a slow, plain measurement of what is left of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from _tiny_lm import KEPT, PREFIX, RECITED, SUFFIX, UNSEEN, reciting, tokenizer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from slug_lightning.callbacks import ICUCallback
from slug_lightning.datamodules import PassageDataModule
from slug_lightning.lm.criteria import Criterion
from slug_lightning.modules import CausalLMModule

N = 3
"""Of the extraction likelihood, in tests."""


def quick(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def passages(forget: list[str] = RECITED, **options: Any) -> PassageDataModule:
    given = {"keep": KEPT, "unseen": UNSEEN, "prefix": PREFIX, "suffix": SUFFIX, "batch_size": 3}
    return PassageDataModule(forget, **{**given, **options})


def language_model(model: Any = None, **options: Any) -> CausalLMModule:
    given = {"tokenizer": tokenizer(), "optimizer": quick}
    return CausalLMModule(reciting() if model is None else model, **{**given, **options})


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 20, **quiet, **options}, callbacks=list(callbacks))


def icu(**options: Any) -> ICUCallback:
    return ICUCallback(**{"n": N, **options})


def weights(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@dataclass
class Scripted(Criterion):
    """Calls forgotten what a script says, each time that the passages are looked at; the last entry stays."""

    script: list[set[int]] = field(default_factory=list)
    first: int = 1
    """How often they are looked at before the script begins: once for the report."""
    name = "scripted"

    def __post_init__(self) -> None:
        self.below = 0.5
        self.looks = 0

    def values(self, evidence: Any) -> list[float]:
        known = {text.split()[0] + text.split()[-1]: i for i, text in enumerate(RECITED)}
        numbers = [known.get(e.prefix.split()[0] + e.truth.split()[-1]) for e in evidence]
        if None in numbers:  # not those to forget
            return [1.0] * len(evidence)
        entry = self.script[min(max(self.looks - self.first, 0), len(self.script) - 1)]
        self.looks += 1
        return [0.0 if number in entry else 1.0 for number in numbers]


class Seen(Callback):
    """Which passages counted in each epoch, and the losses."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []
        self.sizes: list[int] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        counting = batch["index"][batch["weight"] > 0].tolist()
        self.epochs[-1] += counting
        self.sizes.append(len(batch["index"]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


# ---- measured slowly: token by token, without a cache, from what the definitions say


@torch.no_grad()
def continued(model: Any, ids: Tensor, count: int) -> Tensor:
    """Rows `[B, P]` with `count` tokens more, each the likeliest."""
    for _ in range(count):
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@torch.no_grad()
def measured(model: Any, rows: Tensor, prefix: int = PREFIX, n: int = N) -> dict[str, Tensor]:
    """Of passages `[B, T]`: accuracy, likelihood and negative log-likelihood `[B]`, and the completions `[B, T - prefix]`."""
    was = model.training
    length = rows.shape[1]
    logits = model.eval()(rows).logits[:, :-1]
    chances = logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    likelihood = torch.zeros(len(rows))
    for t in range(1, length - n + 1):
        said = continued(model, rows[:, :t], length - t)[:, t:].tolist()
        for i, (tokens, truth) in enumerate(zip(said, rows[:, t:].tolist(), strict=True)):
            there = [truth[k : k + n] for k in range(len(truth) - n + 1)]
            grams = [tokens[k : k + n] for k in range(len(tokens) - n + 1)]
            likelihood[i] += sum(gram in there for gram in grams) / len(grams) / (length - n)
    completions = continued(model, rows[:, :prefix], length - prefix)[:, prefix:]
    model.train(was)
    return {
        "memorization_accuracy": (logits.argmax(-1) == rows[:, 1:]).float().mean(1),
        "extraction_likelihood": likelihood,
        "nll": -chances.mean(1),
        "completions": completions,
    }

"""The original model's likelihoods after training has changed it: from a copy, without adapters, or from disk."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import log_likelihood, sequence_kl
from slug_lightning.lm.models import logits_of, refuse_absent, weights_digest
from slug_lightning.lm.sequences import Sequences
from slug_lightning.objective.eval_mode import eval_mode


class _Recomputed(ABC):
    """Runs the original each time, without gradients: its logits are held, `[B, T, V]`, and no graph."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._trained: set[str] = set()
        self._digest = ""

    @abstractmethod
    def _logits(self, sequences: Sequences) -> Tensor:
        """Of the original."""

    def kl(self, logits: Tensor, sequences: Sequences) -> Tensor:
        """KL(p₀ ‖ p) of each sequence, `[B]`."""
        return sequence_kl(logits, self._logits(sequences), sequences)

    def log_likelihood(self, sequences: Sequences, start: int = 1) -> Tensor:
        """Log p₀ of each sequence, `[B]`."""
        return log_likelihood(self._logits(sequences), sequences, start)

    def memory(self) -> dict[str, int]:
        """None that lasts."""
        return {"device": 0, "disk": 0}

    def digest(self) -> str:
        """SHA-256 of the original's weights, without adapters."""
        self._digest = self._digest or weights_digest(self.model, self._trained)
        return self._digest


class FrozenCopy(_Recomputed):
    """A second model, which stays as the first one is now; it needs as much memory as that one's weights, on each rank.

    Tied weights are tied in the copy, too. Weights that are not here, on the meta device or sharded, are refused.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_absent(model)
        super().__init__(copy.deepcopy(model).requires_grad_(False).eval())

    def memory(self) -> dict[str, int]:
        """All of it on the device, tied weights once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {"device": sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values()), "disk": 0}

    @torch.no_grad()
    def _logits(self, sequences: Sequences) -> Tensor:
        return logits_of(self.model.to(sequences["input_ids"].device), sequences)


class AdaptersOff(_Recomputed):
    """The model itself with its adapters disabled; the cheapest reference, where only adapters are trained.

    The original is the `PeftModel` without any adapter, so training must begin from fresh ones, which change nothing. A model
    is refused if disabling its adapters would not restore it: other weights are trained too, or the adapters are merged.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not hasattr(model, "disable_adapter"):
            raise UnlearnError(
                f"reference: {type(model).__name__} has no adapters to disable; give a model that peft.get_peft_model made, "
                "or use FrozenCopy or TopK"
            )
        refuse_absent(model)
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise UnlearnError("reference: the adapters are merged into the weights; call model.unmerge_adapter() first")
        self._trained = set(_trainable(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own on trained biases, which is an error here
            with self._off():
                remaining = _trainable(model)
        if remaining:
            raise UnlearnError(
                f"reference: {remaining[0]} is trainable but belongs to no adapter, so disabling the adapters does not restore "
                "the original; freeze it, or use FrozenCopy or TopK"
            )

    @torch.no_grad()
    def _logits(self, sequences: Sequences) -> Tensor:
        with self._off():
            return logits_of(self.model, sequences)

    @contextmanager
    def _off(self) -> Iterator[None]:
        # When enabling adapters again, peft makes all active ones trainable, also those that were frozen.
        trainable = {p: p.requires_grad for p in self.model.parameters()}
        try:
            with eval_mode(self.model), self.model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

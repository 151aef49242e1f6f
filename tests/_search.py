"""What a search takes, made for a single objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

from slug_lightning.methods.base import Context
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.choice import LeastUsage
from slug_lightning.methods.slug.layer_search import smallest_step
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import Layer
from slug_lightning.utils.progress import Progress


def context_of(objective: Objective, tolerance: float, concepts: Sequence[Concept] = (), layers: Iterable[Layer] = ()) -> Context:
    """A context without bars, costs and caches."""
    return Context(list(concepts), list(layers), objective, tolerance, False, Progress(None), lambda name: nullcontext())


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The one that is chosen by default."""
    return LeastUsage()(trials).trial


def smallest_of(trials: Iterable[Trial], layer: str | None) -> Trial | None:
    """The smallest step that forgets, of one layer or of all."""
    return smallest_step([trial for trial in trials if layer in (None, trial.layer)])

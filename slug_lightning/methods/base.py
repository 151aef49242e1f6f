"""The seam between a way to find edits and the run around it: a `Method` gets a `Context` and gives an `Outcome` per concept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.near import combined_usage
from slug_lightning.methods.norms import direction_norm, norm
from slug_lightning.methods.passes import Passes
from slug_lightning.methods.trial import Trial
from slug_lightning.objective.factors import Factor
from slug_lightning.objective.metrics import Metric, constraint_usage, refuse_infinite
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.dtensor import local
from slug_lightning.tensors.layers import Layer, count_as_written, find_layers
from slug_lightning.utils.progress import Progress


@dataclass
class Outcome:
    """What a method has found for one concept; plain data, of which the harness makes the report.

    Attributes:
        concept: its name.
        edit: what to do to the model, all tensors at once; None where nothing meets the bounds.
        relative_step: of the edit, for the report.
        trials: every evaluation.
        layers: rows as `slug_lightning.methods.slug.statistics.LayerStatistics.row` gives them, one a candidate; or none.
        search_after: `{"forget": {…}, "retain": {…}}` on the validation split with all edits of the run in the model;
            measured by the harness where empty.
        notes: sentences for the report.
    """

    concept: str
    edit: Optional[EditStep] = None
    relative_step: Optional[float] = None
    trials: list[Trial] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    search_after: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Context:
    """All that a method sees of a run: no Trainer, no callback, no report.

    Its methods are collective, and so is what `evaluator` gives: every rank must call them in the same order.

    Attributes:
        concepts: what to forget; those with an `edit` were forgotten by an earlier run, and keep it.
        layers: what may be edited, as `Method.layers_of` gave it.
        objective: measures the retain set; each concept has one for its forget set.
        retain_tolerance: how much each retain metric may lose.
        all_or_nothing: whether nothing is edited unless every concept has an edit within the bounds.
        progress: bars and lines.
        phase: a context manager by name, inside which the cost belongs to that phase.
        retain_cache: where gradients of the retain set are kept between runs, or None.
        offload_gradient: whether forget gradients are kept in the host's memory.
        until_report: what is entered here is left after the report's measurements, which it may spare work.
        edits: puts edits into the model for a while.
        notes: sentences about the whole run, for the report.
        rounds: measurements of all edits together, for the report.
        passes: runs what `gradient` and `statistics` ask for.
    """

    concepts: list[Concept]
    layers: list[Layer]
    objective: Objective
    retain_tolerance: float
    all_or_nothing: bool
    progress: Progress
    phase: Callable[[str], AbstractContextManager[None]]
    retain_cache: Optional[RetainCache] = None
    offload_gradient: bool = False
    until_report: ExitStack = field(default_factory=ExitStack)
    edits: TemporaryEdits = field(default_factory=TemporaryEdits)
    notes: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    passes: Passes = field(init=False)
    _retain_gradient: Optional[dict[str, Tensor]] = None
    _retain_before: Optional[dict[str, float]] = None

    def __post_init__(self) -> None:
        self.passes = Passes(self.objective, self.edits, self.retain_cache, self.offload_gradient, self.notes, self.phase)

    def gradient(
        self, kind: Kind, layers: Sequence[Layer], concept: Optional[Concept] = None, at: Sequence[EditStep] = ()
    ) -> dict[str, Tensor]:
        """Differentiate the mean loss over the gradient split.

        Args:
            kind: "forget" or "retain".
            layers: whose tensors are differentiated.
            concept: whose forget set, for "forget".
            at: edits that are in the model meanwhile.

        Returns:
            By tensor name, fp32; of a sharded tensor this process's part.
        """
        if kind not in ("forget", "retain") or (kind == "forget") != (concept is not None):
            raise UnlearnError(f"gradient: give kind 'forget' with a concept, or 'retain' without, got {kind!r}")
        if concept is not None:
            return self.passes.forget_gradient(concept, layers, at).tensors
        return self.passes.retain_gradient(layers, at)

    def statistics(
        self,
        layers: Sequence[Layer],
        needs: Iterable[str],
        concept: Optional[Concept] = None,
        at: Sequence[EditStep] = (),
        backward: bool = True,
    ) -> dict[str, dict[str, Factor]]:
        """Collect second moments of what these layers see over the gradient split; those of the retain set only once.

        Args:
            layers: whose tensors.
            needs: which of `slug_lightning.objective.curvature.NEEDS`.
            concept: whose forget set, for those of the forget set.
            at: edits that are in the model meanwhile.
            backward: whether to differentiate the loss, so that only positions count that it depends on. Input covariances can
                be had without, over all positions that no `attention_mask` excludes.

        Returns:
            By need, then by tensor name.
        """
        return self.passes.statistics(layers, needs, concept, at, backward)

    def unit_step(self, layer: Layer, direction: Mapping[str, Tensor]) -> float:
        """The step λ along a direction that is as long as the layer's weights; collective."""
        weights = {name: local(p) for name, p in layer.parameters.items()}
        processes = self.objective.processes
        return norm(layer, weights, processes) / direction_norm(layer, direction, processes)

    def shared_retain_gradient(
        self, last: bool, layers: Sequence[Layer], watched: Sequence[Layer] = (), needs: frozenset[str] = frozenset()
    ) -> dict[str, Tensor]:
        """The retain gradient of layers; where nothing is edited, computed once for several concepts.

        Args:
            last: whether to let go of it afterwards.
            layers: those of the run, or others where something is edited.
            watched: layers of which `statistics` will be asked next.
            needs: what of them.
        """
        if self.edits.active:
            return self.passes.retain_gradient(layers, watched=watched, needs=needs)
        tensors = self._retain_gradient or self.passes.retain_gradient(layers, watched=watched, needs=needs)
        self._retain_gradient = None if last else tensors
        return tensors

    def retain_before(self, known: Optional[dict[str, float]] = None) -> dict[str, float]:
        """The retain metrics on the validation split, unedited; measured once, unless they are `known`."""
        if self._retain_before is None:
            if known is None and self.edits.active:
                raise UnlearnError("Context: measure retain_before(), or open an evaluator, before any edit is applied")
            self._retain_before = self.objective.measured("retain", "val") if known is None else known
            refuse_infinite("retain", self._retain_before)
        return self._retain_before

    @contextmanager
    def evaluator(
        self, concept: Concept, layers: Sequence[Layer], at: Sequence[EditStep] = ()
    ) -> Iterator[Callable[[EditStep, float], Trial]]:
        """Evaluate edits of these layers, computing only what they change where replay is on.

        Args:
            concept: whose forget metric is measured.
            layers: that will be edited; edits of several of them at once need a layer of their union.
            at: edits that are in the model meanwhile; everything is recorded anew for them.

        Yields:
            A function of an edit and its relative step that measures both bounds.
        """
        self.retain_before()
        objective = concept.objective
        with (
            self.edits.applied(*at),
            objective.replaying(layers),
            recorded(objective, "forget", "val", layers),
            recorded(objective, "retain", "val", layers),
            recorded(objective, "near", "val", layers) if concept.near and concept.near.binds else nullcontext(),
        ):
            yield partial(self._evaluate, concept, self.edits.active)

    def _evaluate(self, concept: Concept, base: list[EditStep], edit: EditStep, relative_step: float) -> Trial:
        if self.edits.active != base:
            raise UnlearnError("Context.evaluator: other edits are in the model now; give them as at=…")
        with self.edits.applied(edit):
            values = concept.objective.measured("forget", "val", edited=edit.layer.name)
            near = self.near([concept], edit.layer.name)
            retain = concept.objective.measured("retain", "val", edited=edit.layer.name)
        trial = concept.trial(edit, relative_step, values)
        usage = math.inf if trial.is_broken else self.damage(retain, near)
        return replace(trial, constraint_usage=usage, retain=retain, near=near.get(concept.name))

    def usage(
        self,
        retain: Mapping[str, float],
        before: Optional[Mapping[str, float]] = None,
        metrics: Optional[Mapping[str, Metric]] = None,
    ) -> float:
        """The largest loss of a retain metric, of these or of all, as a share of the tolerance."""
        before = self.retain_before() if before is None else before
        return constraint_usage(metrics or self.objective.metrics_of("retain"), before, retain, self.retain_tolerance)

    def near(self, concepts: Sequence[Concept], edited: str) -> dict[str, dict[str, float]]:
        """Measure what is near concepts on the validation split, by concept, where it binds; `edited` is the edited layer."""
        binding = {c.name: c.objective for c in concepts if c.near is not None and c.near.binds}
        return {name: objective.measured("near", "val", edited=edited) for name, objective in binding.items()}

    def damage(
        self,
        retain: Mapping[str, float],
        near: Mapping[str, Mapping[str, float]],
        before: Optional[Mapping[str, float]] = None,
    ) -> float:
        """The largest share of a tolerance that is used: by the union of retain and near data, or by the latter alone.

        Args:
            retain: retain metrics on the validation split, some or all.
            near: those of near data by concept, as `near` gives them.
            before: the retain metrics without the edit; default: those of the unedited model.
        """
        known = {c.name: c.near for c in self.concepts if c.near is not None and c.name in near}
        pairs = {name: (one, one.before, near[name]) for name, one in known.items()}
        earlier = self.retain_before() if before is None else before
        return combined_usage(self.objective, self.retain_tolerance, "val", (earlier, retain), pairs)


class Method(ABC):
    """A way to find edits. The harness around it measures, decides and reports.

    A method must leave the weights as they were, also if it fails: it tries edits by `Context.edits` and `Context.evaluator`,
    and gives the one it has found as an `Outcome`. To edit many tensors at once, merge edits of single layers
    (`slug_lightning.patches.temporary.merged`).

    Example:
        >>> class Nothing(Method):
        ...     def run(self, context):
        ...         return [Outcome(concept.name) for concept in context.concepts]
        >>> Nothing().request()
        {'class_path': 'slug_lightning.methods.base.Nothing'}
    """

    def layers_of(self, module: nn.Module, towers: Optional[Mapping[str, Any]] = None) -> list[Layer]:
        """List the layers that may be edited; asked before anything is computed."""
        return find_layers(module, towers=towers)

    def binds_near(self) -> bool:
        """Whether the bound on near data decides; else they are measured and shown only."""
        return True

    @abstractmethod
    def run(self, context: Context) -> list[Outcome]:
        """Find an edit for each concept; returns one outcome each, in their order, for those of an earlier run as well."""

    def request(self) -> dict[str, Any]:
        """What is asked for, as plain data, so that a request can be recognised in a checkpoint."""
        return _plain(self)


def _plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Plain data as it is; a function by its import path, an object by that of its class and its attributes."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (float, int):  # of NumPy, too
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (Enum, Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Tensor):
        return digest_of({"": value}, "")
    if id(value) in inside:
        return "…"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, inside) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, inside) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, partial):
        return _plain([value.func, value.args, value.keywords], inside)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path} | _plain(getattr(value, "__dict__", {}), inside)


@contextmanager
def recorded(objective: Objective, kind: Kind, split: str, layers: Sequence[Layer]) -> Iterator[dict[str, float]]:
    """Measure before any edit of these layers; inside, their evaluations are spared what they don't change."""
    before = record(objective, kind, split, layers)
    try:
        yield before
    finally:
        objective.evaluator.forget()


def record(objective: Objective, kind: Kind, split: str, layers: Sequence[Layer]) -> dict[str, float]:
    """Measure before any edit of these layers, whose evaluations are spared what they don't change until it is forgotten."""
    count_as_written(layers)
    return objective.measured(kind, split, record=[layer.name for layer in layers])

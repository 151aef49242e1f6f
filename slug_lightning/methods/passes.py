"""Passes over the gradient split: gradients, and the second moments that directions need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Optional

from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.concept import Concept
from slug_lightning.objective.curvature import NEEDS, Curvature
from slug_lightning.objective.factors import Factor
from slug_lightning.objective.gradients import Gradient
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.tensors.layers import Layer, count_as_written, parameters_of
from slug_lightning.utils.names import some_of


@dataclass
class Passes:
    """Runs passes over the gradient split, and keeps what they say of the unedited model on the retain set.

    Attributes:
        objective: of the retain set.
        edits: puts edits into the model for a while.
        retain_cache: where gradients and statistics of the retain set are kept between runs, or None.
        offload_gradient: whether forget gradients are kept in the host's memory.
        notes: of the run.
        phase: a context manager by name, inside which the cost belongs to that phase.
    """

    objective: Objective
    edits: TemporaryEdits
    retain_cache: Optional[RetainCache]
    offload_gradient: bool
    notes: list[str]
    phase: Callable[[str], AbstractContextManager[None]]
    _statistics: dict[tuple[str, str, bool], Factor] = field(default_factory=dict)
    _paths: dict[str, tuple[list[EditStep], dict[str, Layer]]] = field(default_factory=dict)
    """By concept: the edits that were in the model when its gradient pass was recorded, and for which layers."""

    def forget_gradient(self, concept: Concept, layers: Sequence[Layer], at: Sequence[EditStep] = ()) -> Gradient:
        """Differentiate the mean forget loss of a concept."""
        edited = self._on_path(concept, layers, at)
        with self.edits.applied(*at):
            found = concept.objective.gradient("forget", parameters_of(layers), edited=edited)
        if self.offload_gradient:
            return found._replace(tensors={name: tensor.cpu() for name, tensor in found.tensors.items()})
        return found

    def retain_gradient(
        self, layers: Sequence[Layer], at: Sequence[EditStep] = (), watched: Sequence[Layer] = (), needs: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """Differentiate the mean retain loss; of the unedited model, the same pass collects what the `watched` layers `needs`."""
        parts = [need.partition(":")[2] for need in needs if need.startswith("retain:")]
        with self.edits.applied(*at):
            if self.edits.active:
                return self.objective.gradient("retain", parameters_of(layers)).tensors
        watch = self._watch(self.objective, watched, parts) if parts and watched else None
        if self.retain_cache is None:
            tensors = self.objective.gradient("retain", parameters_of(layers), watch).tensors
        else:
            tensors = self.retain_cache.gradient(self.objective, parameters_of(layers), self.notes, watch)
        if watch is not None:
            self._statistics |= self._collected("retain", watch, backward=True)
        return tensors

    def retain_anchor(self) -> Tensor:
        """The mean of what `ModuleHooks.anchor_step` gives over the retain set, `[D]`; collective."""
        hooks = self.objective.hooks
        if hooks.anchor_step is None or hooks.anchored_step is None:
            raise UnlearnError(
                f"source: 'anchored' needs anchor_step and anchored_step, which {type(self.objective.module).__name__} doesn't "
                "define (a ClipModule does); define them, or leave source='forget'"
            )
        return self.objective.mean_of("retain", hooks.anchor_step)

    def statistics(
        self,
        layers: Sequence[Layer],
        needs: Iterable[str],
        concept: Optional[Concept] = None,
        at: Sequence[EditStep] = (),
        backward: bool = True,
    ) -> dict[str, dict[str, Factor]]:
        """Collect second moments; the arguments are those of `slug_lightning.methods.base.Context.statistics`."""
        needs = sorted(set(needs))
        if unknown := set(needs) - NEEDS:
            raise UnlearnError(f"statistics: {some_of(sorted(unknown))} is unknown, there is only {some_of(sorted(NEEDS))}")
        if concept is None and any(need.startswith("forget:") for need in needs):
            raise UnlearnError("statistics: give the concept whose forget set is meant")
        if not backward and (blind := [need for need in needs if not need.endswith("input_covariance")]):
            raise UnlearnError(f"statistics: {some_of(blind)} cannot be had without a backward pass; use backward=True")
        found: dict[str, dict[str, Factor]] = {}
        kinds: tuple[Kind, ...] = ("forget", "retain")
        for kind in kinds:
            of_kind = [need for need in needs if need.startswith(kind)]
            is_kept = kind == "retain" and not at and not self.edits.active
            known = self._statistics if is_kept else {}
            lacking = [
                one for one in layers if any((need, name, backward) not in known for need in of_kind for name in one.parameters)
            ]
            if of_kind and lacking:
                objective = self.objective if kind == "retain" or concept is None else concept.objective
                known |= self._pass(kind, objective, lacking, of_kind, at, backward)
            for need in of_kind:
                found[need] = {name: known[need, name, backward] for one in layers for name in one.parameters}
        return found

    def let_go(self) -> None:
        """Let go of what was kept of the retain set."""
        self._statistics.clear()

    def _pass(
        self,
        kind: Kind,
        objective: Objective,
        layers: Sequence[Layer],
        needs: Iterable[str],
        at: Sequence[EditStep],
        backward: bool,
    ) -> dict[tuple[str, str, bool], Factor]:
        """One pass over the forget or the retain set, for statistics alone."""
        watch = self._watch(objective, layers, [need.partition(":")[2] for need in needs])
        with self.edits.applied(*at):
            if not backward:
                objective.forward_statistics(kind, watch)
            else:
                objective.gradient(kind, parameters_of(layers), watch)
        return self._collected(kind, watch, backward)

    def _watch(self, objective: Objective, layers: Sequence[Layer], parts: Iterable[str]) -> Curvature:
        summing = partial(self.phase, "statistics")
        return Curvature(objective.module, parameters_of(layers), parts, objective.processes, summing)

    def _collected(self, kind: Kind, watch: Curvature, backward: bool) -> dict[tuple[str, str, bool], Factor]:
        """What was collected; says in a note what was not."""
        assert watch.statistics is not None
        self.notes += [note for note in watch.statistics.notes() if note not in self.notes]
        parts = watch.statistics.factors.items()
        return {(f"{kind}:{part}", name, backward): factor for part, by_name in parts for name, factor in by_name.items()}

    @contextmanager
    def path_recorded(self, concept: Concept, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, forget gradients by one of these layers, at an edit of it, compute only what it changes; collective.

        As a path along one layer asks for them. One forward pass is recorded, with the edits that are in the model; a
        gradient among other edits is computed whole, and so is any where replay is off.
        """
        count_as_written(layers)
        around = self._paths
        with concept.objective.replaying_gradients("forget", layers):
            self._paths = around | {concept.name: (self.edits.active, {layer.name: layer for layer in layers})}
            try:
                yield
            finally:
                self._paths = around

    def _on_path(self, concept: Concept, layers: Sequence[Layer], at: Sequence[EditStep]) -> Optional[str]:
        """The layer whose gradient can be replayed: it alone is asked for, and it alone is edited beyond the recording."""
        base, known = self._paths.get(concept.name, ([], {}))
        if len(layers) != 1 or len(at) != 1 or self.edits.active != base:
            return None
        recorded_for = known.get(layers[0].name)
        # By their tensors, too: a layer of the same name may have been made of fewer or more.
        asked = [(layer.name, layer.parameters.keys()) for layer in (layers[0], at[0].layer)]
        is_it = recorded_for is not None and all(one == (recorded_for.name, recorded_for.parameters.keys()) for one in asked)
        return layers[0].name if is_it else None

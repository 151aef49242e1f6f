"""The ways along which layers are edited: their directions, at W and further on, and the statistics that these need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.norms import direction_norm, product
from slug_lightning.methods.slug.curves import Curve, CurveEnd, Point, Tangent
from slug_lightning.methods.slug.directions import DIRECTIONS, Direction, ForgetGradient
from slug_lightning.methods.slug.first_steps import Way
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.patches.temporary import EditStep
from slug_lightning.tensors.dtensor import local, shard_like, whole_like


class Ways:
    """Makes the ways of one concept, and keeps what they are made of: the forget gradient of their layers at W, and its loss."""

    def __init__(
        self, concept: Concept, context: Context, directions: Mapping[str, Direction], front: bool, notes: list[str]
    ) -> None:
        self.concept = concept
        self.context = context
        self.directions = {"gradient": ForgetGradient(), **directions}
        self.needs: frozenset[str] = frozenset().union(*(getattr(rule, "needs", ()) for rule in directions.values()))
        """What the directions ask for."""
        # Without the front, nothing else asks for a backward pass over the retain set.
        self.backward = front or any(not need.endswith("input_covariance") for need in self.needs)
        self.notes = notes
        self._gradient: dict[str, Tensor] = {}
        self._first: dict[tuple[str, str], Tangent] = {}
        """Directions at W that were looked at, but whose ways are not made yet."""
        self._informed: dict[str, LayerStatistics] = {}
        """Layers with their factors, of the model as it is."""
        self._loss: float | None = None

    def keep(self, gradient: Mapping[str, Tensor], loss: float, layers: Sequence[LayerStatistics]) -> None:
        """Keep the forget gradient of these layers, and of no other."""
        # Copies: the gradients lie in one piece, which would be kept for the sake of a few.
        self._gradient = {name: gradient[name].clone() for one in layers for name in one.layer.parameters}
        self._loss = loss
        self._informed.clear()

    def along(self, pairs: Sequence[tuple[LayerStatistics, str]], curve_name: str, curve: Curve) -> list[Way]:
        """Make the ways of layers along directions, all on one curve."""
        informed = self._known_of(pairs)
        ways, known = [], self._first
        self._first = {}  # those of other ways are not worth their memory
        for one, name in pairs:
            layer = informed.get(one.name, one)
            asked = partial(self._said, layer, name, known.get((one.name, name)))
            ways.append(Way(layer, name, curve_name, *_once_asked(curve, layer, asked)))
        return ways

    def output_changes(self, pairs: Sequence[tuple[LayerStatistics, str]]) -> list[float]:
        """How much of each layer's output on retain data a step along a direction changes, the same on all ranks.

        E‖ΔW x‖²/E‖W x‖² = ⟨D, D A⟩/⟨W, W A⟩ · 1/⟨g, D⟩² for an edit that raises the forget loss by one at first order: it
        neither depends on how a layer's outputs are scaled nor needs an evaluation. Infinite where A is not known.
        """
        informed = self._known_of(pairs)
        changes = [self._output_change(informed.get(one.name, one), name) for one, name in pairs]
        return list(self.context.objective.processes.broadcast("output changes", changes))

    def _output_change(self, layer: LayerStatistics, name: str) -> float:
        inputs = layer.factors.get("retain:input_covariance")
        if inputs is None or not all(key in inputs for key in layer.layer.parameters):
            return math.inf
        try:
            tangent = self._first[layer.name, name] = self._tangent(layer, name)
        except CurveEnd:  # which its way will say
            return math.inf
        changed = kept = 0.0
        for key, parameter in layer.layer.parameters.items():
            for tensor, is_edit in ((tangent.direction[key], True), (local(parameter).detach(), False)):
                whole = whole_like(tensor.to(parameter.device), parameter).double()
                energy = torch.sum(whole * inputs[key].times(whole)).item()
                changed, kept = (changed + energy, kept) if is_edit else (changed, kept + energy)
        gain = (tangent.slope or 0.0) * tangent.norm
        return changed / kept / gain**2 if kept > 0 and gain > 0 else math.inf

    def _known_of(self, pairs: Sequence[tuple[LayerStatistics, str]]) -> dict[str, LayerStatistics]:
        """Fetch what is missing of these layers: their forget gradient, and the factors that their directions need."""
        missing = {one.name: one.layer for one, _ in pairs if not one.layer.parameters.keys() <= self._gradient.keys()}
        if missing:
            self._gradient |= self.context.passes.forget_gradient(self.concept, list(missing.values())).tensors
        self._informed |= self._with_factors([(self._informed.get(one.name, one), name) for one, name in pairs])
        return self._informed

    def _with_factors(self, pairs: Sequence[tuple[LayerStatistics, str]]) -> dict[str, LayerStatistics]:
        """By name, the layers of whose factors a direction needs some, with these."""
        asked = [(one, frozenset(getattr(self.directions[name], "needs", ()))) for one, name in pairs]
        needs = frozenset().union(*(own for _, own in asked))
        layers = {one.name: one for one, own in asked if own - one.factors.keys()}
        if not layers:
            return {}
        found = self.context.statistics([one.layer for one in layers.values()], needs, self.concept, backward=self.backward)
        factors = {
            name: {need: {key: found[need][key] for key in one.layer.parameters} for need in needs}
            for name, one in layers.items()
        }
        return {name: replace(one, factors=factors[name]) for name, one in layers.items()}

    def _tangent(self, layer: LayerStatistics, name: str, at: EditStep | None = None) -> Tangent:
        """The direction of a layer at W, or at an edit of it."""
        if at is None:
            gradient, loss = {key: self._gradient[key] for key in layer.layer.parameters}, self._loss
        else:
            found = self.context.passes.forget_gradient(self.concept, [layer.layer], at=[at])
            gradient, loss = found.tensors, found.loss
        processes = self.context.objective.processes
        is_gradient = isinstance(self.directions[name], ForgetGradient)
        direction = gradient if is_gradient else self._direction(name, layer, gradient)
        # Further on, a built-in one may come to nothing; what is wrong with somebody's own at W must be said.
        error = CurveEnd if at is not None or name in DIRECTIONS else UnlearnError
        length = direction_norm(layer.layer, direction, processes, error)
        slope, is_reversed = length, False
        if not is_gradient:
            slope = product(layer.layer, direction, gradient, processes) / length
            if slope < 0 and not self.is_fixed(name):
                direction, slope, is_reversed = {key: -d for key, d in direction.items()}, -slope, True
        return Tangent(direction, length, loss, slope, is_reversed)

    def _said(self, layer: LayerStatistics, name: str, known: Tangent | None, at: EditStep | None = None) -> Tangent:
        """The direction of a way that is searched, at W perhaps `known`; says once in the notes if it was reversed."""
        tangent = known if known is not None and at is None else self._tangent(layer, name, at)
        note = f"direction: {name} of {layer.name} led downhill on the forget loss, and was reversed"
        if tangent.reversed and note not in self.notes:
            self.notes.append(note)
        return tangent

    def _direction(self, name: str, layer: LayerStatistics, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let a rule make a direction of whole tensors, the same on every rank, which then keeps its part."""
        rule, parameters, processes = self.directions[name], layer.layer.parameters, self.context.objective.processes
        whole = {key: whole_like(g.to(parameters[key].device), parameters[key]) for key, g in gradient.items()}
        made = dict(rule(layer, whole))
        if layer.factors and any(p.ndim > 1 for p in parameters.values()):
            # Of a vector only a diagonal is known, in other units than a matrix's: in a group with one it stays as it is.
            made |= {key: torch.zeros_like(d) for key, d in made.items() if d.ndim < 2}
        if {n: d.shape for n, d in made.items()} != {n: g.shape for n, g in whole.items()}:
            raise UnlearnError(
                f"direction: for {layer.name} it must return a tensor of the gradient's shape for each tensor, got "
                f"{ {n: tuple(d.shape) for n, d in made.items()} }"
            )
        # Rank 0's: other ranks may round otherwise, and their weights would drift apart.
        processes.broadcast_tensors(made.values())
        return {key: local(shard_like(d, parameters[key])).to(gradient[key]) for key, d in made.items()}

    def is_fixed(self, name: str) -> bool:
        """Whether a direction is meant as it is, and the same wherever the layer stands."""
        return getattr(self.directions[name], "is_fixed", False)

    def let_go(self, ways: Sequence[Way]) -> None:
        """Keep only what these ways need."""
        held = {name for way in ways for name in way.layer.layer.parameters}
        self._gradient = {name: gradient for name, gradient in self._gradient.items() if name in held}
        self._first.clear()
        self._informed.clear()


def _once_asked(curve: Curve, layer: LayerStatistics, tangent: Callable[..., Tangent]) -> tuple[Point, Callable[[], float]]:
    """Make a curve, and its first tangent, when they are asked for: a direction takes as much memory as its layer."""
    first, made = cache(tangent), cache(lambda: curve(layer, lambda at=None: first() if at is None else tangent(at)))

    def point(distance: float, straight_after: float = math.inf) -> EditStep:
        return made()(distance, straight_after=straight_after)

    return point, lambda: layer.weight_norm * (first().slope or 0.0)

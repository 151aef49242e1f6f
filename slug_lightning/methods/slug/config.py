"""SLUG as a method: which rules it is made of, and the order in which they act."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from torch import nn

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context, Method, Outcome
from slug_lightning.methods.slug.candidates import measured, pareto
from slug_lightning.methods.slug.choice import Choice, LeastDamage, LeastUsage
from slug_lightning.methods.slug.concept_search import ConceptSearch, Rules, is_contest
from slug_lightning.methods.slug.curves import Curve, line, path
from slug_lightning.methods.slug.directions import DIRECTIONS
from slug_lightning.methods.slug.several import JointSearch
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.objective.curvature import NEEDS
from slug_lightning.reports.cost import UNAVOIDABLE
from slug_lightning.tensors.layers import Granularity, Layer, find_layers
from slug_lightning.utils.names import some_of

Name = Literal["gradient", "covariance", "kfac", "batch", "engram", "retain_null_space"]
"""Of the built-in directions: spelled out, as a config's reader tells them from import paths by it."""


@dataclass(frozen=True)
class SLUG(Method):
    """Single Layer Unlearning Gradient (after arXiv 2407.11867): one searched step along one layer.

    The gradient of the forget loss and that of the retain loss, both at the weights as they are, score every layer. Along
    each candidate the smallest step that reaches the forget target is searched on the validation split; of those within
    `retain_tolerance` and `near_tolerance` the one that costs what is retained least is taken, and half of its step is added
    as far as all bounds hold. Several concepts are searched one by one, then together.

    By default a step goes along the gradient through the inverse covariance of the layer's inputs on the retain set, straight
    and where that costs something also along a path, on the outer blocks and projections of each tower: of what was tried on a
    few development requests this spares most (docs/directions.md). `SLUG.paper()` is the published procedure.

    Each rule may be an object of your own; docs/extending.md shows one of each.

    Args:
        layers: shell-style pattern, or list of patterns, of the tensors that may be edited: matrices and kernels that are
            not frozen, and whatever else is named (see `slug_lightning.tensors.layers.find_layers`).
        granularity: what one edit covers: "tensor", "module" (the tensors of one submodule) or "siblings" (those of
            submodules with the same parent, such as q, k and v).
        direction: where to go along a layer: the name of one of `slug_lightning.methods.slug.directions.DIRECTIONS`
            ("gradient", "covariance", "kfac", "batch", "engram", "retain_null_space"), a
            `slug_lightning.methods.slug.directions.Direction`, or a list of these, which then compete.
        source: whose gradient directions are made of: "forget", the forget loss, or "anchored", that loss less the one of the
            retain set's mean feature, so that what all inputs share counts for nothing; for modules with an `anchored_step`.
        curve: how the way goes on: "line", "path" (a new forget gradient whenever the way has doubled), "both" (lines, then,
            unless one costs nothing, the paths of up to three layers whose line did best), or a
            `slug_lightning.methods.slug.curves.Curve`.
        score: which layers are searched: "pareto", the front of importance and alignment; "measured", the outer blocks,
            projections and heads of each tower, and if none of these is feasible, the front along the raw gradient, then all
            others; or a
            `slug_lightning.methods.slug.candidates.LayerScore`. Of more than six ways those come first that change least of what
            their layers give out on the retain set, and the others only if none of them is feasible.
        choice: "least_usage"; "least_damage", which takes differences within noise for ties; or a
            `slug_lightning.methods.slug.choice.Choice`.
        search: how a step is found: "interpolation", or a `slug_lightning.methods.slug.step_search.StepSearch`.
        max_evaluations: most evaluations along each way, at least 1; with several concepts, also how often steps are changed
            for the sake of the others before any is left out.
        max_step: longest way that is tried along a layer, relative to its weights, above 0; None for no limit along lines of
            the gradient alone, and else for the module's own `max_step`, or 2.
        max_layers: most layers that one edit may change, at least 1: where no single one meets the bounds, the trial within
            the retain bounds that goes furthest stays, and the search goes on from there.
        front: whether the retain gradient is computed, for the front and the report. Without it, and with directions that
            need none, retain data are only passed forward.
        step_margin: by what share of the smallest step that forgets the step goes beyond it, at least 0, as far as all bounds
            hold, so that more is forgotten of data that the search hasn't seen. None: 0.5, or 0 along the raw gradient alone.
        near_binds: whether the bound on what is near decides; else it is measured and shown only. None: it does, but along
            the raw gradient alone.
        check_rounding: whether a run in mixed precision also scores half a batch in 32 bits, and notes which layers might
            be on the front or off it only by rounding.

    Raises:
        UnlearnError: if an option is out of range.

    Example:
        >>> SLUG(layers="encoder.*", step_margin=0.1).direction
        'covariance'
    """

    layers: Union[str, list[str]] = "*"
    granularity: Granularity = "tensor"
    direction: Union[Name, list[Union[Name, Callable[..., Any]]], Callable[..., Any]] = "covariance"
    source: Literal["forget", "anchored"] = "forget"
    curve: Union[Literal["line", "path", "both"], Callable[..., Any]] = "both"
    score: Union[Literal["pareto", "measured"], Callable[..., Any]] = "measured"
    choice: Union[Literal["least_usage", "least_damage"], Callable[..., Any]] = "least_damage"
    search: Union[Literal["interpolation"], Callable[..., Any]] = "interpolation"
    max_evaluations: int = 10
    max_step: Optional[float] = None
    max_layers: int = 1
    front: bool = True
    step_margin: Optional[float] = None
    near_binds: Optional[bool] = None
    check_rounding: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "module", "siblings"):
            raise UnlearnError(f"granularity must be 'tensor', 'module' or 'siblings', got {self.granularity!r}")
        if self.source not in ("forget", "anchored"):
            raise UnlearnError(f"source must be 'forget' or 'anchored', got {self.source!r}")
        for name in ("max_evaluations", "max_layers"):
            if not isinstance(number := getattr(self, name), int) or number < 1:
                raise UnlearnError(f"{name} must be a whole number >= 1, got {number!r}")
        if self.max_step is not None and not (isinstance(self.max_step, (int, float)) and self.max_step > 0):
            raise UnlearnError(f"max_step must be a number > 0, got {self.max_step!r}")
        if self.step_margin is not None and (self.step_margin < 0 or not math.isfinite(self.step_margin)):
            raise UnlearnError(f"step_margin must be >= 0 and finite, got {self.step_margin}")
        for name, builtin in RULES.items():
            if not _is_rule(rule := getattr(self, name), builtin):
                raise UnlearnError(f"{name} must be {' or '.join(map(repr, builtin))}, or an object, got {rule!r}")
        if not isinstance(self.choice, (str, Choice)):
            raise UnlearnError(f"choice must be an instance of {Choice.__module__}.Choice, got {self.choice!r}")
        if not self.front and self.check_rounding:
            raise UnlearnError("check_rounding says which layers are on the front; leave front=True, or check_rounding out")
        if not isinstance(self.curve, str) and _name(self.curve) in CURVES:
            raise UnlearnError(f"curve: {_name(self.curve)!r} is the name of a built-in curve; give yours another")
        if not self.front and self.score == "pareto":
            raise UnlearnError("front: score='pareto' needs the front; use score='measured', or leave front=True")
        for rule in self._directions().values():
            if unknown := set(getattr(rule, "needs", ())) - NEEDS:
                raise UnlearnError(f"direction needs {some_of(sorted(unknown))}, but there is only {some_of(sorted(NEEDS))}")

    @classmethod
    def paper(cls, **options: Any) -> SLUG:
        """The published procedure: raw gradient, straight line, Pareto front, one layer (arXiv 2407.11867).

        Args:
            options: any of `SLUG`'s, to change one thing.

        Example:
            >>> SLUG.paper(max_evaluations=6).direction
            'gradient'
        """
        rules = {"direction": "gradient", "curve": "line", "score": "pareto", "choice": "least_usage", "step_margin": 0.0}
        return cls(
            **{**rules, "source": "forget", "max_step": None, "max_layers": 1, "front": True, "near_binds": False, **options}
        )

    def _directions(self) -> dict[str, Any]:
        """The directions by name."""
        given = self.direction if isinstance(self.direction, list) else [self.direction]
        if not given:
            raise UnlearnError("direction: give at least one")
        if unknown := [rule for rule in given if not _is_rule(rule, DIRECTIONS)]:
            raise UnlearnError(f"direction must be {' or '.join(map(repr, DIRECTIONS))}, or an object, got {unknown[0]!r}")
        named = {_name(rule): rule for rule in given}
        if taken := [name for name, rule in named.items() if not isinstance(rule, str) and name in DIRECTIONS]:
            raise UnlearnError(f"direction: {taken[0]!r} is the name of a built-in direction; give yours another")
        if len(named) < len(given):
            raise UnlearnError(f"direction: the directions must have different names, got {[_name(rule) for rule in given]}")
        return {name: DIRECTIONS[rule] if isinstance(rule, str) else rule for name, rule in named.items()}

    def _curves(self) -> dict[str, Any]:
        """The curves by name, in the order in which they are tried."""
        if not isinstance(self.curve, str):
            return {_name(self.curve): self.curve}
        return {name: CURVES[name] for name in (CURVES if self.curve == "both" else [self.curve])}

    @property
    def _spares(self) -> bool:
        """Whether a direction takes part that changes less of what is retained than the raw gradient."""
        return list(self._directions()) != ["gradient"]

    def binds_near(self) -> bool:
        """Whether the bound on near data decides."""
        return self._spares if self.near_binds is None else self.near_binds

    def _margin(self) -> float:
        """The margin beyond the smallest step, relative to it."""
        return self.step_margin if self.step_margin is not None else MARGIN if self._spares else 0.0

    def _longest(self, context: Context) -> float:
        """The longest way that is tried."""
        if self.max_step is not None:
            return self.max_step
        competes = is_contest(self._directions(), self._curves())
        return (context.objective.hooks.max_step or MAX_STEP) if competes else math.inf

    def request(self) -> dict[str, Any]:
        """What is asked for, as plain data; `check_rounding` adds notes only.

        Options that an earlier version didn't have are left out where they change nothing, so that its requests are recognised.
        """
        later = {"max_step": None, "max_layers": 1, "front": True, "source": "forget"}
        asked = {name: value for name, value in super().request().items() if name != "check_rounding"}
        asked |= {"step_margin": self._margin(), "near_binds": self.binds_near()}  # what None stands for
        return {name: value for name, value in asked.items() if name not in later or value != later[name]}

    def layers_of(self, module: nn.Module, towers: Optional[Mapping[str, Any]] = None) -> list[Layer]:
        """List the layers that may be edited."""
        return find_layers(module, self.layers, self.granularity, towers)

    def run(self, context: Context) -> list[Outcome]:
        """Search each concept by itself, then all together."""
        named = {name: RULES[name][rule] if isinstance(rule := getattr(self, name), str) else rule for name in RULES}
        rules = Rules(
            **{name: rule for name, rule in named.items() if name != "curve"},
            directions=self._directions(),
            curves=self._curves(),
            max_evaluations=self.max_evaluations,
            max_step=self._longest(context),
            max_layers=self.max_layers,
            step_margin=self._margin(),
            front=self.front,
            check_rounding=self.check_rounding,
        )
        searches = [ConceptSearch(concept, context, rules) for concept in context.concepts]
        new = [search for search in searches if not search.is_taken_over]
        if self.source == "anchored" and new:
            with context.phase("anchor"):
                anchor = context.passes.retain_anchor()
            for search in new:
                search.objective.anchor = anchor
        for search in new:
            # Without the retain gradient it is less than the pass that other costs are compared with.
            with context.phase(UNAVOIDABLE if self.front else "forget gradient"):
                search.score(is_last=search is new[-1])
            with ExitStack() as stack:
                replaying = search.objective.replaying(search.layers)
                (stack if len(searches) > 1 else context.until_report).enter_context(replaying)
                with context.phase("search"):
                    search.search()
        context.passes.let_go()
        if len(searches) > 1:
            with context.phase("together"):
                self._settle(context, searches)
        elif (chosen := searches[0].chosen) is not None and chosen.retain is not None:  # else the harness measures
            found = {"forget": searches[0].concept.values_of(chosen), "near": chosen.near, "retain": chosen.retain}
            searches[0].outcome.search_after = {kind: dict(values) for kind, values in found.items() if values is not None}
            if chosen.layer not in {layer.name for layer in searches[0].layers}:
                context.until_report.close()  # what was recorded serves single layers only
        return [search.finished() for search in searches]

    def _settle(self, context: Context, searches: list[ConceptSearch]) -> None:
        """Search the sum of all edits again where it fails; leave out what does not go together."""
        able = [search for search in searches if search.chosen]
        if context.all_or_nothing and len(able) < len(searches):
            return
        joint = JointSearch(able, context, max_rounds=self.max_evaluations, step_margin=self._margin())
        settled = joint.settle()
        context.rounds += [found.to_dict() for found in joint.rounds]
        if joint.final is not None:
            for search in settled:
                after = {"forget": joint.final.measured[search.name], "retain": joint.final.retain}
                near = joint.final.near.get(search.name)
                search.outcome.search_after = after if near is None else {**after, "near": near}


CURVES: dict[str, Curve] = {"line": line, "path": path}
RULES: dict[str, dict[str, Any]] = {
    "curve": {**CURVES, "both": None},
    "score": {"pareto": pareto, "measured": measured},
    "choice": {"least_usage": LeastUsage(), "least_damage": LeastDamage()},
    "search": {"interpolation": interpolation},
}
"""What the options' names stand for."""
MARGIN = 0.5
"""How far beyond the smallest step least-change directions go, relative to it."""
MAX_STEP = 2.0
"""Where a way ends that is no line of the gradient, unless the module or the request says otherwise."""


def _is_rule(rule: Any, builtin: Mapping[str, Any]) -> bool:
    """Whether this is the name of a built-in rule, or an object that may be one; not its class."""
    return rule in builtin if isinstance(rule, str) else callable(rule) and not isinstance(rule, type)


def _name(rule: Any) -> str:
    """How trials name a direction or a curve that is an object."""
    return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)

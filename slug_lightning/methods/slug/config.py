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
from slug_lightning.methods.slug.candidates import pareto
from slug_lightning.methods.slug.choice import Choice, LeastUsage
from slug_lightning.methods.slug.concept_search import ConceptSearch, Rules
from slug_lightning.methods.slug.curves import line
from slug_lightning.methods.slug.directions import FACTORS, ForgetGradient
from slug_lightning.methods.slug.several import JointSearch
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.tensors.layers import Granularity, Layer, find_layers
from slug_lightning.utils.names import some_of


@dataclass(frozen=True)
class SLUG(Method):
    """Single Layer Unlearning Gradient (arXiv 2407.11867): one searched step along one layer.

    The gradient of the forget loss and that of the retain loss, both at the weights as they are, score every layer. Along
    each candidate the smallest step that reaches the forget target is searched on the validation split; of those within
    `retain_tolerance` the one that costs the retain metrics least is taken. Several concepts are searched one by one, then
    together.

    Each rule may be an object of your own; docs/extending.md shows one of each.

    Args:
        layers: shell-style pattern, or list of patterns, of the tensors that may be edited: matrices and kernels that are
            not frozen, and whatever else is named (see `slug_lightning.tensors.layers.find_layers`).
        granularity: what one edit covers: "tensor", "module" (the tensors of one submodule) or "siblings" (those of
            submodules with the same parent, such as q, k and v).
        direction: "gradient", or a `slug_lightning.methods.slug.directions.Direction`.
        curve: "line", or a `slug_lightning.methods.slug.curves.Curve`.
        score: which layers are searched: "pareto", the front of importance and alignment, or a
            `slug_lightning.methods.slug.candidates.LayerScore`.
        choice: "least_usage", or a `slug_lightning.methods.slug.choice.Choice`.
        search: how a step is found: "interpolation", or a `slug_lightning.methods.slug.step_search.StepSearch`.
        max_evaluations: most evaluations for each layer, at least 1; with several concepts, also how often steps are changed
            for the sake of the others before any is left out.
        step_margin: by what share of the smallest step that forgets the step goes beyond it, at least 0, so that more is
            forgotten of data that the search hasn't seen.
        check_rounding: whether a run in mixed precision also scores half a batch in 32 bits, and notes which layers might
            be on the front or off it only by rounding.

    Raises:
        UnlearnError: if an option is out of range.

    Example:
        >>> SLUG(layers="encoder.*", step_margin=0.1).curve
        'line'
    """

    layers: Union[str, list[str]] = "*"
    granularity: Granularity = "tensor"
    direction: Union[Literal["gradient"], Callable[..., Any]] = "gradient"
    curve: Union[Literal["line"], Callable[..., Any]] = "line"
    score: Union[Literal["pareto"], Callable[..., Any]] = "pareto"
    choice: Union[Literal["least_usage"], Callable[..., Any]] = "least_usage"
    search: Union[Literal["interpolation"], Callable[..., Any]] = "interpolation"
    max_evaluations: int = 10
    step_margin: float = 0.0
    check_rounding: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "module", "siblings"):
            raise UnlearnError(f"granularity must be 'tensor', 'module' or 'siblings', got {self.granularity!r}")
        if self.max_evaluations < 1:
            raise UnlearnError(f"max_evaluations must be >= 1, got {self.max_evaluations}")
        if self.step_margin < 0 or not math.isfinite(self.step_margin):
            raise UnlearnError(f"step_margin must be >= 0 and finite, got {self.step_margin}")
        for name, builtin in RULES.items():
            if isinstance(rule := getattr(self, name), str) and rule not in builtin:
                raise UnlearnError(f"{name} must be {' or '.join(map(repr, builtin))}, or an object, got {rule!r}")
        if not isinstance(self.choice, (str, Choice)):
            raise UnlearnError(f"choice must be an instance of {Choice.__module__}.Choice, got {self.choice!r}")
        if unknown := set(getattr(self.direction, "needs", ())) - FACTORS.keys():
            raise UnlearnError(f"direction needs {some_of(sorted(unknown))}, but there is only {some_of(FACTORS)}")

    def request(self) -> dict[str, Any]:
        """What is asked for, as plain data; `check_rounding` adds notes only."""
        return {name: value for name, value in super().request().items() if name != "check_rounding"}

    def layers_of(self, module: nn.Module, towers: Optional[Mapping[str, Any]] = None) -> list[Layer]:
        """List the layers that may be edited."""
        return find_layers(module, self.layers, self.granularity, towers)

    def run(self, context: Context) -> list[Outcome]:
        """Search each concept by itself, then all together."""
        named = {name: RULES[name][rule] if isinstance(rule := getattr(self, name), str) else rule for name in RULES}
        rules = Rules(
            **named, max_evaluations=self.max_evaluations, step_margin=self.step_margin, check_rounding=self.check_rounding
        )
        searches = [ConceptSearch(concept, context, rules) for concept in context.concepts]
        new = [search for search in searches if not search.is_taken_over]
        for search in new:
            with context.phase("gradients"):
                search.score(is_last=search is new[-1])
            with ExitStack() as stack:
                replaying = search.objective.replaying([one.layer for one in search.statistics])
                (stack if len(searches) > 1 else context.until_report).enter_context(replaying)
                with context.phase("search"):
                    search.search()
        if len(searches) > 1:
            with context.phase("together"):
                self._settle(context, searches)
        elif (chosen := searches[0].chosen) is not None and chosen.retain is not None:  # else the harness measures
            after = {searches[0].concept.metric.name: chosen.forget}
            searches[0].outcome.search_after = {"forget": after, "retain": chosen.retain}
        return [search.finished() for search in searches]

    def _settle(self, context: Context, searches: list[ConceptSearch]) -> None:
        """Search the sum of all edits again where it fails; leave out what does not go together."""
        able = [search for search in searches if search.chosen]
        if context.all_or_nothing and len(able) < len(searches):
            return
        joint = JointSearch(able, context, max_rounds=self.max_evaluations, step_margin=self.step_margin)
        settled = joint.settle()
        context.rounds += [vars(found) for found in joint.rounds]
        if joint.final is not None:
            for search in settled:
                after = {search.concept.metric.name: joint.final.forget[search.name]}
                search.outcome.search_after = {"forget": after, "retain": joint.final.retain}


RULES: dict[str, dict[str, Any]] = {
    "direction": {"gradient": ForgetGradient()},
    "curve": {"line": line},
    "score": {"pareto": pareto},
    "choice": {"least_usage": LeastUsage()},
    "search": {"interpolation": interpolation},
}
"""What the options' names stand for."""

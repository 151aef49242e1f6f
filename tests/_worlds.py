"""A module in which every layer is a number, and a table says what the edits of several concepts do to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import lightning.pytorch as pl
import torch
from _search import context_of
from torch import nn

from _tiny import PlainRunner, outside
from slug_lightning.methods.base import Context
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.candidates import pareto
from slug_lightning.methods.slug.choice import LeastUsage
from slug_lightning.methods.slug.concept_search import ConceptSearch, Rules
from slug_lightning.methods.slug.curves import line
from slug_lightning.methods.slug.directions import ForgetGradient
from slug_lightning.methods.slug.several import JointSearch
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import find_layers

KEEPING = -1
TOLERANCE = 0.25
BEFORE, TARGET = 0.9, 0.5
Steps = Mapping[str, float]
"""How far each layer has gone."""


class Table(pl.LightningModule):
    """Every layer is a number, 1 before any edit; a relative step adds itself to it.

    Args:
        layers: of each concept: those that its forget loss depends on.
        share: of the way to the target that a concept has gone, given all steps: 1 is forgotten.
        usage: as a share of the tolerance, given all steps.
    """

    forget_metric = "forget_acc"
    retain_metric = "kept_loss"

    def __init__(
        self, layers: Mapping[str, Iterable[str]], share: Callable[[str, Steps], float], usage: Callable[[Steps], float]
    ) -> None:
        super().__init__()
        self.of = {concept: list(names) for concept, names in layers.items()}
        names = dict.fromkeys(name for members in self.of.values() for name in members)
        self.layers = nn.ParameterDict({name: nn.Parameter(torch.ones(1, 1, dtype=torch.float64)) for name in names})
        self.share, self.constraint_usage = share, usage
        self.told = outside(evaluations=0)

    @property
    def evaluations(self) -> int:
        return self.told().evaluations

    def steps(self) -> dict[str, float]:
        return {name: p.item() - 1 for name, p in self.layers.items()}

    def concept(self, batch) -> str:
        return list(self.of)[int(batch[0, 0])]

    def validation_step(self, batch, batch_idx):
        self.told().evaluations += 1
        if batch[0, 0] == KEEPING:
            self.log("kept_loss", torch.tensor(1 + TOLERANCE * self.constraint_usage(self.steps()), dtype=torch.float64))
        else:
            value = BEFORE + (TARGET - BEFORE) * self.share(self.concept(batch), self.steps())
            self.log("forget_acc", torch.tensor(value, dtype=torch.float64))

    def forget_step(self, batch, batch_idx):
        return sum(self.layers[name].sum() for name in self.of[self.concept(batch)])

    def retain_step(self, batch, batch_idx):
        return 0 * sum(p.sum() for p in self.layers.values())


def batches(number: int) -> dict[str, list[torch.Tensor]]:
    return {split: [torch.full((2, 1), number)] for split in ("train", "val", "test")}


def objective_of(world: Table) -> Objective:
    return Objective(world, {"retain": batches(KEEPING)}, PlainRunner())


def searched(world: Table, objective: Objective, context: Context | None = None) -> dict[str, ConceptSearch]:
    """A search for each concept of the world, after it alone; they share a context, which is theirs afterwards."""
    context = context or context_of(objective, TOLERANCE, layers=find_layers(world))
    for number, name in enumerate(world.of):
        context.concepts.append(Concept.measured(name, objective.about(batches(number)), TARGET))
    rules = Rules(
        {"gradient": ForgetGradient()},
        {"line": line},
        pareto,
        LeastUsage(),
        interpolation,
        max_evaluations=10,
        max_step=math.inf,
        max_layers=1,
        step_margin=0.0,
        front=True,
        check_rounding=False,
    )
    searches = {concept.name: ConceptSearch(concept, context, rules) for concept in context.concepts}
    for search in searches.values():
        search.score(is_last=False)
        search.search()
    return searches


def joint_of(searches: Iterable[ConceptSearch], max_rounds: int = 10) -> JointSearch:
    searches = list(searches)
    able = [search for search in searches if search.chosen]
    return JointSearch(able, searches[0].context, max_rounds=max_rounds, step_margin=0.0)


def steps_of(requests: Iterable[ConceptSearch], world: Table) -> dict[str, float]:
    """How far each layer goes with these edits, by the edits alone."""
    steps = dict.fromkeys(world.layers, 0.0)
    for request in requests:
        assert request.chosen is not None
        steps[request.chosen.layer.removeprefix("layers.")] += request.chosen.step
    return steps

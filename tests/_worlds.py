"""A module in which every layer is a number, and a table says what the edits of several concepts do to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import lightning.pytorch as pl
import torch
from torch import nn

from _tiny import PlainRunner
from slug_lightning.methods.slug.concept import ALTERNATIVES, Request, Wanted
from slug_lightning.methods.slug.several import JointSearch
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.temporary import TemporaryEdits
from slug_lightning.tensors.layers import find_layers
from slug_lightning.utils.progress import Progress

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
        self.evaluations = 0

    def steps(self) -> dict[str, float]:
        return {name: p.item() - 1 for name, p in self.layers.items()}

    def concept(self, batch) -> str:
        return list(self.of)[int(batch[0, 0])]

    def validation_step(self, batch, batch_idx):
        self.evaluations += 1
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


def searched(world: Table, objective: Objective, bench: TemporaryEdits, **wanted) -> dict[str, Request]:
    """A request for each concept of the world, after its search alone."""
    asked = Wanted(**{"forget_target": TARGET, "retain_tolerance": TOLERANCE, "alternatives": ALTERNATIVES, **wanted})
    layers = find_layers(world)
    retain = objective.gradient("retain", dict(world.named_parameters())).tensors
    requests = {}
    for number, concept in enumerate(world.of):
        request = Request(concept, objective.about(batches(number)), layers, asked, Progress(None))
        request.validate()
        request.measure(lambda: retain)
        request.search(bench)
        requests[concept] = request
    return requests


def joint_of(requests: Iterable[Request], objective: Objective, bench: TemporaryEdits, max_rounds: int = 10) -> JointSearch:
    able = [request for request in requests if request.chosen]
    kept = {"kept_loss": 1.0}
    return JointSearch(
        able, objective, bench, kept=kept, tolerance=TOLERANCE, max_rounds=max_rounds, margin=0.0, progress=Progress(None)
    )


def steps_of(requests: Iterable[Request], world: Table) -> dict[str, float]:
    """How far each layer goes with these edits, by the edits alone."""
    steps = dict.fromkeys(world.layers, 0.0)
    for request in requests:
        assert request.chosen is not None
        steps[request.chosen.layer.removeprefix("layers.")] += request.chosen.step
    return steps

"""A competition among layers whose effects are written in a table."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from _search import context_of
from torch import nn

from _tiny import PlainRunner, outside
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.choice import LeastUsage
from slug_lightning.methods.slug.curves import Tangent, line
from slug_lightning.methods.slug.first_steps import Way
from slug_lightning.methods.slug.layer_search import LayerSearch
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.layers import Layer

FORGETTING, KEEPING = 0, 1
TOLERANCE = 0.25


class World(pl.LightningModule):
    """Every layer is a number, 1 before any edit; what its edit does is written in a table.

    Args:
        ways: by layer, how much of the way to the target a relative step goes.
        kept: by layer, what each retain batch logs when that layer is edited; under None, before.
        by_loss: whether the forget metric is the loss, which begins at 1 and has a target of 3, or an accuracy, 0.9 and 0.5.
    """

    def __init__(self, ways, kept, by_loss=False) -> None:
        super().__init__()
        self.layers = nn.ParameterDict({name: nn.Parameter(torch.ones(1, dtype=torch.float64)) for name in ways})
        self.ways, self.kept = ways, kept
        self.forget_metric = None if by_loss else "forget_acc"
        self.retain_metric = list(kept[None][0])
        self.told = outside(seen=[])

    @property
    def seen(self):
        """Kind, layer and number of each batch."""
        return self.told().seen

    def edit(self):
        """The edited layer and the size of the step, or None and 0."""
        found = [(name, p.item() - 1) for name, p in self.layers.items() if p.item() != 1]
        assert len(found) <= 1
        return found[0] if found else (None, 0.0)

    def gone(self):
        name, step = self.edit()
        return self.ways[name](step) if name else 0.0

    def validation_step(self, batch, batch_idx):
        kind, name = int(batch[0, 0]), self.edit()[0]
        self.seen.append((kind, name, batch_idx))
        self.log_dict({"forget_acc": 0.9 - 0.4 * self.gone()} if kind == FORGETTING else self.kept[name][batch_idx])

    def forget_step(self, batch, batch_idx):
        self.seen.append((FORGETTING, self.edit()[0], batch_idx))
        return torch.tensor(1 + 2 * self.gone(), dtype=torch.float64)


def forgets_at(threshold, power=1.0):
    return lambda step: (step / threshold) ** power


def never(step):
    return 0.0


def batches_of(kind, counts):
    return [torch.full((count, 1), kind) for count in counts]


def score_of(name, *, forget_norm=1.0, weight_norm=1.0, retain_norm=1.0, alignment=0.5) -> LayerStatistics:
    layer = Layer(name, {name: nn.Parameter(torch.ones(1))})
    return LayerStatistics(layer, weight_norm, forget_norm, retain_norm, alignment * forget_norm * retain_norm)


def competition(world, counts=(1,), scores=None, max_evaluations=10, **options) -> tuple[LayerSearch, list[Way]]:
    scores = scores or [score_of(name) for name in world.ways]
    for score in scores:
        score.layer.parameters[score.name] = world.layers[score.name]
    batches = {"forget": {"val": batches_of(FORGETTING, [2, 1])}, "retain": {"val": batches_of(KEEPING, counts)}}
    objective = Objective(world, batches, PlainRunner())
    concept = Concept.measured("it", objective, 3.0 if world.forget_metric is None else 0.5)
    world.seen.clear()
    gradients = {s.name: {s.name: torch.tensor([s.forget_norm], dtype=torch.float64)} for s in scores}
    made = LayerSearch(
        concept,
        context_of(objective, TOLERANCE),
        search=interpolation,
        choice=LeastUsage(),
        max_evaluations=max_evaluations,
        **options,
    )
    points = {s.name: line(s, lambda at=None, s=s: Tangent(gradients[s.name], s.forget_norm)) for s in scores}
    return made, [Way(s, "gradient", "line", points[s.name]) for s in scores]


def passes_of(world):
    """Kind and layer of each pass, in order."""
    return [(kind, name) for kind, name, number in world.seen if number == 0]


def rows(*accuracies):
    return [{"acc": value} for value in accuracies]

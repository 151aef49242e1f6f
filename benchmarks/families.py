"""The requests that `directions.py` compares directions on: a model, its data, what is near the concept, and the bounds.

The settings are those of the shipped configs, but the report of what is generated takes fewer pictures, steps and questions.
Concepts are those that settings were chosen on before, so that none is one that the other benchmarks report.

What is near is measured on renderings, or from seeds, of their own: of a thing, the five things whose drawings are nearest to its
own for the embedded CLIP; of a style, the other styles; of a digit, the five that it is most confused with; of a random part of
the training set, the rest of it. Passages have nothing near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from vlm import neighbours, questions_about

from slug_lightning.datamodules import (
    CanvasDataModule,
    EmojiDataModule,
    EmojiQuestionDataModule,
    PythonDocsDataModule,
    UnlearnDataModule,
)
from slug_lightning.datamodules.demo.canvas import canvas_drawings
from slug_lightning.datamodules.demo.emoji import caption_of, emoji_pairs
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.lm.completion import teacher_forced
from slug_lightning.lm.metrics import memorization_accuracy
from slug_lightning.lm.sequences import pad
from slug_lightning.modules import ClassifierModule, EmbeddedCanvas, EmbeddedClip, EmbeddedLM, EmbeddedVLM

NEAR = 90_000
"""Seed of what is near, which no datamodule uses."""
TRAINED_ON = 500
"""Digits: so few that the model names them rightly more often than others, by seven points."""


@dataclass
class Request:
    """One request to forget.

    Attributes:
        module: the original model.
        data: forget and retain set.
        bounds: further arguments of `UnlearnCallback`.
        near: batches of what is near the concept, for the module's `scores`.
        near_metric: the accuracy that is measured on them.
        layers: patterns of the tensors that may be edited.
        evaluations: most of them in a step search.
        front_only: whether only the Pareto front of importance and alignment is searched.
        replay: whether evaluations compute only what an edit changes, which does not pay where that is nearly all.
    """

    module: pl.LightningModule
    data: pl.LightningDataModule
    bounds: dict[str, Any] = field(default_factory=dict)
    near: list[Any] = field(default_factory=list)
    near_metric: str = "accuracy"
    layers: str | list[str] = "*"
    evaluations: int = 10
    front_only: bool = True
    replay: bool = True


def near_rows(drawings: Drawings, kind: str, concept: str) -> Tensor:
    """Return the drawings of what is near a thing or a style; of a style, every so many, about 100."""
    if kind == "thing":
        close = [drawings.thing_names.index(name) for name in neighbours(drawings, concept)]
        return torch.isin(drawings.things, torch.tensor(close)).nonzero()[:, 0]
    rows = (drawings.styles != drawings.style_names.index(concept)).nonzero()[:, 0]
    return rows[:: max(len(rows) // 100, 1)]


def clip(kind: str, concept: str, folder: Path) -> Request:
    """As configs/thing.yaml and configs/demo.yaml."""
    drawings, generator = load_drawings(), torch.Generator().manual_seed(NEAR)
    rows = near_rows(drawings, kind, concept).repeat(4 if kind == "thing" else 1)
    near = emoji_pairs(drawings, rows, generator, thing=kind == "thing", style=kind == "style")
    bounds = {"forget_metric": f"{kind}_accuracy", "retain_metric": ["style_accuracy", "thing_accuracy"]}
    data = EmojiDataModule(**{kind: concept})
    return Request(
        EmbeddedClip(), data, bounds, list(DataLoader(near, 128)), f"{kind}_accuracy", evaluations=6 if kind == "thing" else 10
    )


def canvas(kind: str, concept: str, folder: Path) -> Request:
    """As configs/unlearn_canvas.yaml, with 40 report pictures of a concept in 10 steps in place of 120 in 25."""
    drawings = canvas_drawings()
    rows = near_rows(drawings, kind, concept).repeat(2 if kind == "thing" else 1)
    near = {
        "text": [caption_of(drawings, int(row)) for row in rows],
        "seed": torch.arange(len(rows)) + NEAR,
        "steps": torch.full((len(rows),), 10),
        kind: (drawings.things if kind == "thing" else drawings.styles)[rows],
    }
    data = CanvasDataModule(**{kind: concept}, search_steps=6, report_pictures=40, report_steps=10)
    return Request(EmbeddedCanvas(), data, {"forget_target": 0.05}, [near], f"{kind}_accuracy", replay=False)


def vlm(kind: str, concept: str, objective: str, folder: Path) -> Request:
    """As configs/vlm.yaml, with a third of the report's questions."""
    drawings = load_drawings()
    near = questions_about(drawings, near_rows(drawings, kind, concept), kind, NEAR)
    layers = ["*.layers.[45].mlp.*", "*multi_modal_projector.linear_2*"]
    data = FewerQuestions(**{kind: concept})
    return Request(EmbeddedVLM(objective), data, {"forget_target": 0.02}, near, "answer_accuracy", layers, replay=False)


class FewerQuestions(EmojiQuestionDataModule):
    """Asks every third question of the report, of which generated answers take longest."""

    def _loader(self, dataset: Dataset) -> DataLoader:
        is_report = any(dataset is sets["test"] for sets in (self._retain, *self._forget.values()))
        return super()._loader(Subset(dataset, range(0, len(dataset), 3)) if is_report else dataset)


# ---- digits


def network() -> nn.Sequential:
    """A small convolutional classifier of pictures with 8 × 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def digit_parts(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pictures and labels of scikit-learn's digits: "train", "val" and "test"; the model learns the first."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    middle = (len(labels) + TRAINED_ON) // 2
    rows = {"train": order[:TRAINED_ON], "val": order[TRAINED_ON:middle], "test": order[middle:]}
    return {name: (pictures[part], labels[part]) for name, part in rows.items()}


def trained(pictures: Tensor, labels: Tensor, path: Path, seed: int = 0, steps: int = 600) -> nn.Module:
    """Train the classifier, or read it if that was done before."""
    torch.manual_seed(seed)
    model = network()
    if path.exists():
        load_model(model, path)
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pictures[rows]), labels[rows]).backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Return the share of pictures that a classifier names rightly."""
    return (model(pictures).argmax(1) == labels).float().mean().item()


def digits(digit: int | None, folder: Path, draw: int = 1, seed: int = 0) -> Request:
    """A class, down to chance; or a random 5 % of the training set, down to the accuracy on pictures never seen."""
    parts = digit_parts(seed)
    model = trained(*parts["train"], folder / f"digits{seed or ''}.safetensors", seed)
    held_out = accuracy(model, *map(torch.cat, zip(parts["val"], parts["test"], strict=True)))
    module = ClassifierModule(model, 10)
    if digit is None:
        count = len(parts["train"][1])
        gone = torch.zeros(count, dtype=torch.bool)
        gone[torch.randperm(count, generator=torch.Generator().manual_seed(draw))[: count // 20]] = True
        forget, rest = ([tensor[mask] for tensor in parts["train"]] for mask in (gone, ~gone))
        same = torch.isin(rest[1], forget[1].unique())
        near = [[tensor[same] for tensor in rest]]
        # What is to be forgotten are these very pictures; others of them don't exist.
        forgets, retains = [TensorDataset(*forget)] * 3, [TensorDataset(*some) for some in (rest, parts["val"], parts["test"])]
        bounds = {"forget_target": held_out}
    else:
        own, others = ({n: [t[(p[1] == digit) == is_own] for t in p] for n, p in parts.items()} for is_own in (True, False))
        forgets, retains = ([TensorDataset(*some) for some in part.values()] for part in (own, others))
        with torch.no_grad():
            taken_for = model(torch.cat([own["val"][0], own["test"][0]])).softmax(1).mean(0)
        close = taken_for.argsort(descending=True)
        close = close[close != digit][:5]
        near = [[tensor[torch.isin(others["test"][1], close)] for tensor in others["test"]]]
        bounds = {}
    data = UnlearnDataModule(
        forgets[0], retains[0], forget_val=forgets[1], forget_test=forgets[2], retain_val=retains[1], retain_test=retains[2]
    )
    return Request(module, data, bounds, near, front_only=False)  # it has four layers in all


# ---- passages


def passages(draw: int, folder: Path) -> Request:
    """Passages of Python's documentation, down to the level of passages never seen, as benchmarks/passages.py."""
    module, data = EmbeddedLM(), PythonDocsDataModule(32, seed=draw)
    data.tokenizer = module.tokenizer
    data.setup()
    predicted = pad(teacher_forced(module.model.eval(), data.unseen_passages)[0])["input_ids"]
    unseen = memorization_accuracy(predicted, pad(data.unseen_passages)).mean().item()
    return Request(module, data, {"forget_target": unseen}, replay=False)


FAMILIES: dict[str, dict[str, Callable[[Path], Request]]] = {
    "clip": {name: partial(clip, kind, name) for kind, name in (("thing", "octopus"), ("thing", "cat"), ("style", "blob"))},
    "sd": {name: partial(canvas, kind, name) for kind, name in (("style", "blob"), ("style", "fluent"), ("thing", "cat"))},
    "vlm": {
        f"{name}, {objective}": partial(vlm, kind, name, objective)
        for objective in ("answers", "clip")
        for kind, name in (("thing", "octopus"), ("thing", "cat"), ("style", "fluent"))
    },
    "digits": {"0": partial(digits, 0), "1": partial(digits, 1), "random 5 %": partial(digits, None)},
    "lm": {"draw 0": partial(passages, 0)},
}
"""What makes a request, by family and concept, from the folder where models are kept that are trained for it."""

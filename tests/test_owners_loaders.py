"""A loader is its owner's: what it serves reaches the module as it is, or it is refused with what to give instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from _callback import unlearn_callback
from _tiny import blobs, part, trained, trainer
from slug_lightning import UnlearnError
from slug_lightning.tensors.digests import digest

# ---- how many samples a batch has


class Boxes(pl.LightningModule):
    """A detector: a batch has some pictures, and many more boxes than pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained().net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        of_box = cross_entropy(self.net(batch["boxes"]), batch["kinds"], reduction="none")
        counts = torch.tensor(batch["counts"])
        return torch.stack([own.mean() for own in of_box.split(batch["counts"])]).mean() + 0 * counts.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pictures(Boxes):
    def batch_size(self, batch: Any) -> int:
        return len(batch["counts"])


def collate_boxes(pictures: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    boxes, kinds = zip(*pictures, strict=True)
    return {"boxes": torch.cat(boxes), "kinds": torch.cat(kinds), "counts": [len(own) for own in boxes], "sizes": torch.ones(2)}


def pictures(forget: bool) -> list[tuple[Tensor, Tensor]]:
    """Pictures with one to four boxes each, all of the class to forget or none."""
    x, y = (torch.stack(column) for column in zip(*part(forget), strict=True))
    sizes = [1 + number % 4 for number in range(len(x) * 2 // 5)]
    return list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))


def detecting(module: pl.LightningModule) -> Any:
    loaders = {
        kind: {
            split: DataLoader(pictures(kind == "forget")[place::3], 7, collate_fn=collate_boxes)
            for place, split in enumerate(SPLITS)
        }
        for kind in ("forget", "retain")
    }
    callback = unlearn_callback(forget={"two": loaders["forget"]}, retain=loaders["retain"], retain_tolerance=20.0)
    trainer(callback).fit(module, loaders["retain"]["train"])
    return callback.report


SPLITS = ("train", "val", "test")


def test_a_detectors_pictures_are_counted_by_its_own_word():
    report = detecting(Pictures())
    net = trained().eval().net
    with torch.no_grad():
        for kind in ("forget", "retain"):
            for split, found in (("val", report.search_before), ("test", report.before)):
                chosen = pictures(kind == "forget")[SPLITS.index(split) :: 3]
                expected = torch.stack([cross_entropy(net(boxes), kinds) for boxes, kinds in chosen]).mean()
                assert found[kind]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert report.cost["backward_samples"] == sum(len(pictures(forget)[0::3]) for forget in (True, False))


def test_a_detectors_pictures_are_not_taken_for_boxes():
    with pytest.raises(UnlearnError, match=r"first dimensions .* disagree, 2, \d+.*define a method batch_size\(batch\)"):
        detecting(Boxes())


@dataclass(slots=True)
class Graph:
    x: Tensor
    y: Tensor

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device), self.y.to(device))


@dataclass
class Named(Graph):
    """Has a `__dict__` besides the slots."""

    name: str = ""


class OfGraphs(Boxes):
    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch.x), batch.y)


def test_batches_of_a_class_with_slots_are_taken():
    def collate(samples: list[Any]) -> Graph:
        return Graph(*map(torch.stack, zip(*samples, strict=True)))

    forget, retain = (DataLoader(part(forget), 16, collate_fn=collate) for forget in (True, False))
    callback = unlearn_callback(forget=forget, retain=retain, retain_tolerance=20.0)
    trainer(callback).fit(OfGraphs(), retain)
    assert callback.report.status == "unlearned"


@pytest.mark.parametrize("kind", [Graph, Named])
def test_what_is_in_slots_counts_in_a_digest(kind):
    x, y = blobs()[0]
    assert digest(kind(x, y)) == digest(kind(x.clone(), y.clone())) != digest(kind(x + 1, y))
    assert digest(Named(x, y, "a")) != digest(Named(x, y, "b"))

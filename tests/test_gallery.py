"""Pictures before and after: of the right data, at the right weights, and with nothing different but the edit."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext

import pytest
import torch
from _callback import unlearn_callback
from _simulated import simulate
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from _tiny import Classifier, PlainRunner, fit, loader, part, trained, trainer
from slug_lightning import UnlearnError
from slug_lightning.datamodules import ConceptDataModule, UnlearnDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.objective.objective import Objective
from slug_lightning.objective.samples import Gallery, before_and_after
from slug_lightning.utils.random import seed_for_batch

pytestmark = [pytest.mark.figures, pytest.mark.uncovered]


class Answering(Classifier):
    """Shows pictures that are what they are, and says of each which class it is."""

    def gallery_step(self, batch, batch_idx):
        return torch.zeros(len(batch[0]), 3, 4, 4), [f"what is this? {int(said)}" for said in self.net(batch[0]).argmax(1)]


class Drawing(Classifier):
    """Paints what it thinks of a batch, and noise."""

    def gallery_step(self, batch, batch_idx):
        assert not self.training and not torch.is_grad_enabled() and self.trainer.validating
        self.log("drawn", 1.0)
        certain = self.net(batch[0]).softmax(1)[:, :3, None, None]
        pictures = certain.expand(-1, -1, 4, 5) / 2 + torch.rand(len(certain), 3, 4, 5) / 2
        return pictures, [f"${int(label)}$ of {batch_idx}" for label in batch[1]]


def picture_of(module: Drawing, batch) -> torch.Tensor:
    """What `Drawing` draws with these weights, in bytes, written again."""
    module.eval()
    seed_for_batch(0)
    with torch.no_grad():
        certain = module.net(batch[0])[:8].softmax(1)
        noise = torch.rand(len(batch[0]), 3, 4, 5)[:8]
    return torch.round((certain[:, :3, None, None] + noise) / 2 * 255).to(torch.uint8)


def fit_on(callback, model, made, **options):
    fitted = trainer(callback, **options)
    fitted.fit(model, datamodule=made)
    return fitted


def tags(logger) -> list[str]:
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    return found.Tags()["images"]


def test_a_run_draws_the_first_report_data_before_and_after_the_edit(tmp_path):
    model, original, made = trained(Drawing), trained(Drawing), UnlearnDataModule(part(True), part(False), batch_size=16)
    callback = unlearn_callback(retain_tolerance=0.05, output_dir=str(tmp_path / "run"))
    fitted = fit_on(callback, model, made, logger=TensorBoardLogger(tmp_path / "logs"))
    report = callback.report
    assert report.status == "unlearned" and set(report.gallery) == {"forget", "retain"}
    loaders = resolve_loaders(None, None, made)
    (forget,) = loaders.forget.values()
    for kind, parts in (("forget", forget), ("retain", loaders.retain)):
        batch = next(iter(parts["test"]))
        gallery = report.gallery[kind]
        assert gallery.titles == [f"${int(label)}$ of 0" for label in batch[1][:8]]
        assert torch.equal(gallery.before, picture_of(original, batch))
        assert torch.equal(gallery.after, picture_of(model, batch))
        assert kind == "retain" or not torch.equal(gallery.after, gallery.before)
        shown = imread(tmp_path / "run" / "figures" / "samples" / f"{kind}.png")
        assert shown.ndim == 3 and shown.std() > 0.1
    assert report.cost["seconds"]["gallery"] > 0
    assert "gallery" not in report.to_dict() and type(report).from_dict(report.to_dict()) == report
    assert "unlearn/samples/forget" in tags(fitted.logger)


def test_of_several_concepts_each_has_its_pictures_and_all_edits_are_there():
    model, original = trained(Drawing), trained(Drawing)
    made = ConceptDataModule(part(True).dataset, classes={"a": [2], "b/c": [0]}, batch_size=8)
    callback = unlearn_callback(retain_tolerance=0.1, layers="net.6.*")
    fit_on(callback, model, made)
    report = callback.report
    assert len(report.unlearned) == 2
    assert {"samples/retain", "samples/forget/a", "samples/forget/b-c"} <= set(report.figures())
    loaders = resolve_loaders(None, None, made)
    galleries = [(report.concepts[name].gallery["forget"], parts) for name, parts in loaders.forget.items()]
    for gallery, parts in [*galleries, (report.gallery["retain"], loaders.retain)]:
        batch = next(iter(parts["test"]))
        assert torch.equal(gallery.before, picture_of(original, batch))
        assert torch.equal(gallery.after, picture_of(model, batch))
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_what_is_said_to_a_picture_stands_below_it_before_and_after_the_edit():
    model, made = trained(Answering), UnlearnDataModule(part(True), part(False), batch_size=16)
    callback = unlearn_callback(retain_tolerance=0.05)
    fit_on(callback, model, made)
    forgotten, kept = (callback.report.gallery[kind] for kind in ("forget", "retain"))
    assert set(forgotten.titles) == {"what is this? 2"} and "what is this? 2" not in forgotten.said
    assert len(forgotten.said) == 8 and "what is this? 2" not in kept.titles
    figure = callback.report.figures()["samples/forget"]
    written = [" ".join(axes.get_xlabel().split()) for axes in figure.axes]
    assert written == forgotten.titles + forgotten.said


def test_titles_that_an_edit_leaves_as_they_are_stand_once():
    module = Scaled(titles=list("abcd"))
    gallery = before_and_after(objective_of(module, DataLoader(numbers, 4)), "forget", doubled(module))
    assert gallery.said is None
    assert [axes.get_xlabel() for axes in gallery.figure("").axes] == [""] * 4 + list("abcd")


def test_nothing_is_drawn_without_an_edit_or_without_a_step():
    impossible = unlearn_callback(loader(True), loader(False), forget_target=1e9, max_evaluations=2)
    fit(impossible, trained(Drawing))
    unable = unlearn_callback(loader(True), loader(False), retain_tolerance=0.05)
    fit(unable, trained())
    assert impossible.report.status == "infeasible" and unable.report.status == "unlearned"
    for report in (impossible.report, unable.report):
        assert report.gallery == {} and "gallery" not in report.cost["seconds"]
        assert not any(name.startswith("samples") for name in report.figures())


# ---- one set, without a trainer


class Scaled(nn.Module):
    def __init__(self, **step) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.step = step

    def gallery_step(self, batch, batch_idx):
        (numbers,) = batch
        pictures = numbers[:, None, None, None] / 64 * self.factor * torch.ones(3, 2, 2)
        return self.step.get("pictures", pictures), self.step.get("titles", [str(int(n)) for n in numbers])


def objective_of(module, batches, processes=None):
    return Objective(module, {"forget": {"test": batches}}, PlainRunner(processes))


def doubled(module):
    class Twice:
        def __enter__(self):
            module.factor.data *= 2

        def __exit__(self, *_):
            module.factor.data /= 2

    return Twice()


numbers = TensorDataset(torch.arange(64.0))


def test_a_loader_that_serves_another_batch_each_time_is_read_once():
    sampler = RandomSampler(numbers, generator=torch.Generator().manual_seed(0))
    module = Scaled()
    gallery = before_and_after(objective_of(module, DataLoader(numbers, 4, sampler=sampler)), "forget", doubled(module))
    shown = torch.tensor([float(title) for title in gallery.titles])
    assert len(shown) == 4
    assert torch.equal(gallery.before[:, 0, 0, 0], (shown / 128 * 255).round().to(torch.uint8))
    assert torch.equal(gallery.after[:, 2, 1, 1], (shown / 64 * 255).round().to(torch.uint8))


@pytest.mark.parametrize("stream", [False, True])
def test_every_process_draws_the_first_batch(stream):
    batches = DataLoader(numbers, 4)
    given = list(batches) if stream else batches
    galleries = simulate(3, lambda processes: before_and_after(objective_of(Scaled(), given, processes), "forget", nullcontext()))
    assert [gallery.titles for gallery in galleries] == [["0", "1", "2", "3"]] * 3


def test_eight_are_taken_and_what_is_no_colour_is_made_one():
    pictures = torch.zeros(9, 3, 2, 2, dtype=torch.bfloat16)
    pictures[0], pictures[1], pictures[2] = torch.nan, 7, -1
    module = Scaled(pictures=pictures, titles=list("abcdefghi"))
    gallery = before_and_after(objective_of(module, DataLoader(numbers, 4)), "forget", nullcontext())
    assert gallery.titles == list("abcdefgh") and gallery.after.dtype == torch.uint8
    assert gallery.after[:, 0, 0, 0].tolist() == [0, 255, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "step",
    [
        {"pictures": torch.ones(2, 3, 4, 4)},
        {"pictures": torch.ones(4, 1, 4, 4)},
        {"pictures": torch.ones(3, 4, 4)},
        {"pictures": torch.ones(0, 3, 4, 4), "titles": []},
    ],
)
def test_a_step_that_gives_something_else_is_refused(step):
    with pytest.raises(UnlearnError, match=r"gallery_step must return pictures \[n, 3, H, W\].*got \["):
        before_and_after(objective_of(Scaled(**step), DataLoader(numbers, 4)), "forget", nullcontext())


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("count", [1, 8])
def test_titles_stand_whole_below_their_pictures(count, said):
    titles = ["a very long prompt, for $5 to $6, of a cat that sits on a mat and looks at nothing at all"] * count
    blank = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    others = [title.replace("cat", "dog") for title in titles] if said else None
    figure = Gallery(titles, blank, blank, others).figure("To keep, with " + "cats and dogs, " * 40 + "forgotten")
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    rows = [figure.axes[:count], figure.axes[count:]][not said :]
    labels = [[axes.xaxis.label.get_window_extent() for axes in row] for row in rows]
    boxes = [*itertools.chain(*labels), figure._suptitle.get_window_extent()]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert all(one.x1 < other.x0 for row in labels for one, other in itertools.pairwise(row))
    below = figure.axes[count].get_window_extent()
    assert not said or all(box.y0 > below.y1 for box in labels[0])  # and not over the pictures of the second row
    assert " ".join(figure.axes[-1].get_xlabel().split()) == (others or titles)[0]
    assert " ".join(figure.axes[0].get_xlabel().split()) == (titles[0] if said else "")

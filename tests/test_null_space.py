"""The closed form for the image projection of a CLIP: its algebra, and runs of it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from _tiny import changed, loader, snapshot, trained, trainer
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.clip.models import encode_image, to_hugging_face
from slug_lightning.datamodules import EmojiDataModule, UnlearnDataModule
from slug_lightning.datamodules.demo import emoji
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.methods.baselines import NullSpace
from slug_lightning.methods.baselines.null_space import basis_of, name_basis, null_direction
from slug_lightning.modules import ClipModule, EmbeddedClip
from slug_lightning.reports.several import AnyReport
from slug_lightning.tensors.layers import Layer

METRICS = {"forget_metric": "thing_accuracy", "retain_metric": ["style_accuracy", "thing_accuracy"], "retain_tolerance": 0.05}


@pytest.fixture
def some_drawings(monkeypatch):
    """The drawings of thirty things, so that a run takes seconds; the model still chooses among all names."""
    every = load_drawings()
    kept = [every.thing_names.index(name) for name in ("octopus", "cat")]
    kept += [i for i in range(len(every.thing_names)) if i not in kept][::8]
    rows = torch.isin(every.things, torch.tensor(kept))
    some = Drawings(every.pictures[rows], every.things[rows], every.styles[rows], every.thing_names, every.style_names)
    monkeypatch.setattr(emoji, "load_drawings", lambda: some)


def forget(things: Any, method: NullSpace, module: ClipModule | None = None, **options: Any) -> tuple[ClipModule, AnyReport]:
    module = EmbeddedClip() if module is None else module
    # What is near is drawn anew, and measured, which takes longer than all the rest.
    callback = UnlearnCallback(method=method, **METRICS | {"near_retain": None} | options)
    trainer(callback, limit_val_batches=0).fit(module, datamodule=EmojiDataModule(thing=things))
    return module, callback.report


def direction_of(module: ClipModule, *things: str) -> torch.Tensor:
    """By plain arithmetic: the names' text embeddings, each minus the mean of all others."""
    names = load_drawings().thing_names
    with torch.no_grad():
        text = module.class_features("thing").double()
    own = torch.tensor([name in things for name in names])
    return normalize(text[own] - text[~own].mean(0), dim=1)


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_the_octopus_is_forgotten_by_the_closed_form(library, some_drawings):
    module, name = EmbeddedClip(), "visual.proj"
    if library == "transformers":
        module.model, name = to_hugging_face(module.model).train(), "visual_projection.weight"
    before = snapshot(module.model)
    module, report = forget("octopus", NullSpace(), module)
    assert report.status == "unlearned" and report.holds and report.tensors == [name]
    assert report.before["forget"]["thing_accuracy"] > 0.9 and report.after["forget"]["thing_accuracy"] <= 1 / 234
    assert all(report.after["retain"][of] >= report.before["retain"][of] - 0.02 for of in METRICS["retain_metric"])
    assert changed(module.model, before) == {name} and report.scores == []
    weight, (u,) = before[name].double(), direction_of(module, "octopus")
    projection = torch.eye(len(u), dtype=torch.float64) - torch.outer(u, u)
    expected = weight @ projection if library == "open_clip" else projection @ weight
    torch.testing.assert_close(module.model.state_dict()[name], expected.float(), atol=1e-6, rtol=1e-5)
    assert report.relative_step == pytest.approx(float((expected - weight).norm() / weight.norm()), rel=1e-4)
    pictures = load_drawings().pictures[:4, :3] / 255.0
    with torch.no_grad():
        assert (encode_image(module.model.eval(), pictures).double() @ u).abs().max() < 1e-5
    report.patch.revert(module.model)
    assert not changed(module.model, before)


def test_both_libraries_get_the_same_edit():
    weight, basis = torch.randn(6, 4), torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64)).Q
    one = null_direction(Layer("p", {"model.visual.proj": nn.Parameter(weight)}), basis)
    other = null_direction(Layer("p", {"model.visual_projection.weight": nn.Parameter(weight.T.contiguous())}), basis)
    (right,), (left,) = one.values(), other.values()
    torch.testing.assert_close(right, left.T)
    torch.testing.assert_close(weight + right, (weight.double() @ (torch.eye(4) - basis @ basis.T)).float())
    half = null_direction(Layer("p", {"model.visual.proj": nn.Parameter(weight.bfloat16())}), basis)
    assert next(iter(half.values())).dtype == torch.float32


def test_the_smallest_strength_that_forgets_is_found(some_drawings):
    _, report = forget("octopus", NullSpace(strength=None))
    steps = [trial["step"] for trial in report.trace]
    assert report.status == "unlearned" and len(steps) == len(set(steps)) <= 10 and max(steps) <= 2
    forgetting = [trial["step"] for trial in report.trace if trial["forgotten"]]
    assert 0.5 < min(forgetting) < 1
    _, whole = forget("octopus", NullSpace())
    assert report.relative_step == pytest.approx(min(forgetting) * whole.relative_step, rel=1e-4)


def test_two_things_under_one_name_lose_both_directions(some_drawings):
    data = EmojiDataModule(thing=["octopus", "cat"])
    data.setup("fit")
    both = {
        split: torch.utils.data.ConcatDataset([data.forget_dataloader(split, one).dataset for one in ("octopus", "cat")])
        for split in ("train", "val", "test")
    }
    retain = {split: data.retain_dataloader(split).dataset for split in ("train", "val", "test")}
    parts = {f"{kind}_{split}": own[split] for kind, own in (("forget", both), ("retain", retain)) for split in ("val", "test")}
    joined = UnlearnDataModule(both["train"], retain["train"], **parts, batch_size=128)
    module = EmbeddedClip()
    before = snapshot(module.model)
    callback = UnlearnCallback(method=NullSpace(), near_retain=None, **METRICS)
    trainer(callback, limit_val_batches=0).fit(module, datamodule=joined)
    assert callback.report.status == "unlearned"
    u = direction_of(module, "octopus", "cat")
    change = (module.model.visual.proj - before["visual.proj"]).double()
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 2
    assert (module.model.visual.proj.double() @ u.T).abs().max() < 1e-5


def test_several_concepts_each_get_their_own_edit_of_the_one_tensor(some_drawings):
    module = EmbeddedClip()
    before = snapshot(module.model)
    module, report = forget(["octopus", "cat"], NullSpace(), module)
    assert report.status == "unlearned" and list(report.unlearned) == ["octopus", "cat"]
    assert all(one.tensors == ["visual.proj"] for one in report.concepts.values())
    weight = before["visual.proj"].double()
    added = weight.clone()
    for thing in ("octopus", "cat"):
        (u,) = direction_of(module, thing)
        added -= weight @ torch.outer(u, u)
    torch.testing.assert_close(module.model.visual.proj.detach(), added.float(), atol=1e-5, rtol=1e-5)


def test_what_an_earlier_run_has_forgotten_keeps_its_edit(some_drawings, tmp_path):
    folder = str(tmp_path / "run")
    _, first = forget("octopus", NullSpace(), output_dir=folder)
    _, report = forget(["octopus", "cat"], NullSpace(), earlier=folder)
    assert report.status == "unlearned" and report.concepts["octopus"].patch_digest == first.patch_digest


def test_a_strength_that_does_not_suffice_is_said_and_changes_nothing(some_drawings):
    module = EmbeddedClip()
    before = snapshot(module.model)
    _, report = forget("octopus", NullSpace(strength=0.1), module)
    assert report.status == "infeasible" and not changed(module.model, before)
    assert any("octopus: at a strength of 0.1, thing_accuracy is" in note for note in report.notes)


@pytest.mark.parametrize("strength", [0, -1, 2.5, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(UnlearnError, match=r"strength must be in \(0, 2\], or None"):
        NullSpace(strength)
    with pytest.raises(UnlearnError, match="max_evaluations must be >= 1, got 0"):
        NullSpace(max_evaluations=0)


@pytest.mark.parametrize("remedy", ["a slug_lightning.modules.ClipModule with prompts=… is needed", "no prompts"])
def test_a_module_without_names_is_refused(remedy):
    module = trained()
    if remedy == "no prompts":
        module = ClipModule(EmbeddedClip().model)
    with pytest.raises(UnlearnError, match=r"names of the classes.*give a slug_lightning.modules.ClipModule with prompts=…"):
        NullSpace().layers_of(module)
    if remedy != "no prompts":
        callback = UnlearnCallback(loader(True), loader(False), method=NullSpace())
        with pytest.raises(UnlearnError, match="method: NullSpace needs the names of the classes"):
            trainer(callback).fit(module, loader(False), loader(False))


def test_a_model_without_an_image_projection_is_refused():
    module = EmbeddedClip()
    module.model.visual.proj = None
    with pytest.raises(UnlearnError, match=r"the image projection of a CLIP \(visual.proj or .*\), and this model has none"):
        NullSpace().layers_of(module)


class OneName(EmbeddedClip):
    """Its text tower gives every name the same features."""

    def class_features(self, name: str) -> torch.Tensor:
        return super().class_features(name)[:1].expand(len(self.prompts[name]), -1)


def samples(**labels: int) -> list[dict[str, torch.Tensor]]:
    return [{"image": torch.zeros(2, 3, 64, 64)} | {name: torch.full((2,), label) for name, label in labels.items()}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "loss"}, "'loss' has none; give style_accuracy or thing_accuracy"),
        ({"batches": samples(style=1)}, r"no batch of 'it' has a label of the prompts 'thing'; give batch\['thing'\]"),
        ({"batches": samples(thing=-1)}, "no batch of 'it' has a label"),
        ({"batches": list(DataLoader(TensorDataset(torch.zeros(2, 3))))}, "no batch of 'it' has a label"),
        ({"batches": [s for i in range(234) for s in samples(thing=i)]}, "has every name of the prompts 'thing'"),
        ({"module": OneName}, "the text tower does not tell 'it' from the other names"),
    ],
)
def test_a_forget_set_that_names_nothing_is_refused(options, message):
    def served(batches: list[Any]) -> list[Any]:
        return [SimpleNamespace(batch=batch) for batch in batches]

    runner = SimpleNamespace(batches=served)
    objective = SimpleNamespace(
        module=options.get("module", EmbeddedClip)(),
        runner=runner,
        passing=nullcontext,
        loaders={"forget": {"train": options.get("batches", samples(thing=3))}},
        processes=SimpleNamespace(all_gather_object=lambda what, own: [own]),
    )
    metric = SimpleNamespace(name=options.get("metric", "thing_accuracy"))
    targets = [SimpleNamespace(metric=metric)]
    concept = SimpleNamespace(name="it", objective=objective, targets=targets)
    with pytest.raises(UnlearnError, match=message):
        name_basis(concept)


def test_names_that_mean_the_same_count_once():
    features = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    features[1] = features[0]
    basis = basis_of(features.double(), [0, 1])
    assert basis.shape == (4, 1)
    u = normalize(features[0] - features[2:].mean(0), dim=0)
    assert abs(float(basis[:, 0] @ u.double())) == pytest.approx(1)

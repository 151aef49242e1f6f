"""Relearning: the attack trains a copy, as Adam would by hand, and the caller's module stays as it is."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from _tiny import Classifier, loader, trained
from slug_lightning.audit.relearning import Relearning
from slug_lightning.clip.models import contrastive_loss, distinct_contrastive_loss
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import joined
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.utils.rows import take


class Weights(pl.LightningModule):
    """A linear loss, so that its gradient is the mean sample; what is measured are the weights themselves."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.noise = noise

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return ((batch[0] + self.noise * torch.randn_like(batch[0])) @ self.w).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log_dict({f"w{number}": weight for number, weight in enumerate(self.w)})


class Half(Weights):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class Manual(Weights):
    automatic_optimization = False


class WithoutValidation(pl.LightningModule):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return batch[0].sum()


class Uncopied(Weights):
    def __init__(self) -> None:
        super().__init__()
        self.open = (number for number in range(3))


class Silent(Weights):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        return None


def batches(*samples: tuple[float, float, float], size: int = 4) -> list[list[Tensor]]:
    return [[part] for part in torch.tensor(samples).split(size)]


def state(module: nn.Module) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return found | {f"{name}.grad": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("metric", ["val_acc", "val_f1"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_module_and_the_random_states_stay_as_they_are(metric, frozen):
    module: Classifier = trained(frozen=frozen)
    module.net[3].eval()  # a mode of its own
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, attributes = state(module), set(vars(module))
    modes = [part.training for part in module.modules()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        Relearning(steps=(1, 2))(module, loader(True, shuffle=True), loader(True), metric=metric, retain=loader(False))
    except UnlearnError:
        assert metric == "val_f1"
    after = state(module)
    assert before.keys() == after.keys() and all(bitwise_equal(before[name], after[name]) for name in before)
    assert set(vars(module)) == attributes and module.trained_batches == 0
    assert [part.training for part in module.modules()] == modes
    assert {p.requires_grad for p in module.parameters()} == {not frozen}
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), drawn[2], strict=True))


def test_more_steps_teach_more():
    torch.manual_seed(0)
    attack = Relearning(steps=(0, 1, 4, 16), learning_rates=(0.01,))
    rows = attack(Classifier(frozen=True), loader(True), loader(True), metric="val_acc")
    found = [row["val_acc"] for row in rows]
    assert [row["steps"] for row in rows] == [0, 1, 4, 16]
    assert found == sorted(found) and found[0] < 0.5 and found[-1] == 1.0
    with torch.inference_mode():  # as within `Trainer.validate`
        assert attack(Classifier(), loader(True), loader(True), metric="val_acc")[-1]["val_acc"] == 1.0


@pytest.mark.parametrize("number", range(3))
def test_steps_are_those_of_adam(number):
    """While the gradient stays the same, each step is rate · g / (|g| + eps)."""
    gradient = (2.0, -0.5, 1e-8)
    taught, rates = batches(*[gradient] * 4), (1e-3, 1e-2)
    rows = Relearning((0, 1, 2, 3), rates, samples=4)(Weights(), taught, taught, metric=f"w{number}")
    one = gradient[number] / (abs(gradient[number]) + 1e-8)
    expected = [
        {"learning_rate": rate, "steps": k, f"w{number}": pytest.approx(-k * rate * one)} for rate in rates for k in range(4)
    ]
    assert rows == expected


def test_only_the_first_samples_teach_with_one_retain_batch_a_step():
    attack = Relearning(steps=(1, 2), learning_rates=(1e-3,), samples=5)
    own = batches(*[(1.0, -1.0, 0.0)] * 5, *[(-9.0, 9.0, 0.0)] * 5)  # gradients of the second five would be the opposite
    alone = [attack(Weights(), own, own, metric=name) for name in ("w0", "w1", "w2")]
    assert [[row[name] for row in rows] for name, rows in zip(("w0", "w1", "w2"), alone, strict=True)] == [
        pytest.approx([-1e-3, -2e-3]),
        pytest.approx([1e-3, 2e-3]),
        [0, 0],
    ]
    # The mean of five samples of 1 and four of -2 is below 0; the only retain batch serves for both steps.
    mixed = attack(Weights(), own, own, metric="w0", retain=batches(*[(-2.0, 0.0, 0.0)] * 4))
    assert [row["w0"] for row in mixed] == pytest.approx([1e-3, 2e-3])


def test_the_seed_settles_what_is_drawn():
    data = TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))

    def rows(seed: int) -> list[dict[str, float]]:
        torch.manual_seed(100 + len(made))
        taught, retain = (DataLoader(data, batch_size=8, shuffle=True) for _ in range(2))
        return Relearning(samples=4, seed=seed)(Weights(noise=1.0), taught, taught, metric="w0", retain=retain)

    made: list[list[dict[str, float]]] = []
    for seed in (3, 3, 4):
        made.append(rows(seed))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Weights, {"taught": batches(*[(1.0, 1.0, 1.0)] * 15)}, "taught: 16 samples are needed, got 15; give more"),
        (Weights, {"taught": []}, "taught: 16 samples are needed, got 0"),
        (Weights, {"metric": "w3"}, r"metric: validation_step logs no 'w3', only \['w0', 'w1', 'w2'\]; name one that it logs"),
        (Weights, {"asked": []}, "asked: nothing is logged for it; give batches that can be passed over again"),
        (Weights, {"retain": []}, "retain: the set is empty; give at least one batch"),
        (Weights, {"retain": [[torch.zeros(4, 2)]]}, r"batches with tensors \[4, 3\] and \[4, 2\] cannot be joined"),
        (WithoutValidation, {}, "metric: 'w0' cannot be measured, WithoutValidation has no validation_step"),
        (Manual, {}, "Manual: its training_step optimizes manually; define a retain_step"),
        (Half, {}, r"Half: w: 16 bits round small steps away; attack module.float\(\)"),
        (Uncopied, {}, "Uncopied: cannot be copied .*generator"),
        (Silent, {}, "taught: the step of Silent returns no loss"),
    ],
)
def test_what_cannot_be_attacked_is_refused(module, options, message):
    own = batches(*[(1.0, 1.0, 1.0)] * 16)
    with pytest.raises(UnlearnError, match=message):
        Relearning()(module(), **{"taught": own, "asked": own, "metric": "w0", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, r"steps must be ascending and >= 0, got \(\)"),
        ({"steps": (2, 1)}, r"steps must be ascending and >= 0, got \(2, 1\)"),
        ({"steps": (-1, 1)}, "steps must be ascending and >= 0"),
        ({"learning_rates": (1e-4, 0.0)}, r"learning_rates must be > 0, got \(0.0001, 0.0\)"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
    ],
)
def test_arguments_without_sense_are_refused(options, message):
    with pytest.raises(UnlearnError, match=message):
        Relearning(**options)


def test_batches_are_cut_and_joined_in_any_container():
    batch = {"x": torch.arange(6).view(3, 2), "named": [torch.arange(3), ("a", "b", "c")]}
    first = take(batch, [0, 1], 3)
    assert first["x"].tolist() == [[0, 1], [2, 3]] and first["named"][0].tolist() == [0, 1]
    assert first["named"][1] == ("a", "b")
    both = joined([first, batch])
    assert both["x"].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]
    assert both["named"][0].tolist() == [0, 1, 0, 1, 2] and both["named"][1] == ("a", "b", "a", "b", "c")
    assert batch["x"].shape == (3, 2)


class Features(nn.Module):
    """A CLIP whose inputs are its features."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, features: Tensor) -> Tensor:
        return features

    encode_text = encode_image


def test_equal_captions_count_as_one():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 4, generator=generator) for _ in range(2))
    model = Features()
    distinct = distinct_contrastive_loss(model, {"image": image, "text": text})
    assert distinct.item() == pytest.approx(contrastive_loss(model, {"image": image, "text": text}).item(), rel=1e-5)
    # Two things, three pictures of the first: each named rightly among two names, and found among all four pictures.
    batch = {"image": image[:4], "text": text[[0, 0, 0, 1]]}
    logits = model.logit_scale.exp() * normalize(image[:4], dim=1) @ normalize(text[:2], dim=1).T
    named, found = logits.log_softmax(1), logits.log_softmax(0)
    expected = -(named[:3, 0].sum() + named[3, 1]) / 4 - (found[:3, 0].mean() + found[3, 1]) / 2
    assert distinct_contrastive_loss(model, batch).item() == pytest.approx(expected.item() / 2, rel=1e-5)

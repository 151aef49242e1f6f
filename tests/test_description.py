"""What a module computes is told by its code, its constants and its settings: whatever of them changes is seen."""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import BinaryAccuracy

from slug_lightning.modules import ClassifierModule, UnlearnModule
from slug_lightning.modules.clip import EmbeddedClip
from slug_lightning.objective.module_digest import digest_of_module

KNOWN = """
import functools
SCALE = {scale}
TABLE = {{"a": {table}}}
NAMES = frozenset(["{word}", "b", "c", "d"])
def inner(x, by={default}):
    return x {operator} by if x in {{"p", "q", "r"}} else x.{method}()
@functools.cache
def remembered(x):
    return inner(x, by=3)
class Base:
    power = {power}
    @staticmethod
    def fixed(): return {fixed}
    @property
    def held(self): return inner(self.power)
class Loss(Base):
    def __call__(self, model, batch):
        return helpers.scaled(model(batch)) * SCALE * TABLE["a"] + len(NAMES) + remembered(1)
    def __init__(self, weight): self.weight = weight
"""
DEFAULTS = {
    "scale": 0.5, "table": 1, "word": "a", "default": 2, "operator": "+", "method": "sum", "power": 2, "fixed": 1, "weight": 1.0,
    "helper": 1,
}  # fmt: skip


def written(**changes):
    """A module with a loss whose code is made anew each time."""
    values = DEFAULTS | changes
    helpers = ModuleType("helpers")
    exec(f"def scaled(x): return x * {values['helper']}", vars(helpers))
    scope = {"helpers": helpers, "__name__": "somebodys"}
    exec(KNOWN.format(**values), scope)
    return UnlearnModule(nn.Linear(2, 2), scope["Loss"](values["weight"]))


def test_the_same_code_made_anew_is_the_same():
    assert digest_of_module(written()) == digest_of_module(written())


@pytest.mark.parametrize(("what", "other"), [
    ("scale", 0.25), ("table", 2), ("word", "z"), ("default", 3), ("operator", "-"), ("method", "detach"), ("power", 3),
    ("fixed", 2), ("weight", 1.5), ("helper", 2),
])  # fmt: skip
def test_whatever_changes_in_the_code_that_is_used_is_seen(what, other):
    assert digest_of_module(written()) != digest_of_module(written(**{what: other}))


def of_loss(loss):
    return digest_of_module(UnlearnModule(nn.Linear(2, 2), loss))


def closed(*held):
    return lambda model, batch: held


def shown(value, smoothing=0.0):
    return value


class Teacher(nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))


@pytest.mark.parametrize(("make", "other"), [
    (lambda: closed(0.1), lambda: closed(0.2)),
    (lambda: closed(torch.zeros(2)), lambda: closed(torch.tensor([0.0, -0.0]))),
    (lambda: closed({"a": [1, "x"]}), lambda: closed({"a": ["x", 1]})),
    (lambda: closed(Teacher()), lambda: closed(Teacher(2.0))),
    (lambda: closed(shown), lambda: closed(closed)),
    (lambda: functools.partial(shown, smoothing=0.1), lambda: functools.partial(shown, smoothing=0.2)),
    (lambda: closed(cross_entropy), lambda: closed(nn.functional.nll_loss)),
    (lambda: closed(len), lambda: closed(max)),
    (lambda: closed(SimpleNamespace(beta=1)), lambda: closed(SimpleNamespace(beta=2))),
    (lambda: closed(Teacher().forward), lambda: closed(Teacher(2.0).forward)),
    (lambda: closed({"a", "b"}), lambda: closed({"a", "c"})),
])  # fmt: skip
def test_what_a_function_holds_is_seen(make, other):
    assert of_loss(make()) == of_loss(make()) != of_loss(other())


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        self.prompts = {"thing": ["cat", "dog"]}
        self.accuracy = BinaryAccuracy(threshold=0.5)
        self._results: dict = {}
        self.save_hyperparameters({"temperature": 1.0})

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()


CHANGES = {
    "a number": lambda m: setattr(m, "temperature", 0.5),
    "a private number": lambda m: setattr(m, "_temperature", 0.5),
    "a word in a list": lambda m: m.prompts["thing"].reverse(),
    "hyperparameters": lambda m: m.hparams.update(temperature=2.0),
    "a part's attribute": lambda m: setattr(m.net[1], "p", 0.2),
    "a part": lambda m: m.net.append(nn.ReLU()),
    "a part's name": lambda m: m.net.add_module("again", m.net.pop(1)),
    "a tensor that is no buffer": lambda m: setattr(m, "weights", torch.ones(2)),
    "a metric's setting": lambda m: setattr(m.accuracy, "threshold", 0.25),
    "a hook": lambda m: m.net[0].register_forward_hook(lambda *_: None),
    "a hook of the gradient": lambda m: m.net[0].register_full_backward_hook(lambda *_: None),
    "a step of this object": lambda m: setattr(m, "training_step", lambda batch: batch.sum()),
    "settings in an object": lambda m: setattr(m, "config", SimpleNamespace(heads=2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_seen_wherever_they_are(change):
    module = Plain()
    CHANGES[change](module)
    assert digest_of_module(module) != digest_of_module(Plain())


def test_weights_what_was_remembered_and_what_a_metric_has_counted_are_not_looked_at():
    module, before = Plain(), digest_of_module(Plain())
    with torch.no_grad():
        module.net[0].weight += 1
    module._results["x"] = torch.ones(2)
    module.accuracy.update(torch.ones(2), torch.ones(2))
    module.accuracy.compute()
    module.eval()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    assert digest_of_module(module) == before


def test_a_module_that_holds_itself_comes_to_an_end():
    def holding():
        module = Plain()
        module.everything = [module, SimpleNamespace(module=module)]
        module.bound = module.training_step
        return module

    assert digest_of_module(holding()) == digest_of_module(holding()) != digest_of_module(Plain())


def test_code_that_was_run_often_and_prompts_that_are_remembered_change_nothing():
    module = EmbeddedClip()
    before = digest_of_module(module)
    with torch.no_grad():
        for _ in range(20):
            module.class_features("style")
    assert digest_of_module(module) == before == digest_of_module(EmbeddedClip())


def test_models_of_installed_libraries_are_told_apart_by_their_configuration():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = [
        ClassifierModule(CLIPModel(CLIPConfig(text_config=tower, vision_config=tower | {"num_attention_heads": heads})), 2)
        for heads in (2, 2, 4)
    ]
    assert digest_of_module(made[0]) == digest_of_module(made[1]) != digest_of_module(made[2])

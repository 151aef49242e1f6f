"""Modules, Trainers, datamodules, loggers and callbacks of `lightning` and of `pytorch_lightning` in one run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from _callback import unlearn_callback
from torch.utils.data import DataLoader, TensorDataset

from _tiny import FORGET, Classifier, blobs, loader, part, trained
from slug_lightning import UnlearnError
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.datamodules import ConceptDataModule, UnlearnDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders

PACKAGES = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
packages = pytest.mark.parametrize("package", PACKAGES.values(), ids=list(PACKAGES))
others = pytest.mark.parametrize("other", PACKAGES.values(), ids=[f"with {name}" for name in PACKAGES])


def module_of(package: Any) -> Any:
    """The trained classifier as a module of either package."""
    if package is lightning.pytorch:
        return trained()

    class Other(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained().net
            self.trained_batches = 0

        training_step, validation_step = Classifier.training_step, Classifier.validation_step
        configure_optimizers = Classifier.configure_optimizers

    return Other()


def trainer_of(package: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return package.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, "callbacks": list(callbacks), **options})


def data_of(package: Any, *splits: str, **loaders: Any) -> Any:
    """A datamodule of either package that defines these loaders only."""
    return type("Data", (package.LightningDataModule,), {f"{split}_dataloader": lambda self: loaders["of"] for split in splits})()


@packages
@others
def test_loggers_and_checkpoints_of_either_package_get_the_edit(package, other, tmp_path):
    forgetting = unlearn_callback(forget=loader(True, batch_size=4), retain=loader(False), retain_tolerance=20.0)
    keeping = other.callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, save_top_k=0)
    logger = other.loggers.CSVLogger(tmp_path / "logs")
    fitting = trainer_of(package, keeping, forgetting, logger=logger, enable_checkpointing=package is other)
    fitting.fit(module := module_of(package), loader(False), loader(False))
    assert forgetting.report.status == "unlearned"
    assert Path(logger.log_dir, "report.json").is_file()
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())


@packages
@others
def test_datamodules_of_either_package_serve_what_they_define(package, other):
    sources = {kind: data_of(other, "train", of=loader(kind == "forget", batch_size=4)) for kind in ("forget", "retain")}
    forgetting = unlearn_callback(**sources, retain_tolerance=20.0)
    trainer_of(package, forgetting).fit(module_of(package), loader(False), loader(False))
    assert forgetting.report.status == "unlearned"
    assert forgetting.report.notes[0].startswith(f"forget: one set of {len(part(True))} samples split")


@packages
def test_a_datamodule_with_a_dict_or_a_combined_loader_serves_both_sets(package):
    both = {"forget": loader(True, batch_size=4), "retain": loader(False)}
    for given in (both, package.utilities.CombinedLoader(both)):
        found = resolve_loaders(None, None, data_of(package, "train", of=given))
        assert sum(len(found.retain[split].dataset) for split in found.retain) == len(part(False))


@packages
def test_a_combined_loader_by_itself_is_refused_with_the_remedy(package):
    combined = package.utilities.CombinedLoader([loader(True)])
    with pytest.raises(UnlearnError, match="retain: a CombinedLoader numbers its batches; give a list of its loaders"):
        resolve_loaders({"it": loader(True)}, combined, None)


@packages
def test_a_datamodule_of_ours_can_be_fitted_with(package):
    data = pickle.loads(pickle.dumps(ConceptDataModule(blobs(), classes=FORGET, batch_size=4)))
    assert isinstance(data, package.LightningDataModule)
    forgetting = UnlearnCallback(retain_tolerance=20.0)
    trainer_of(package, forgetting).fit(module_of(package), datamodule=data)
    assert forgetting.report.status == "unlearned"


@packages
def test_datasets_given_to_lightning_are_taken_from_its_datamodule(package):
    x, y = (torch.stack(column) for column in zip(*part(True), strict=True))
    data = package.LightningDataModule.from_datasets(TensorDataset(x, y), batch_size=4)
    found = resolve_loaders({"it": data}, loader(False), None)
    assert found.notes[0].startswith(f"forget: one set of {len(x)} samples split")
    assert isinstance(found.forget["it"]["val"], DataLoader)


def test_ours_stays_what_it_is_where_both_are_imported():
    assert issubclass(UnlearnDataModule, lightning.pytorch.LightningDataModule)
    data = UnlearnDataModule(TensorDataset(torch.arange(8)), TensorDataset(torch.arange(20, 40)))
    assert type(data).__mro__[1] is lightning.pytorch.LightningDataModule and data.batch_size == 64

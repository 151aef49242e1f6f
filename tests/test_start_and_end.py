"""What comes before the edit, the module's own start, and what may come over it before the fit ends."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from _callback import unlearn_callback
from lightning.pytorch.loggers import CSVLogger, Logger

from _tiny import Classifier, accuracy, fit, loader, trained, trainer
from slug_lightning import UnlearnReport
from slug_lightning.errors import UnlearnError
from slug_lightning.trainer.checks import folder_of


class SetsUp(Classifier):
    """Makes what its step needs when training starts, and counts how often."""

    starts = 0

    def on_train_start(self):
        self.starts += 1
        self.class_weights = torch.ones(4)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1], self.class_weights)


def test_what_a_module_makes_when_training_starts_is_there_and_made_once():
    module = trained(SetsUp)
    for fits in (1, 2):  # the second finds the edit there
        callback = unlearn_callback(loader(True), loader(False))
        fit(callback, module)
        assert module.starts == fits and "on_train_start" not in vars(module)
    assert callback.report is not None


def test_a_run_that_fails_leaves_the_module_its_own_start():
    module = trained(SetsUp)
    with pytest.raises(UnlearnError, match="forget_metric"):
        fit(unlearn_callback(loader(True), loader(False), forget_metric="nonsense"), module)
    assert "on_train_start" not in vars(module) and module.starts == 1


def test_weights_loaded_when_training_starts_are_those_that_are_edited():
    class Loads(Classifier):
        def on_train_start(self):
            self.load_state_dict(trained().state_dict())

    module = Loads()
    callback = unlearn_callback(loader(True), loader(False))
    fit(callback, module)
    assert callback.report.status == "unlearned" and accuracy(module, forget=True) < 0.6
    before = trained().state_dict()
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(callback.report.tensors)


class Average(pl.Callback):
    """The shape of most averages of weights on the web."""

    def on_train_start(self, trainer, module):
        self.average = copy.deepcopy(module.state_dict())

    def on_train_end(self, trainer, module):
        module.load_state_dict(self.average)


def test_an_edit_that_something_came_over_is_not_called_unlearned():
    module = trained()
    callback = unlearn_callback(loader(True), loader(False))
    with pytest.raises(UnlearnError, match="was overwritten before the fit ended.* nothing is forgotten.*callbacks: Average"):
        trainer(Average(), callback).fit(module, loader(False), loader(False))


def test_where_training_goes_on_the_report_says_how_far_the_edit_was_moved(tmp_path):
    class Nudged(Classifier):
        """Trains by moving one edited tensor by a known way."""

        def on_train_batch_end(self, *_):
            if not self.trained_batches:
                edit = self.state_dict()[self.edited] - self.start[self.edited]
                self.get_parameter(self.edited).data += 0.25 * edit
            self.trained_batches += 1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = trained(Nudged)
    module.start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    asked = {"layers": "net.6.weight", "continue_training": True, "output_dir": str(tmp_path / "run")}
    module.edited = "net.6.weight"
    callback = unlearn_callback(loader(True), loader(False), **asked)
    fit(callback, module)
    said = "continue_training: since the edit, training has moved the edited tensors by 25.0% of the edit's length"
    assert callback.report.notes[-1] == said
    assert UnlearnReport.from_json(tmp_path / "run" / "report.json").notes[-1] == said


class Online(Logger):
    """Keeps everything elsewhere, as Weights & Biases, MLflow and Comet do."""

    name, version, save_dir = "project", "run 7", None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_with_a_logger_without_a_folder_files_go_to_the_trainers(tmp_path):
    callback = unlearn_callback(loader(True), loader(False))
    made = trainer(callback, logger=Online(), default_root_dir=tmp_path)
    made.fit(trained(), loader(False), loader(False))
    assert (tmp_path / "project" / "run 7" / "report.json").exists()
    assert folder_of(trainer(logger=CSVLogger(tmp_path, "a", "b"))) == str(tmp_path / "a" / "b")
    assert folder_of(trainer(logger=False)) is None

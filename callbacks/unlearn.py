"""SLUG inside a Trainer: one gradient to forget, one to keep, a searched step along one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl
import torch

from slug_lightning.callbacks.deprecated import OldKeywords, refuse_unknown
from slug_lightning.datamodules.sources.resolve import UnlearnLoaders, resolve_loaders
from slug_lightning.distributed.processes import Processes
from slug_lightning.distributed.strategy import Runner, refuse_unsupported
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import SLUG, Method, Runtime
from slug_lightning.methods.harness import Harness, Request
from slug_lightning.methods.targets import AS_HOLDOUT
from slug_lightning.objective.data_checks import fingerprint, refuse_unusable_steps
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.objective import Objective
from slug_lightning.reports.loggers import publish
from slug_lightning.reports.run_files import fresh_folder
from slug_lightning.reports.several import AnyReport, JointReport, report_from_dict
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.dtensor import local, write_local
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.trainer.checks import folder_of, outdate_checkpoints, refuse_surroundings
from slug_lightning.trainer.fit_end import refuse_overwritten, say_drift
from slug_lightning.trainer.limits import as_trainer_limits
from slug_lightning.trainer.module_start import started
from slug_lightning.trainer.near_data import near_data, near_words
from slug_lightning.trainer.previous_run import PreviousRun, digest_of_edited
from slug_lightning.trainer.progress import progress_of
from slug_lightning.trainer.report_transfer import ReportTransfer
from slug_lightning.trainer.run_folder import save_run
from slug_lightning.utils.modules import unwrap_model
from slug_lightning.utils.names import concept_of


class UnlearnCallback(OldKeywords):
    """Make the model forget when training would start, by one searched step along one layer.

    The method is SLUG (after arXiv 2407.11867): along the gradient of the forget loss, turned away from what the retain set
    needs, the step is searched for each promising layer that brings `forget_metric` to `forget_target`; the layer that costs
    the retain metrics least, within `retain_tolerance` and `near_tolerance`, is edited. It is chosen on the validation split
    and reported on data that the search never saw. If no step meets all bounds the weights stay as they are, bit for bit. A
    model that holds this request's edit already, by a checkpoint or by the last fit, is left alone, and `report` is the one of
    that edit.

    Args:
        forget: the forget set: a DataLoader (or any iterable of batches), a list of them, a LightningDataModule, or a
            dict of these by the concept's name. Without it, the trainer's datamodule is asked. Several concepts get an edit
            each, as if each were asked for alone; then the sum of all is measured, and searched again where it fails.
        retain: the retain set, likewise.
        method: how edits are found: `slug_lightning.methods.SLUG(…)`, or another `slug_lightning.methods.Method`.
        forget_metric: name of a value that `validation_step` logs and that forgetting must bring to `forget_target`, or names
            of several, such as one for each wording: all must get there, and the one that has gone the smallest share of its
            way counts. Default: the module's own `forget_metric`, else the loss.
        forget_target: value at which a metric counts as forgotten: an accuracy at or below it, a loss at or above
            it; for several metrics also a dict by name. One that meets its target unedited must only stay so.
            "as_holdout", for training samples: within the 95 % interval of the unedited model's metric on at least 300
            samples that it was never trained on, which a `SampleDataModule` brings.
            Default: the module's own `forget_target`, else chance for an accuracy, or for a loss a hundred times
            less likely data (see `slug_lightning.objective.metrics.Metric.default_target`). The report states it.
        retain_metric: name or names of logged values that must not get worse. Default: the module's own, else the loss.
        retain_tolerance: how much each of them may lose, at least 0: absolute for an accuracy, relative for a loss (to 0.1 if
            it is smaller).
        near_retain: retain data that lie near what is forgotten and pay first; they are measured by themselves, too. "auto": the
            five concepts nearest by the module's `embed`, or without labels the nearest 5 % of the retain samples, chosen from
            gradient data; nothing if the module has no `embed`. Or names of concepts; a loader, list, dict by split or
            datamodule of its own, which joins the retain set; a dict of any of these by concept; None for nothing.
        near_tolerance: how much each retain metric may lose on near data, at least 0, as `retain_tolerance`. Default: the largest
            of that, 0.02, and half the 95 % interval of the difference, which is more where near samples are few.
        scales: of the edit, at which the metrics are measured besides 1, to show what more or less of it would do.
        on_infeasible: of several concepts, whether those without an edit within all bounds are left as they are ("skip"),
            or nothing is edited then ("stop").
        earlier: folder of an earlier run on the same model. What it has forgotten is not searched again: its edits are
            taken over, and only checked together with the new ones. All its concepts must be in `forget`, too.
        continue_training: whether the fit trains on from the edited weights instead of ending before the first training
            batch (an infeasible run ends all the same).
        output_dir: folder for report, patch, checkpoint, weights and figures; if it holds a run already, a numbered
            one next to it. Default: the logger's folder; without a logger, or with fast_dev_run, nothing is written.
        runtime: how to compute, such as with or without replay: `slug_lightning.methods.Runtime(…)`.
        **old: keywords of version 0.1 that have moved; each still works, with a `FutureWarning` that says where to.

    Raises:
        UnlearnError: if an argument is out of range.

    Example:
        >>> import lightning.pytorch as pl
        >>> from slug_lightning.callbacks import UnlearnCallback
        >>> from slug_lightning.methods import SLUG
        >>> callback = UnlearnCallback(retain_tolerance=0.02, method=SLUG(layers="encoder.*"))
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        forget: Any = None,
        retain: Any = None,
        *,
        method: Method = SLUG(),  # noqa: B008 (frozen)
        forget_metric: Union[str, list[str], None] = None,
        forget_target: Union[float, dict[str, float], Literal["as_holdout"], None] = None,
        retain_metric: Union[str, list[str], None] = None,
        retain_tolerance: float = 0.01,
        near_retain: Any = "auto",
        near_tolerance: Optional[float] = None,
        scales: Sequence[float] = (),
        on_infeasible: Literal["skip", "stop"] = "skip",
        earlier: Optional[str] = None,
        continue_training: bool = False,
        output_dir: Optional[str] = None,
        runtime: Runtime = Runtime(),  # noqa: B008 (frozen)
        **old: Any,
    ) -> None:
        refuse_unknown(old)
        super().__init__(**old)  # as it stands here, jsonargparse finds the old keywords, too
        for name, tolerance in (("retain_tolerance", retain_tolerance), ("near_tolerance", near_tolerance)):
            if tolerance is not None and (tolerance < 0 or not math.isfinite(tolerance)):
                raise UnlearnError(f"{name} must be >= 0 and finite, got {tolerance}")
        if isinstance(forget_target, str) and forget_target != AS_HOLDOUT:
            raise UnlearnError(f"forget_target must be numbers or {AS_HOLDOUT!r}, got {forget_target!r}")
        goals = forget_target.values() if isinstance(forget_target, Mapping) else [forget_target]
        if not all(goal is None or isinstance(goal, str) or math.isfinite(goal) for goal in goals):
            raise UnlearnError(f"forget_target must be finite, got {forget_target}")
        if on_infeasible not in ("skip", "stop"):
            raise UnlearnError(f"on_infeasible must be 'skip' or 'stop', got {on_infeasible!r}")
        method, scales, continue_training, runtime = self._moved(method, scales, continue_training, runtime)
        if not all(math.isfinite(scale) for scale in scales):
            raise UnlearnError(f"scales must be finite numbers such as 0.5 and 1.5, got {scales}")
        if isinstance(forget, Mapping) and not forget:
            raise UnlearnError("forget must name at least one concept, got an empty dict; or leave it out")
        self.forget = forget
        self.retain = retain
        self.method = method
        self.request = Request(forget_metric, forget_target, retain_metric, retain_tolerance, near_tolerance, on_infeasible)
        self.near_retain = near_retain
        self.scales = scales
        self.earlier = earlier
        self.continue_training = continue_training
        self.output_dir = output_dir
        self.runtime = runtime
        self._method_request = method.request()
        self._report: Optional[AnyReport] = None
        self._folder: Optional[Path] = None  # of this fit's run
        self._data: Optional[str] = None
        self._last: Optional[PreviousRun] = None
        self._earlier: Optional[PreviousRun] = None
        self._transfer = ReportTransfer()

    @property
    def report(self) -> Optional[AnyReport]:
        """What the run found out; None before it. Of several concepts a `JointReport`."""
        if self._report is None:
            self._report = self._transfer.fetch()
        return self._report

    # ---- Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is computed."""
        if stage != "fit":
            return
        refuse_unsupported(trainer.strategy)
        refuse_unusable_steps(pl_module)
        refuse_surroundings(trainer)
        self._report = self._folder = None
        self._method_request = self.method.request()  # not later: a method may collect what it finds
        if trainer.is_global_zero:
            self._transfer.fetch()  # what nobody has asked for
        self._earlier = self._last  # unless the checkpoint of this fit says otherwise

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget: here checkpoint weights are restored, and no batch has been trained on."""
        runner = Runner(trainer.strategy, trainer.state)
        with runner.processes.together(), started(trainer, pl_module):
            if not self._was_done_before(trainer, pl_module, runner):
                self._keep(trainer, pl_module, self._forget(trainer, pl_module, runner), runner.processes)
                outdate_checkpoints(trainer)
            if runner.processes.is_first and self._report is not None:
                self._transfer.leave(self._report, trainer.strategy)
        self._remember(pl_module)  # now already, as the training may be broken off
        assert self._report is not None
        if not self.continue_training or self._report.status == "infeasible":
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to end well if Lightning left out the training loop, and with it the edit, or if something came over it."""
        if self._report is None:
            runner = Runner(trainer.strategy, trainer.state)
            with runner.processes.together():
                done = self._was_done_before(trainer, pl_module, runner)
            if not done:
                raise UnlearnError(
                    "Trainer(max_epochs=…): the fit ended before the edit, as this trainer, or the checkpoint of ckpt_path, had "
                    "finished its training; raise max_epochs, take a new Trainer, or load weights instead of passing ckpt_path"
                )
        elif self.continue_training:
            say_drift(trainer, pl_module, self._report, self._folder)
        elif self._last is not None:
            refuse_overwritten(trainer, pl_module, self._report, self._last.weights)
        self._remember(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Report, request and what tells its data, as plain data, so that a checkpoint with an edit says so."""
        if self._report is None:
            return {}
        return {"report": self._report.to_dict(), "request": self._request(), "data": self._data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint says; whether it is this callback's own run is known once the weights are there."""
        report = report_from_dict(state_dict["report"])
        self._earlier = PreviousRun(report, state_dict["request"], state_dict.get("data"))

    def _request(self) -> dict[str, Any]:
        """What this callback was asked to do, as far as plain data can say it."""
        concepts = list(self.forget) if isinstance(self.forget, Mapping) else None
        asked = {"concepts": concepts, **asdict(self.request), "method": self._method_request}
        near = near_words(self.near_retain)
        # What lies near by itself, and does not bind, is only shown: an earlier version did without it.
        is_default = near == "auto" or (near is None and not self.method.binds_near())
        return asked if is_default else {**asked, "near_retain": near}

    def _remember(self, module: pl.LightningModule) -> None:
        """Let the next fit know what was done in this one, and to which weights it led."""
        assert self._report is not None
        self._last = PreviousRun(self._report, self._request(), self._data, digest_of_edited(module, self._report))

    def _was_done_before(self, trainer: pl.Trainer, module: pl.LightningModule, runner: Runner) -> bool:
        """Take over the report of an earlier fit, or of the checkpoint, if the model holds the edit that it speaks of.

        That the same was asked for is not enough, as the data may be others: the forget metric must be where the earlier
        edit has brought it. Training since may have moved it, which is no reason to edit again; then the data decide.
        """
        earlier = self._earlier
        if earlier is None or not earlier.is_same_request(self._request()) or earlier.report.status == "infeasible":
            return False
        progress = progress_of(trainer)
        with preserve_state(module):
            loaders = self._loaders(trainer, runner)
            objective = self._objective(module, runner)
            same_data = self._fingerprint(objective, loaders) == earlier.data
            same_weights = earlier.weights in (None, digest_of_edited(module, earlier.report))
            same = runner.processes.broadcast("an earlier edit", same_data and same_weights)
            undone = self._undone(earlier.report, objective, loaders)
        holds = not undone
        if not holds and not (self.continue_training and same):
            return False
        self._report, self._data = earlier.report, earlier.data
        edited = (
            f"{earlier.report.concept}: unlearned already, by the edit of {earlier.report.layer}; the weights stay as they are"
        )
        progress.say(edited if holds else f"{edited}, but training since then has brought {undone}: forget anew")
        return True

    def _undone(self, earlier: AnyReport, objective: Objective, loaders: UnlearnLoaders) -> str:
        """What an earlier edit has forgotten and is there again, in words; nothing if all is still forgotten."""
        singles = earlier.unlearned if isinstance(earlier, JointReport) else dict.fromkeys(loaders.forget, earlier)
        undone = []
        for concept, parts in loaders.forget.items():
            if concept in singles:
                report, values = singles[concept], objective.about(parts).measured("forget", "val")
                for name in report.remembered(values):
                    undone.append(f"{name} back to {values[name]:.4g} (target {report.bound('forget', name, None)})")
        return ", ".join(undone)

    # ---- the edit

    def _forget(self, trainer: pl.Trainer, module: pl.LightningModule, runner: Runner) -> AnyReport:
        """Find out which edits to make."""
        loaders = self._loaders(trainer, runner)
        run = Harness(
            self.method,
            self.request,
            self.runtime,
            module,
            runner,
            loaders.forget,
            loaders.retain,
            loaders.notes,
            loaders.holdout,
            lambda objectives: near_data(self.near_retain, loaders, objectives, trainer, runner.prepare),
            progress_of(trainer),
            earlier=self.earlier,
            scales=self.scales,
            more_asked={"continue_training": self.continue_training},
        )
        report = run()
        with preserve_state(module):
            self._data = self._fingerprint(self._objective(module, runner), loaders)
        return report

    def _objective(self, module: pl.LightningModule, runner: Runner) -> Objective:
        request = self.request
        return Objective(module, {}, runner, request.forget_metric, request.retain_metric, progress_of(module.trainer).track)

    def _loaders(self, trainer: pl.Trainer, runner: Runner) -> UnlearnLoaders:
        """What a run reads, within the trainer's limits."""
        datamodule = getattr(trainer, "datamodule", None)
        forget = self.forget
        if forget is not None and not isinstance(forget, Mapping):
            forget = {concept_of(datamodule): forget}
        return as_trainer_limits(resolve_loaders(forget, self.retain, datamodule, runner.prepare), trainer)

    def _fingerprint(self, objective: Objective, loaders: UnlearnLoaders) -> str:
        """What tells the forget data from others."""
        return digest_of({}, repr([fingerprint(objective.about(parts), "forget", "val") for parts in loaders.forget.values()]))

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule, report: AnyReport, processes: Processes) -> None:
        """Edit the weights for good, tell the loggers, write the files; undo the edit if one of these fails."""
        patch, text = report.patch, report.to_text()
        named = plain_parameters(unwrap_model(module))
        before = {name: local(named[name]).clone() for name in report.tensors}
        try:
            if patch is not None:
                patch.apply(unwrap_model(module))
                if len(set(processes.all_gather_object("the edit", patch.digest))) > 1:
                    raise UnlearnError("Edits differ across ranks; do the ranks compute on different hardware?")
            self._report = report  # before the checkpoint is written, which holds it
            if processes.is_first:
                publish(report, trainer.loggers)
            asked = self.output_dir or folder_of(trainer)
            folder = processes.broadcast("the folder", None if asked is None else fresh_folder(asked))
            self._folder = folder
            if folder is not None:
                save_run(folder, report, trainer, module, processes)
            processes.all_gather_object("all is written", None)  # else the others would keep an edit that the first takes back
        except BaseException:
            self._report = None
            with torch.no_grad():  # by what this process holds: the others may not be there to help
                for name, values in before.items():
                    write_local(named[name], values)
            raise
        progress = progress_of(trainer)
        progress.say("\n" + text)
        if folder is not None:
            progress.say(f"Saved in {folder}")

"""SLUG inside a Trainer: one gradient to forget, one to keep, a searched step along one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl
import torch

from slug_lightning.datamodules.sources.loaders import UnlearnLoaders
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.distributed.processes import Processes
from slug_lightning.distributed.strategy import Runner, refuse_unsupported
from slug_lightning.errors import UnlearnError
from slug_lightning.methods.slug.pipeline import Run
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.objective import Objective, refuse_unusable_steps
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.reports.loggers import publish
from slug_lightning.reports.run_files import fresh_folder
from slug_lightning.reports.several import AnyReport, JointReport, report_from_dict
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.dtensor import local, write_local
from slug_lightning.tensors.layers import Granularity, plain_parameters
from slug_lightning.trainer.checks import folder_of, outdate_checkpoints, refuse_surroundings
from slug_lightning.trainer.limits import as_trainer_limits
from slug_lightning.trainer.previous_run import PreviousRun, digest_of_edited
from slug_lightning.trainer.progress import progress_of
from slug_lightning.trainer.report_transfer import ReportTransfer
from slug_lightning.trainer.run_folder import save_run
from slug_lightning.utils.modules import unwrap_model
from slug_lightning.utils.names import concept_of


class UnlearnCallback(pl.Callback):
    """Make the model forget when training would start, by one searched step along one layer.

    The method is SLUG (arXiv 2407.11867): the gradient of the forget loss and that of the retain loss, both at the
    weights as they are, score every layer; those on the Pareto front of importance and alignment are tried; the step
    that brings `forget_metric` to `forget_target` and costs the retain metrics least, within `retain_tolerance`, is
    kept. It is chosen on search data and reported on data that the search never saw. If no step meets both bounds the
    weights stay as they are, bit for bit. A model that holds this request's edit already, by a checkpoint or by the last fit,
    is left alone, and `report` is the one of that edit.

    Args:
        forget: what to forget: a DataLoader (or any iterable of batches), a list of them, a LightningDataModule, or a
            dict of these by the concept's name. Without it, the trainer's datamodule is asked. Several concepts get an edit
            each, as if each were asked for alone; then the sum of all is measured, and searched again where it fails.
        retain: what to keep, likewise.
        layers: shell-style pattern, or list of patterns, of the tensors that may be edited: matrices and kernels that are
            not frozen, and whatever else is named (see `slug_lightning.tensors.layers.find_layers`).
        granularity: what one edit covers: "tensor", "module" (the tensors of one submodule) or "siblings" (those of
            submodules with the same parent, such as q, k and v).
        forget_metric: name of a value that `validation_step` logs and that forgetting must bring to `forget_target`.
            Default: the module's own `forget_metric`, else the loss.
        forget_target: value at which the metric counts as forgotten: an accuracy at or below it, a loss at or above
            it. Default: the module's own `forget_target`, else chance for an accuracy, or for a loss a hundred times
            less likely data (see `slug_lightning.objective.metrics.Metric.default_target`). The report states it.
        retain_metric: name or names of logged values that must be kept. Default: the module's own, else the loss.
        retain_tolerance: how much each of them may lose: absolute for an accuracy, relative for a loss.
        max_evaluations: most evaluations for each layer on the front; and of several concepts, how often steps are changed
            for the sake of the others before any is left out.
        margin: by what share of the smallest step that forgets the step goes beyond it, so that more is forgotten of data
            that the search has not seen.
        strengths: at which the metrics are measured, besides 1, to show what more or less of each edit would do.
        on_infeasible: of several concepts, whether those without an edit within all bounds are left as they are ("skip"),
            or nothing is edited then ("stop").
        earlier: folder of an earlier run on the same model. What it has forgotten is not searched again: its edits are
            taken over, and only checked together with the new ones. All its concepts must be in `forget`, too.
        then: "stop" ends the fit before the first training batch; "continue" trains on from the edited weights
            (an infeasible run stops all the same).
        output_dir: folder for report, patch, checkpoint, weights and figures; if it holds a run already, a numbered
            one beside it. Default: the logger's folder; without a logger, or with fast_dev_run, nothing is written.
        replay: whether evaluations of an edit compute only what the edit can change (`slug_lightning.objective.replay`). The
            outcome is the same, bit for bit, without it.
        replay_budget: bytes that the outputs kept for that may take, on the device and again on the host. Default: a
            quarter of what is free when the search starts. A small budget makes the search slower.
        count_cost: whether the report's `cost` also counts floating-point operations and the bytes of live tensors, in
            every phase; this slows the run.
        retain_cache: where later requests at the same weights find what this run computes of the data to keep: a folder,
            or a `RetainCache` that several callbacks share.
        offload_gradient: whether the forget gradient waits in the host's memory while the retain gradient is computed, so
            that a device need not hold both.

    Example:
        >>> import lightning.pytorch as pl
        >>> from slug_lightning.callbacks import UnlearnCallback
        >>> callback = UnlearnCallback(retain_tolerance=0.02, layers="encoder.*")
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        forget: Any = None,
        retain: Any = None,
        *,
        layers: Union[str, list[str]] = "*",
        granularity: Granularity = "tensor",
        forget_metric: Optional[str] = None,
        forget_target: Optional[float] = None,
        retain_metric: Union[str, list[str], None] = None,
        retain_tolerance: float = 0.01,
        max_evaluations: int = 10,
        margin: float = 0.0,
        strengths: Sequence[float] = (),
        on_infeasible: Literal["skip", "stop"] = "skip",
        earlier: Optional[str] = None,
        then: Literal["stop", "continue"] = "stop",
        output_dir: Optional[str] = None,
        replay: bool = True,
        replay_budget: Optional[int] = None,
        count_cost: bool = False,
        retain_cache: Union[str, RetainCache, None] = None,
        offload_gradient: bool = False,
    ) -> None:
        if retain_tolerance < 0 or not math.isfinite(retain_tolerance):
            raise UnlearnError(f"retain_tolerance: {retain_tolerance} is no tolerance; give a number of at least 0")
        if forget_target is not None and not math.isfinite(forget_target):
            raise UnlearnError(f"forget_target: {forget_target} can never be reached; give a finite number")
        if max_evaluations < 1:
            raise UnlearnError(f"max_evaluations: {max_evaluations} leaves nothing to try; give at least 1")
        if replay_budget is not None and replay_budget < 0:
            raise UnlearnError(f"replay_budget: {replay_budget} is no number of bytes; give at least 0")
        if granularity not in ("tensor", "module", "siblings"):
            raise UnlearnError(f"granularity: {granularity!r} is not known; give 'tensor', 'module' or 'siblings'")
        if then not in ("stop", "continue"):
            raise UnlearnError(f"then: {then!r} is not known; give 'stop' or 'continue'")
        if on_infeasible not in ("skip", "stop"):
            raise UnlearnError(f"on_infeasible: {on_infeasible!r} is not known; give 'skip' or 'stop'")
        if margin < 0 or not math.isfinite(margin):
            raise UnlearnError(f"margin: {margin} is no share of a step; give a number of at least 0")
        if not all(math.isfinite(strength) for strength in strengths):
            raise UnlearnError(f"strengths: {strengths} are not all finite; give numbers such as 0.5 and 1.5")
        if isinstance(forget, Mapping) and not forget:
            raise UnlearnError("forget: the dict is empty; name at least one concept, or leave forget out")
        self.forget = forget
        self.retain = retain
        self.layers = layers
        self.granularity: Granularity = granularity
        self.forget_metric = forget_metric
        self.forget_target = forget_target
        self.retain_metric = retain_metric
        self.retain_tolerance = retain_tolerance
        self.max_evaluations = max_evaluations
        self.margin = margin
        self.strengths = strengths
        self.on_infeasible = on_infeasible
        self.earlier = earlier
        self.then = then
        self.output_dir = output_dir
        self.replay = replay
        self.replay_budget = replay_budget
        self.count_cost = count_cost
        self.retain_cache = RetainCache(retain_cache) if isinstance(retain_cache, str) else retain_cache
        self.offload_gradient = offload_gradient
        self._report: Optional[AnyReport] = None
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
        self._report = None
        if trainer.is_global_zero:
            self._transfer.fetch()  # what nobody has asked for
        self._earlier = self._last  # unless the checkpoint of this fit says otherwise

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget: here checkpoint weights are restored, and no batch has been trained on."""
        runner = Runner(trainer.strategy, trainer.state)
        with runner.processes.together():
            if not self._was_done_before(trainer, pl_module, runner):
                self._keep(trainer, pl_module, self._forget(trainer, pl_module, runner), runner.processes)
                outdate_checkpoints(trainer)
            if runner.processes.is_first and self._report is not None:
                self._transfer.leave(self._report, trainer.strategy)
        self._remember(pl_module)  # now already, as the training may be broken off
        assert self._report is not None
        if self.then == "stop" or self._report.status == "infeasible":
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if Lightning left out the training loop, and with it the edit."""
        if self._report is None:
            runner = Runner(trainer.strategy, trainer.state)
            with runner.processes.together():
                done = self._was_done_before(trainer, pl_module, runner)
            if not done:
                raise UnlearnError(
                    "Trainer(max_epochs=…): the fit ended before the edit, as this trainer, or the checkpoint of ckpt_path, "
                    "had finished its training; raise max_epochs, take a new Trainer, or load the weights instead of passing "
                    "ckpt_path"
                )
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
        names = (
            "layers",
            "granularity",
            "forget_metric",
            "forget_target",
            "retain_metric",
            "retain_tolerance",
            "margin",
            "on_infeasible",
        )
        concepts = list(self.forget) if isinstance(self.forget, Mapping) else None
        return {"concepts": concepts} | {name: getattr(self, name) for name in names}

    def asked(self) -> dict[str, Any]:
        """All that the processes of a run must have been asked alike."""
        names = ("then", "max_evaluations", "strengths", "earlier", "replay", "count_cost", "offload_gradient")
        return self._request() | {name: getattr(self, name) for name in names}

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
        if earlier is None or earlier.request != self._request() or earlier.report.status == "infeasible":
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
        if not holds and not (self.then == "continue" and same):
            return False
        self._report, self._data = earlier.report, earlier.data
        edited = (
            f"{earlier.report.concept}: unlearned already, by the edit of {earlier.report.layer}; the weights stay as they are"
        )
        progress.say(edited if holds else f"{edited}, but training since then has brought {undone}: forget anew")
        return True

    def _undone(self, report: AnyReport, objective: Objective, loaders: UnlearnLoaders) -> str:
        """What an earlier edit has forgotten and is there again, in words; nothing if all is still forgotten."""
        singles = report.unlearned if isinstance(report, JointReport) else dict.fromkeys(loaders.forget, report)
        undone = []
        for concept, parts in loaders.forget.items():
            if concept in singles:
                ((name, value),) = objective.about(parts).measured("forget", "val").items()
                target = singles[concept].bounds["forget_target"]
                if not objective.metrics[name].reaches(value, target):
                    undone.append(f"{name} back to {value:.4g} (target {target:.4g})")
        return ", ".join(undone)

    # ---- the edit

    def _forget(self, trainer: pl.Trainer, module: pl.LightningModule, runner: Runner) -> AnyReport:
        """Find out which edits to make."""
        loaders = self._loaders(trainer, runner)
        report = Run(self, module, runner, *loaders, progress_of(trainer))()
        with preserve_state(module):
            self._data = self._fingerprint(self._objective(module, runner), loaders)
        return report

    def _objective(self, module: pl.LightningModule, runner: Runner) -> Objective:
        return Objective(module, {}, runner, self.forget_metric, self.retain_metric, progress_of(module.trainer).track)

    def _loaders(self, trainer: pl.Trainer, runner: Runner) -> UnlearnLoaders:
        """What a run reads, within the trainer's limits."""
        datamodule = getattr(trainer, "datamodule", None)
        forget = self.forget
        if forget is not None and not isinstance(forget, Mapping):
            forget = {concept_of(datamodule): forget}
        return as_trainer_limits(resolve_loaders(forget, self.retain, datamodule, runner.prepare), trainer)

    def _fingerprint(self, objective: Objective, loaders: UnlearnLoaders) -> str:
        """What tells the forget data from others."""
        return digest_of({}, repr([objective.about(parts).fingerprint("forget", "val") for parts in loaders.forget.values()]))

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule, report: AnyReport, processes: Processes) -> None:
        """Edit the weights for good, tell the loggers, write the files; undo the edit if one of these fails."""
        patch = report.patch
        named = plain_parameters(unwrap_model(module))
        before = {name: local(named[name]).clone() for name in report.tensors}
        try:
            if patch is not None:
                patch.apply(unwrap_model(module))
                if len(set(processes.all_gather_object("the edit", patch.digest))) > 1:
                    raise UnlearnError("the processes have found different edits; do they compute on different hardware?")
            self._report = report  # before the checkpoint is written, which holds it
            if processes.is_first:
                publish(report, trainer.loggers)
            asked = self.output_dir or folder_of(trainer)
            folder = processes.broadcast("the folder", None if asked is None else fresh_folder(asked))
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
        progress.say("\n" + report.to_text())
        if folder is not None:
            progress.say(f"Saved in {folder}")

"""SLUG inside a Trainer: one gradient to forget, one to keep, a searched step along one layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl
import torch
from torch import Tensor

from slug_lightning.compete import Competition, recorded, stepped
from slug_lightning.cost import CostMeter, joined
from slug_lightning.datamodules.loaders import UnlearnLoaders, as_trainer_limits
from slug_lightning.datamodules.names import concept_of
from slug_lightning.datamodules.resolve import resolve_loaders
from slug_lightning.earlier import Earlier, digest_of_edited
from slug_lightning.errors import UnlearnError
from slug_lightning.gradients import NoLossError
from slug_lightning.layers import Granularity, Layer, find_layers, plain_parameters, refuse_unmovable
from slug_lightning.loggers import publish
from slug_lightning.mailbox import Mailbox
from slug_lightning.metrics import damage, refuse_infinite
from slug_lightning.modules.base import own_model
from slug_lightning.objective import Objective, refuse_unusable_steps
from slug_lightning.output import fresh_folder, save_run
from slug_lightning.patch import Edit, UnlearnPatch
from slug_lightning.precision import close_calls, rounding, rounding_errors
from slug_lightning.processes import Processes
from slug_lightning.progress import Progress
from slug_lightning.replay import Replay
from slug_lightning.report import UnlearnReport
from slug_lightning.retained import RetainCache
from slug_lightning.scores import Score, score_layers
from slug_lightning.search import Trial, best_trial
from slug_lightning.sharded import local, whole, whole_like, write_local
from slug_lightning.steps import untouched
from slug_lightning.strategies import Runner, refuse_unsupported
from slug_lightning.surroundings import folder_of, outdate_checkpoints, refuse_surroundings


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
            dict of one of these under the concept's name. Without it, the trainer's datamodule is asked.
        retain: what to keep, likewise.
        layers: shell-style pattern, or list of patterns, of the tensors that may be edited: matrices and kernels that are
            not frozen, and whatever else is named (see `slug_lightning.layers.find_layers`).
        granularity: what one edit covers: "tensor", "module" (the tensors of one submodule) or "siblings" (those of
            submodules with the same parent, such as q, k and v).
        forget_metric: name of a value that `validation_step` logs and that forgetting must bring to `forget_target`.
            Default: the module's own `forget_metric`, else the loss.
        forget_target: value at which the metric counts as forgotten: an accuracy at or below it, a loss at or above
            it. Default: the module's own `forget_target`, else chance for an accuracy, or for a loss a hundred times
            less likely data (see `slug_lightning.metrics.Metric.default_target`). The report states it.
        retain_metric: name or names of logged values that must be kept. Default: the module's own, else the loss.
        retain_tolerance: how much each of them may lose: absolute for an accuracy, relative for a loss.
        max_evaluations: most evaluations for each layer on the front.
        then: "stop" ends the fit before the first training batch; "continue" trains on from the edited weights
            (an infeasible run stops all the same).
        output_dir: folder for report, patch, checkpoint, weights and figures; if it holds a run already, a numbered
            one beside it. Default: the logger's folder; without a logger, or with fast_dev_run, nothing is written.
        replay: whether evaluations of an edit compute only what the edit can change (`slug_lightning.replay`). The
            outcome is the same, bit for bit, without it.
        replay_budget: bytes that the outputs kept for that may take, on the device and again on the host. Default: a
            quarter of what is free when the search starts. A small budget makes the search slower.
        count_cost: whether the report's `cost` also counts floating-point operations and the bytes of live tensors, in
            every phase; this slows the run.
        retain_cache: shared by the callbacks of several requests, so that the retain gradient is computed once.
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
        then: Literal["stop", "continue"] = "stop",
        output_dir: Optional[str] = None,
        replay: bool = True,
        replay_budget: Optional[int] = None,
        count_cost: bool = False,
        retain_cache: Optional[RetainCache] = None,
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
        self.concept: Optional[str] = None
        if isinstance(forget, Mapping):
            if len(forget) != 1:
                raise UnlearnError(
                    f"forget: {len(forget)} concepts were given, one run forgets one; run once for each and join the "
                    "patches with UnlearnPatch.combine"
                )
            ((self.concept, forget),) = forget.items()
        self.forget = forget
        self.retain = retain
        self.layers = layers
        self.granularity: Granularity = granularity
        self.forget_metric = forget_metric
        self.forget_target = forget_target
        self.retain_metric = retain_metric
        self.retain_tolerance = retain_tolerance
        self.max_evaluations = max_evaluations
        self.then = then
        self.output_dir = output_dir
        self.replay = replay
        self.replay_budget = replay_budget
        self.count_cost = count_cost
        self.retain_cache = retain_cache
        self.offload_gradient = offload_gradient
        self._report: Optional[UnlearnReport] = None
        self._data: Optional[str] = None
        self._last: Optional[Earlier] = None
        self._earlier: Optional[Earlier] = None
        self._mailbox = Mailbox()

    @property
    def report(self) -> Optional[UnlearnReport]:
        """What the run found out; None before it."""
        if self._report is None:
            self._report = self._mailbox.fetch()
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
            self._mailbox.fetch()  # what nobody has asked for
        self._earlier = self._last  # unless the checkpoint of this fit says otherwise

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget: here checkpoint weights are restored, and no batch has been trained on."""
        runner = Runner(trainer.strategy)
        with runner.processes.together():
            if not self._was_done_before(trainer, pl_module, runner):
                self._keep(trainer, pl_module, self._run(trainer, pl_module, runner), runner.processes)
                outdate_checkpoints(trainer)
            if runner.processes.is_first and self._report is not None:
                self._mailbox.leave(self._report, trainer.strategy)
        self._remember(pl_module)  # now already, as the training may be broken off
        assert self._report is not None
        if self.then == "stop" or self._report.status == "infeasible":
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if Lightning left out the training loop, and with it the edit."""
        if self._report is None:
            runner = Runner(trainer.strategy)
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
        report = UnlearnReport.from_dict(state_dict["report"])
        self._earlier = Earlier(report, state_dict["request"], state_dict.get("data"))

    def _request(self) -> dict[str, Any]:
        """What this callback was asked to do, as far as plain data can say it."""
        names = (
            "concept",
            "layers",
            "granularity",
            "forget_metric",
            "forget_target",
            "retain_metric",
            "retain_tolerance",
        )
        return {name: getattr(self, name) for name in names}

    def _remember(self, module: pl.LightningModule) -> None:
        """Let the next fit know what was done in this one, and to which weights it led."""
        assert self._report is not None
        self._last = Earlier(self._report, self._request(), self._data, digest_of_edited(module, self._report))

    def _was_done_before(self, trainer: pl.Trainer, module: pl.LightningModule, runner: Runner) -> bool:
        """Take over the report of an earlier fit, or of the checkpoint, if the model holds the edit that it speaks of.

        That the same was asked for is not enough, as the data may be others: the forget metric must be where the earlier
        edit has brought it. Training since may have moved it, which is no reason to edit again; then the data decide.
        """
        earlier = self._earlier
        if earlier is None or earlier.request != self._request() or earlier.report.status != "unlearned":
            return False
        progress = Progress.of(trainer)
        with untouched(module):
            objective = self._objective(module, self._loaders(trainer, runner), runner, progress)
            same_data = objective.fingerprint("forget", "val") == earlier.data
            same_weights = earlier.weights in (None, digest_of_edited(module, earlier.report))
            same = runner.processes.agreed("an earlier edit", same_data and same_weights)
            ((name, value),) = objective.measured("forget", "val").items()
            target = earlier.report.bounds["forget_target"]
            holds = objective.metrics[name].reaches(value, target)
        if not holds and not (self.then == "continue" and same):
            return False
        self._report, self._data = earlier.report, earlier.data
        edited = (
            f"{earlier.report.concept}: unlearned already, by the edit of {earlier.report.layer}; the weights stay as they are"
        )
        undone = f", but training since then has brought {name} back to {value:.4g} (target {target:.4g}): forget anew"
        progress.say(edited if holds else edited + undone)
        return True

    # ---- the run, in order

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, runner: Runner) -> UnlearnReport:
        """Validate, measure, choose, search, report; the weights are as they were when this returns or raises."""
        progress = Progress.of(trainer)
        meter = CostMeter(module.device, self.count_cost and not runner.is_sharded)
        with untouched(module):
            runner.reshard()
            loaders = self._loaders(trainer, runner)
            layers = find_layers(module, self.layers, self.granularity, getattr(module, "towers", None))
            objective = self._objective(module, loaders, runner, progress)
            self._refuse_different(objective, layers)
            objective.refuse_different_data()
            self._data = objective.fingerprint("forget", "val")
            (concept,) = loaders.forget
            report = UnlearnReport("infeasible", concept)
            report.notes = loaders.notes + runner.notes()
            report.versions = {name: version(name) for name in ("slug-lightning", "lightning", "torch")}
            with meter.phase("validate"):
                self._validate(objective, report)
            errors = {}
            if trainer.precision.endswith("-mixed"):
                with meter.phase("rounding"):
                    errors = self._rounding_errors(objective, layers, report)
            with meter.phase("gradients"):
                scores, gradient = self._measure(objective, layers)
            report.scores = [asdict(score) for score in scores]
            front = [score for score in scores if score.on_front]
            by_name = {layer.name: layer for layer in layers if layer.name in {score.layer for score in front}}
            if runner.processes.in_step and not runner.is_sharded:
                report.notes.append("replay: off, as the module communicates in its steps; every evaluation was computed whole")
            elif self.replay and not runner.is_sharded:
                objective.replay = Replay(module, list(by_name.values()), self.replay_budget)
            with meter.phase("search"):
                trials, error = self._search(objective, report, front, by_name, gradient, progress)
            best = best_trial(trials)
            report.notes += close_calls(trainer.precision, scores, errors, trials, best, error)
            with meter.phase("report"):
                self._conclude(objective, report, by_name[best.layer] if best else None, best, gradient)
            report.cost = joined(runner.processes.exchange("cost", meter.report())) | {
                "evaluations": len(trials),
                "forward_samples": objective.forward_samples,
                "backward_samples": objective.backward_samples,
            }
            if objective.replay:
                report.cost["replay"] = runner.processes.agreed("replay", objective.replay.report())
                report.notes += dict.fromkeys(itertools.chain(*runner.processes.exchange("notes", objective.replay.notes())))
        return report

    def _loaders(self, trainer: pl.Trainer, runner: Runner) -> UnlearnLoaders:
        """What a run reads, within the trainer's limits."""
        datamodule = getattr(trainer, "datamodule", None)
        forget = None if self.forget is None else {self.concept or concept_of(datamodule): self.forget}
        return as_trainer_limits(resolve_loaders(forget, self.retain, datamodule, runner.prepare), trainer)

    def _objective(self, module: pl.LightningModule, loaders: UnlearnLoaders, runner: Runner, progress: Progress) -> Objective:
        (forget,) = loaders.forget.values()
        return Objective(
            module,
            {"forget": forget, "retain": loaders.retain},
            runner,
            self.forget_metric,
            self.retain_metric,
            progress.track,
        )

    def _refuse_different(self, objective: Objective, layers: list[Layer]) -> None:
        """Refuse, in all processes, that one of them was asked for something else: later they would wait for each other."""
        own = self._request() | {"metrics": objective.names}
        own |= {name: getattr(self, name) for name in ("then", "max_evaluations", "replay", "count_cost", "offload_gradient")}
        own["layers that may be edited"] = [layer.name for layer in layers]
        asked = objective.processes.exchange("the request", own)
        if different := [name for name in own if any(other[name] != asked[0][name] for other in asked)]:
            raise UnlearnError(f"{', '.join(different)}: the processes were asked for different things; give the same in each")

    def _validate(self, objective: Objective, report: UnlearnReport) -> None:
        """Measure before the edit what decides, settle the target, and refuse what is forgotten already or not finite."""
        report.search_before = {"forget": objective.measured("forget", "val")}
        refuse_infinite("forget", report.search_before["forget"])
        ((name, before),) = report.search_before["forget"].items()
        metric = objective.metrics[name]
        target, reason = self.forget_target, "given"
        if target is None:
            target, reason = getattr(objective.module, "forget_target", None), "the module's own"
        if target is None:
            target, reason = metric.default_target(before)
        target, reason = objective.processes.agreed("target", (target, reason))
        if metric.reaches(before, target):
            raise UnlearnError(
                f"forget_target: nothing to forget, {name} is {before:.4g} on the search data and meets the target of "
                f"{target:.4g} ({reason}) already; look at the forget data, or give a stricter forget_target"
            )
        objective.rehearse()
        report.bounds = {
            "forget_metric": name,
            "forget_target": target,
            "forget_target_reason": reason,
            "retain_metrics": objective.names["retain"],
            "retain_tolerance": self.retain_tolerance,
            "higher_is_better": {m.name: m.higher_is_better for m in objective.metrics.values()},
        }

    def _rounding_errors(
        self, objective: Objective, layers: list[Layer], report: UnlearnReport
    ) -> dict[str, tuple[float, float]]:
        """How far off a mixed precision puts the scores, on half a batch; where that cannot be told, a note says so."""
        parameters = {name: p for layer in layers for name, p in layer.parameters.items()}

        def scores(exact: bool) -> list[Score]:
            forget = self._waiting(objective.sample_gradient("forget", parameters, exact))
            retain = objective.sample_gradient("retain", parameters, exact)
            return score_layers(layers, forget, retain, objective.processes)

        try:
            return rounding_errors(scores(exact=True), scores(exact=False))
        except Exception as error:
            # What fails in one of several processes must fail in all.
            if objective.processes.count > 1 and not isinstance(error, NoLossError):
                raise
            report.notes.append(f"precision: how much rounding matters could not be told ({error})")
            return {}

    def _measure(self, objective: Objective, layers: list[Layer]) -> tuple[list[Score], dict[str, Tensor]]:
        """Both gradients, the scores, the fronts; of the gradients only what a front layer needs is kept."""
        parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
        forget = self._waiting(objective.gradient("forget", parameters).tensors)
        retain = self._retain_gradient(objective, parameters)
        scores = score_layers(layers, forget, retain, objective.processes)
        del retain  # before the few that are needed are copied
        if not scores:
            refuse_unmovable(layers)
        chosen = {score.layer for score in scores if score.on_front}
        # Copies: the gradients lie in one piece, which would be kept for the sake of a few.
        return scores, {name: forget[name].clone() for layer in layers if layer.name in chosen for name in layer.parameters}

    def _waiting(self, forget: dict[str, Tensor]) -> dict[str, Tensor]:
        """The forget gradient where it waits for the retain gradient."""
        return {name: tensor.cpu() for name, tensor in forget.items()} if self.offload_gradient else forget

    def _retain_gradient(self, objective: Objective, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computed, or the one that an earlier request left in the cache."""

        def compute() -> dict[str, Tensor]:
            return objective.gradient("retain", parameters).tensors

        if self.retain_cache is None:
            return compute()
        trainer = objective.module.trainer
        source = trainer.datamodule if self.retain is None else self.retain  # type: ignore[attr-defined]
        limit = trainer.limit_train_batches
        how = trainer.precision, str(objective.module.device), concept_of(source), repr(limit)  # 1 is one batch, 1.0 all
        return self.retain_cache.gradient(objective.module, source, how, list(parameters), compute)

    def _search(
        self,
        objective: Objective,
        report: UnlearnReport,
        front: list[Score],
        layers: Mapping[str, Layer],
        gradient: Mapping[str, Tensor],
        progress: Progress,
    ) -> tuple[list[Trial], float]:
        """Let the layers of the front compete; gives the trials, and how far off rounding may put their damage."""
        competition = Competition(
            objective,
            layers,
            gradient,
            target=report.bounds["forget_target"],
            before=report.search_before["forget"][report.bounds["forget_metric"]],
            tolerance=self.retain_tolerance,
            max_evaluations=self.max_evaluations,
            progress=progress,
            unit=rounding(objective.module.trainer.precision),
        )
        trials, report.search_before["retain"] = competition.run(front)
        refuse_infinite("retain", report.search_before["retain"])
        report.trace = [asdict(trial) for trial in trials]
        return trials, competition.error

    def _conclude(
        self, objective: Objective, report: UnlearnReport, layer: Layer | None, best: Trial | None, gradient: Mapping[str, Tensor]
    ) -> None:
        """Measure the chosen step on report data and make the patch; without one, say that nothing changed."""
        if layer is None or best is None:
            report.before = {kind: objective.measured(kind, "test") for kind in ("forget", "retain")}
            report.after, report.search_after = report.before, report.search_before
            return
        for kind in ("forget", "retain"):
            with recorded(objective, kind, "test", [layer]) as report.before[kind], stepped(layer, gradient, best.step):
                report.after[kind] = objective.measured(kind, "test", edited=layer.name)
        ((name, after),) = report.after["forget"].items()
        lost = damage(objective.metrics_of("retain"), report.before["retain"], report.after["retain"], self.retain_tolerance)
        report.holds = objective.metrics[name].reaches(after, report.bounds["forget_target"]) and lost <= 1
        report.search_after = {"forget": {name: best.forget}, "retain": best.retain or {}}
        report.status = "unlearned"
        report.layer, report.step_size, report.relative_step = layer.name, best.step, best.relative_step
        prefix = "" if own_model(objective.module) is objective.module else "model."
        named = {name.removeprefix(prefix): name for name in layer.parameters}
        report.tensors = list(named)
        details = {"layer": layer.name, "relative_step": best.relative_step, "before": report.before, "after": report.after}
        base = {short: whole(layer.parameters[name]).cpu().clone() for short, name in named.items()}
        directions = {short: whole_like(gradient[name], layer.parameters[name]).cpu() for short, name in named.items()}
        report.patch = UnlearnPatch(base, [Edit(report.concept, best.step, directions, details)])
        report.patch_digest = report.patch.digest

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule, report: UnlearnReport, processes: Processes) -> None:
        """Edit the weights for good, tell the loggers, write the files; undo the edit if one of these fails."""
        patch = report.patch
        named = plain_parameters(own_model(module))
        before = {name: local(named[name]).clone() for name in report.tensors}
        try:
            if patch is not None:
                patch.apply(own_model(module))
                if len(set(processes.exchange("the edit", patch.digest))) > 1:
                    raise UnlearnError("the processes have found different edits; do they compute on different hardware?")
            self._report = report  # before the checkpoint is written, which holds it
            if processes.is_first:
                publish(report, trainer.loggers)
            asked = self.output_dir or folder_of(trainer)
            folder = processes.agreed("the folder", None if asked is None else fresh_folder(asked))
            if folder is not None:
                save_run(folder, report, trainer, module, processes)
            processes.exchange("all is written", None)  # else the others would keep an edit that the first takes back
        except BaseException:
            self._report = None
            with torch.no_grad():  # by what this process holds: the others may not be there to help
                for name, values in before.items():
                    write_local(named[name], values)
            raise
        progress = Progress.of(trainer)
        progress.say("\n" + report.to_text())
        if folder is not None:
            progress.say(f"Saved in {folder}")

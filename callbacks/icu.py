"""ICU inside a Trainer: after each epoch every passage is completed, forgotten ones rest, and training stops when all is done."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, Optional

import lightning.pytorch as pl

from slug_lightning.distributed.strategy import Runner, refuse_unsupported
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.criteria import BleuBelow, Bound, Criterion
from slug_lightning.methods.icu.examination import Examiner, Finding, Refinement, means_of
from slug_lightning.modules.causal_lm import CausalLMModule
from slug_lightning.reports.passages import PassagesReport, samples_table
from slug_lightning.reports.run_files import fresh_folder
from slug_lightning.trainer.checks import folder_of, refuse_surroundings
from slug_lightning.trainer.progress import progress_of
from slug_lightning.trainer.run_folder import save_passages

MA, EL = "memorization_accuracy", "extraction_likelihood"


class ICUCallback(pl.Callback):
    """Watch a language model forget passages, let forgotten ones rest, and stop when all is done.

    The method is Iterative Contrastive Unlearning (arXiv 2407.20271). The loss belongs to the module
    (`slug_lightning.modules.CausalLMModule`), the passages and their pairs to the datamodule
    (`slug_lightning.datamodules.PassageDataModule`). After each epoch, this callback completes every passage from its prefix and
    compares it with its truth: passages that are `forgotten` rest, and return as soon as they are remembered again. Training
    ends when all of `stop` is reached, or no passage is remembered. The baselines run under the same callback, with
    `refine=False`.

    Args:
        forgotten: criteria, of which one is enough to call a passage forgotten. Default: its completion has a BLEU below 0.01.
        refine: whether forgotten passages rest.
        stop: metrics of the passages ("memorization_accuracy", "extraction_likelihood", or the name of a criterion), whose means
            must all fall to a number, or to the level of the original model on passages that it has never seen ("unseen").
            Default: accuracy and likelihood at the level of unseen passages.
        n: length of the n-grams of the extraction likelihood, in tokens.
        prefixes: from how many prefixes of each passage the likelihood is estimated for the thresholds and after each epoch: 1,
            from the one that is completed anyway; several, evenly spaced. The report has it from all prefixes.
        samples: how many completions to show before and after.
        batch_size: sequences that are completed at once.
        output_dir: folder for report, weights, checkpoint and figures; if it holds a run already, a numbered one next to it.
            Default: the logger's folder; without a logger, or with fast_dev_run, nothing is written.

    Example:
        >>> from slug_lightning.callbacks import ICUCallback
        >>> callback = ICUCallback(stop={"memorization_accuracy": 0.5994, "extraction_likelihood": 0.0499})
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        *,
        forgotten: Optional[list[Criterion]] = None,
        refine: bool = True,
        stop: Optional[dict[str, Bound]] = None,
        n: int = 10,
        prefixes: int = 1,
        samples: int = 8,
        batch_size: int = 64,
        output_dir: Optional[str] = None,
    ) -> None:
        self.refine, self.n, self.prefixes, self.samples, self.batch_size = refine, n, prefixes, samples, batch_size
        for name, least in (("n", 1), ("prefixes", 1), ("batch_size", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise UnlearnError(f"{name} must be >= {least}, got {getattr(self, name)}")
        self.forgotten: list[Criterion] = [BleuBelow(0.01)] if forgotten is None else forgotten
        self.stop: dict[str, Bound] = {MA: "unseen", EL: "unseen"} if stop is None else dict(stop)
        known = {MA, EL, *(criterion.name for criterion in self.forgotten)}
        if unknown := self.stop.keys() - known:
            raise UnlearnError(f"stop: unknown metric {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
        for name, below in self.stop.items():
            if below != "unseen" and not (isinstance(below, (int, float)) and math.isfinite(below)):
                raise UnlearnError(f"stop: {name} must be a finite number or 'unseen', got {below!r}")
        if len({criterion.name for criterion in self.forgotten}) < len(self.forgotten):
            raise UnlearnError("forgotten: two criteria bound the same metric, so the stricter one has no effect; remove it")
        if not self.stop and not (refine and self.forgotten):
            raise UnlearnError("stop: without a metric here, and without resting passages, nothing would end the training")
        self.output_dir = output_dir
        self.report: Optional[PassagesReport] = None
        self._loaded: dict[str, Any] = {}

    # ---- Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is computed."""
        if stage != "fit":
            return
        self._loaded = {}
        refuse_unsupported(trainer.strategy)
        refuse_surroundings(trainer)
        if not isinstance(pl_module, CausalLMModule):
            raise UnlearnError(f"model must be a CausalLMModule, got {type(pl_module).__name__}; wrap the language model in one")
        if pl_module.tokenizer is None:
            raise UnlearnError("tokenizer: the module has none, which completions need; give CausalLMModule(tokenizer=…)")
        limits: Any = trainer  # options that do not work with epochs that get shorter
        if not limits.fast_dev_run and limits.limit_train_batches != 1.0:
            raise UnlearnError("Trainer(limit_train_batches=…): epochs would leave out passages; give fewer to forget instead")
        if self.refine and isinstance(limits.val_check_interval, int) and limits.check_val_every_n_epoch is not None:
            raise UnlearnError("Trainer(val_check_interval=…) must be a fraction, as 0.5: epochs get shorter as passages rest")
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "forget_passages"):
            raise UnlearnError("datamodule: got no passages; fit with a PassageDataModule")
        wanted = [*self.stop.values(), *(criterion.below for criterion in self.forgotten)]
        if "unseen" in wanted and not data.unseen_passages:
            raise UnlearnError(
                "unseen: a threshold is 'unseen', but the datamodule has no unseen passages; give it unseen=…, or numbers here"
            )
        self.report = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the original model, or restore what a checkpoint says of it."""
        assert isinstance(pl_module, CausalLMModule)
        runner = Runner(trainer.strategy, trainer.state)
        with runner.processes.together():
            self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._progress = progress_of(trainer)
            self._examiner = Examiner(
                pl_module, runner, self._data.prefix, self.forgotten, self.n, self.batch_size, self._progress
            )
            self._refinement = Refinement(len(self._data.forget_passages), self.refine)
            self._clock = _Clock()
            self._other: Optional[float] = None
            if self._loaded:
                self._resume(trainer, pl_module)
            else:
                self.report = PassagesReport("unfinished", type(pl_module.lm_loss).__name__, decided=list(self.stop))
                self._clock.start("report")
                self.report.before, self._first = self._measure()
                self.report.thresholds, self.report.bounds = self._bounds()
                self._clock.start(None)
                self._judge(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start("training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_in_a_fit(trainer):
            self._clock.start("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the perplexity of other text for this epoch's entry in the trace."""
        if _is_in_a_fit(trainer):
            found = trainer.callback_metrics.get("perplexity")
            self._other = None if found is None else float(found)
            self._clock.start("training")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete every passage, let forgotten ones rest, and stop if all is done."""
        with self._examiner.processes.together():
            self._clock.start("validation")
            self._refinement.trained()
            self._judge(trainer)
            self._clock.start(None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the trained model, send the report to the loggers, write the files."""
        assert self.report is not None and isinstance(pl_module, CausalLMModule)
        with self._examiner.processes.together():
            self._clock.start("report")
            self.report.after, last = self._measure()
            self._clock.start(None)
            self._conclude(pl_module, last)
            _publish(self.report, trainer.loggers)
            asked = self.output_dir or folder_of(trainer)
            folder = self._examiner.processes.broadcast("the folder", None if asked is None else fresh_folder(asked))
            if folder is not None:
                save_passages(folder, self.report, trainer, pl_module, self._examiner.processes)
            self._progress.say("\n" + self.report.to_text())
            if folder is not None:
                self._progress.say(f"Saved in {folder}")

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, as plain data: each passage's status, the original's measurements, and the trace."""
        if self.report is None:
            return {}
        return {
            "report": self.report.to_dict(),
            "passages": self._refinement.to_list(),
            "first": self._first,
            "other": self._other,
            "seconds": dict(self._clock.seconds),
            "digest": self._data.digest,
            "asked": self._asked(self.report.method),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from there with the next fit."""
        self._loaded = state_dict

    # ---- what happens in them

    def _resume(self, trainer: pl.Trainer, module: CausalLMModule) -> None:
        """Restore from a checkpoint the original's measurements and the status of every passage.

        If it was saved within an epoch, Lightning ends that epoch first, after which passages are examined as usual.
        """
        loaded, self._loaded = self._loaded, {}
        if loaded["digest"] != self._data.digest:
            raise UnlearnError("datamodule: the checkpoint is of a run on other passages; give those, or fit without ckpt_path")
        asked = self._asked(type(module.lm_loss).__name__)
        if changed := [name for name, value in asked.items() if loaded["asked"][name] != value]:
            raise UnlearnError(f"{', '.join(changed)} differ from the checkpoint's run; give the same, or fit without ckpt_path")
        self.report = PassagesReport.from_dict(loaded["report"])
        self._refinement.restore(loaded["passages"])
        self._first, self._other = loaded["first"], loaded["other"]
        self._clock.seconds |= loaded["seconds"]
        self._data.active = self._refinement.active
        if self.report.status == "unlearned":
            trainer.should_stop = True

    def _asked(self, loss: str) -> dict[str, Any]:
        """The settings that a resumed run must share, as plain data."""
        shared = {name: getattr(self, name) for name in ("stop", "n", "prefixes", "refine")}
        return {"loss": loss, "forgotten": {criterion.name: criterion.below for criterion in self.forgotten}} | shared

    def _measure(self) -> tuple[dict[str, dict[str, float]], list[Finding]]:
        """Means over the forget set and unseen passages, and the perplexity of other text; and the forget set's findings."""
        forget = self._examiner.of(self._data.forget_passages, None, "passages to forget")
        means = {"forget": means_of(forget)}
        if self._data.unseen_passages:
            means["unseen"] = means_of(self._examiner.of(self._data.unseen_passages, None, "unseen passages"))
        means["other"] = {"perplexity": self._examiner.perplexity(self._data.test_dataloader())}
        return means, forget

    def _bounds(self) -> tuple[dict[str, float], dict[str, float]]:
        """The thresholds of the means that stop the training, and of the values that let a passage rest.

        "unseen" becomes the original model's mean over unseen passages, measured as after an epoch.
        """
        resting = {criterion.name: criterion.below for criterion in self.forgotten}
        unseen: dict[str, float] = {}
        if "unseen" in [*self.stop.values(), *resting.values()]:
            unseen = means_of(self._examiner.of(self._data.unseen_passages, self.prefixes, "unseen passages"))

        def levels(asked: dict[str, Bound]) -> dict[str, float]:
            return {name: unseen[name] if below == "unseen" else float(below) for name, below in asked.items()}

        return levels(self.stop), levels(resting)

    def _judge(self, trainer: pl.Trainer) -> None:
        """Examine the passages to forget, log and record what is found, and stop where all is done."""
        report = self.report
        assert report is not None
        found, epoch = self._examiner.of(self._data.forget_passages, self.prefixes), len(report.trace)
        trained = len(self._refinement.active) if epoch else 0
        verdicts = [c.forgotten([f["values"][c.name] for f in found], report.bounds[c.name]) for c in self.forgotten]
        self._refinement.update([any(of_one) for of_one in zip(*verdicts, strict=True)] if verdicts else [False] * len(found))
        self._data.active = self._refinement.active
        means = means_of(found)
        counts = {"trained": trained, "remembered": len(self._refinement.remembered)}
        numbers: dict[str, Any] = counts | means | {"other_perplexity": self._other}
        self._other = None
        report.trace.append({"epoch": epoch, "step": trainer.global_step} | numbers)
        reason = ""
        if self.refine and not self._refinement.active:
            reason = "every passage is forgotten"
        elif self.stop and all(means[name] <= report.thresholds[name] for name in self.stop):
            reason = f"{' and '.join(self.stop)} have reached their thresholds"
        if reason:
            report.status, report.reason = "unlearned", reason
            trainer.should_stop = True
        shown = {f"passages/{name}": value for name, value in numbers.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=trainer.global_step)

    def _conclude(self, module: CausalLMModule, last: list[Finding]) -> None:
        """Fill in the rest of the report."""
        report = self.report
        assert report is not None
        pairs = list(zip(self._first, last, strict=True))
        report.passages = [
            {"number": i, **status}
            | {when: {name: found[name] for name in (MA, EL, "bleu")} for when, found in (("before", was), ("after", now))}
            | {"values": now["values"]}
            for i, (status, (was, now)) in enumerate(zip(self._refinement.to_list(), pairs, strict=True))
        ]
        report.samples = [
            {"prompt": was["prefix"], "truth": was["truth"], "before": was["completion"], "after": now["completion"]}
            for was, now in pairs[: self.samples]
        ]
        if report.status == "unfinished":
            report.reason = f"the training ended after {len(report.trace) - 1} epochs, before all was forgotten"
        seconds = self._clock.seconds
        report.cost = {
            "seconds": seconds,
            "ratio of validation to training": seconds["validation"] / seconds["training"] if seconds["training"] else None,
            "passages trained on": sum(entry["trained"] for entry in report.trace),
            "reference": module.reference.memory() if module.reference is not None else {},
        }
        report.notes = list(self._data.notes.values())
        report.versions = {name: version(name) for name in ("slug-lightning", "lightning", "torch", "transformers")}


def _publish(report: PassagesReport, loggers: Iterable[Any]) -> None:
    """Send the report to the loggers: scalars to all; figures, completions and table to TensorBoard."""
    for logger in loggers:
        for when, measured in (("before", report.before), ("after", report.after)):
            logger.log_metrics(
                {f"{when}/{texts}_{name}": v for texts, values in measured.items() for name, v in values.items()}, step=0
            )
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_figure"):
            for name, figure in report.figures().items():
                writer.add_figure(f"unlearn/{name}", figure)
            writer.add_text("unlearn/completions", samples_table(report.samples))
            writer.add_text("unlearn/report", f"<pre>{report.to_text()}</pre>")
        logger.save()


def _is_in_a_fit(trainer: pl.Trainer) -> bool:
    """Whether validation runs within a fit: neither by itself (`trainer.validate`) nor as a sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


class _Clock:
    """Seconds by phase: one phase at a time, until another one starts."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "validation": 0.0, "report": 0.0}
        self._current: Optional[str] = None
        self._since = 0.0

    def start(self, phase: Optional[str]) -> None:
        """Count for this phase from now on (None: for none)."""
        now = time.perf_counter()
        if self._current is not None:
            self.seconds[self._current] += now - self._since
        self._current, self._since = phase, now

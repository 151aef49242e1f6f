"""ICU inside a Trainer: after each epoch every passage is completed; what is forgotten rests, and at the right time all stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal, Optional, Union

import lightning.pytorch as pl

from slug_lightning.distributed.strategy import Runner, refuse_unsupported
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.criteria import BleuBelow, Criterion
from slug_lightning.methods.icu.examination import Examiner, Finding, means_of
from slug_lightning.methods.icu.refinement import Refinement
from slug_lightning.modules.causal_lm import CausalLMModule
from slug_lightning.reports.passages import PassagesReport, samples_table
from slug_lightning.reports.run_files import fresh_folder
from slug_lightning.trainer.checks import folder_of, refuse_surroundings
from slug_lightning.trainer.progress import progress_of
from slug_lightning.trainer.run_folder import save_passages

MA, EL = "memorization_accuracy", "extraction_likelihood"
Below = Union[float, Literal["unseen"]]


class ICUCallback(pl.Callback):
    """Watch a language model forget passages, let those rest that are forgotten, and stop when all is done.

    The method is Iterative Contrastive Unlearning (arXiv 2407.20271): the losses are the module's
    (`slug_lightning.modules.CausalLMModule`), the passages and their pairs the datamodule's
    (`slug_lightning.datamodules.PassageDataModule`), and what comes after each epoch is this callback's: every passage is
    completed from its prefix and compared with its truth; by `forgotten` it is told whether it rests, and it returns as soon
    as it is remembered again. Training ends when all of `stop` is reached, or nothing is remembered any more. The baselines
    run under the same callback, with `refine=False`.

    Args:
        forgotten: criteria, of which one is enough to call a passage forgotten. Default: its completion has a BLEU below 0.01.
        refine: whether forgotten passages rest.
        stop: metrics of the passages ("memorization_accuracy", "extraction_likelihood", or the name of a criterion), whose means
            must all fall below a number, or below what the original model shows on passages that it has never seen
            ("unseen"). Default: accuracy and likelihood below those of unseen passages.
        n: length of the n-grams of the extraction likelihood, in tokens.
        prefixes: from how many prefixes of each passage the likelihood is estimated for the thresholds and after each epoch: 1,
            from the one that is completed anyway; several, evenly spaced. The report has it from all prefixes.
        samples: how many completions are shown before and after.
        batch_size: sequences that are completed at once.
        output_dir: folder for report, weights, checkpoint and figures; if it holds a run already, a numbered one beside it.
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
        stop: Optional[dict[str, Below]] = None,
        n: int = 10,
        prefixes: int = 1,
        samples: int = 8,
        batch_size: int = 64,
        output_dir: Optional[str] = None,
    ) -> None:
        for name, value in (("n", n), ("prefixes", prefixes), ("batch_size", batch_size)):
            if value < 1:
                raise UnlearnError(f"{name}: {value} is too small; give at least 1")
        if samples < 0:
            raise UnlearnError(f"samples: {samples} completions cannot be shown; give at least 0")
        self.forgotten: list[Criterion] = [BleuBelow(0.01)] if forgotten is None else forgotten
        self.stop: dict[str, Below] = {MA: "unseen", EL: "unseen"} if stop is None else dict(stop)
        known = {MA, EL, *(criterion.name for criterion in self.forgotten)}
        if unknown := self.stop.keys() - known:
            raise UnlearnError(f"stop: {', '.join(sorted(unknown))} is not known; give some of {', '.join(sorted(known))}")
        for name, below in self.stop.items():
            if below != "unseen" and not (isinstance(below, (int, float)) and math.isfinite(below)):
                raise UnlearnError(f"stop: {name} can never fall below {below!r}; give a finite number, or 'unseen'")
        if len({criterion.name for criterion in self.forgotten}) < len(self.forgotten):
            raise UnlearnError("forgotten: two criteria bound the same; the stricter one has no say, leave it out")
        if not self.stop and not (refine and self.forgotten):
            raise UnlearnError("stop: without a metric, and without passages that rest, nothing would end the training")
        self.refine = refine
        self.n = n
        self.prefixes = prefixes
        self.samples = samples
        self.batch_size = batch_size
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
            raise UnlearnError(f"model: {type(pl_module).__name__} is no CausalLMModule; wrap the language model in one")
        if pl_module.tokenizer is None:
            raise UnlearnError(
                "tokenizer: the model has none, so that completions have no text; give CausalLMModule(tokenizer=…)"
            )
        _refuse_limits(trainer, self.refine)
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "forget_passages"):
            raise UnlearnError("datamodule: it serves no passages; fit with a PassageDataModule")
        wanted = [*self.stop.values(), *(criterion.below for criterion in self.forgotten)]
        if "unseen" in wanted and not data.unseen_passages:
            raise UnlearnError(
                "unseen: a threshold is that of unseen passages, and the datamodule has none; give it unseen=…, or numbers "
                "as thresholds"
            )
        self.report = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the original model, or take over what a checkpoint says of it."""
        assert isinstance(pl_module, CausalLMModule)
        runner = Runner(trainer.strategy, trainer.state)
        with runner.processes.together():
            self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._progress = progress_of(trainer)
            self._examiner = Examiner(
                pl_module, runner, self._data.prefix, self.forgotten, self.n, self.batch_size, self._progress
            )
            self._refinement = Refinement(len(self._data.forget_passages), self.refine)
            self._clock = Clock()
            self._other: Optional[float] = None
            if self._loaded:
                self._go_on(trainer, pl_module)
            else:
                self.report = PassagesReport("unfinished", type(pl_module.lm_loss).__name__, decided=list(self.stop))
                with self._clock.phase("report"):
                    self.report.before, self._first = self._measure()
                    self.report.thresholds, self.report.bounds = self._bounds()
                self._judge(trainer, self._examine())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start("training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_in_a_fit(trainer):
            self._clock.start("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation within an epoch is no training; what it found of other text belongs to the epoch."""
        if _is_in_a_fit(trainer):
            found = trainer.callback_metrics.get("perplexity")
            self._other = None if found is None else float(found)
            self._clock.start("training")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete every passage, compare, let rest, and stop if all is forgotten."""
        with self._examiner.processes.together(), self._clock.phase("validation"):
            self._refinement.trained()
            self._judge(trainer, self._examine())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what has become of it, tell the loggers, write the files."""
        assert self.report is not None and isinstance(pl_module, CausalLMModule)
        with self._examiner.processes.together():
            with self._clock.phase("report"):
                self.report.after, last = self._measure()
            self._conclude(pl_module, last)
            self._publish(trainer)
            asked = self.output_dir or folder_of(trainer)
            folder = self._examiner.processes.broadcast("the folder", None if asked is None else fresh_folder(asked))
            if folder is not None:
                save_passages(folder, self.report, trainer, pl_module, self._examiner.processes)
            self._progress.say("\n" + self.report.to_text())
            if folder is not None:
                self._progress.say(f"Saved in {folder}")

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, as plain data: each passage's status, what the original did, and the trace."""
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
        """Go on from there with the next fit."""
        self._loaded = state_dict

    # ---- what happens in them

    def _go_on(self, trainer: pl.Trainer, module: CausalLMModule) -> None:
        """Take over from a checkpoint what the original model did, and the status of every passage.

        Of one that was saved within an epoch, Lightning ends the epoch first, so that its passages are looked at as ever.
        """
        loaded, self._loaded = self._loaded, {}
        if loaded["digest"] != self._data.digest:
            raise UnlearnError(
                "datamodule: the checkpoint belongs to other passages; give the same ones, or fit without ckpt_path"
            )
        asked = self._asked(type(module.lm_loss).__name__)
        if changed := [name for name, value in asked.items() if loaded["asked"][name] != value]:
            raise UnlearnError(
                f"{', '.join(changed)}: the checkpoint belongs to a run with others; give the same, or fit without ckpt_path"
            )
        self.report = PassagesReport.from_dict(loaded["report"])
        self._refinement.restore(loaded["passages"])
        self._first, self._other = loaded["first"], loaded["other"]
        self._clock.seconds |= loaded["seconds"]
        self._data.active = self._refinement.active
        if self.report.status == "unlearned":
            trainer.should_stop = True

    def _asked(self, loss: str) -> dict[str, Any]:
        """What is descended, and by what is judged, as plain data."""
        forgotten = {criterion.name: criterion.below for criterion in self.forgotten}
        return {
            "loss": loss,
            "forgotten": forgotten,
            "stop": self.stop,
            "n": self.n,
            "prefixes": self.prefixes,
            "refine": self.refine,
        }

    def _examine(self) -> list[Finding]:
        """Each passage to forget, as it is now."""
        return self._examiner.of(self._data.forget_passages, self.prefixes)

    def _measure(self) -> tuple[dict[str, dict[str, float]], list[Finding]]:
        """Means over the passages to forget, those never seen, and the perplexity of other text; and each of the first."""
        forget = self._examiner.of(self._data.forget_passages, None, "passages to forget")
        means = {"forget": means_of(forget)}
        if self._data.unseen_passages:
            means["unseen"] = means_of(self._examiner.of(self._data.unseen_passages, None, "unseen passages"))
        means["other"] = {"perplexity": self._examiner.perplexity(self._data.test_dataloader())}
        return means, forget

    def _bounds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of the means that stop the training, and of the values that let a passage rest.

        Numbers as they were given, and of unseen passages what the original model shows on them, measured as after an epoch.
        """
        resting = {criterion.name: criterion.below for criterion in self.forgotten}
        unseen: dict[str, float] = {}
        if "unseen" in [*self.stop.values(), *resting.values()]:
            unseen = means_of(self._examiner.of(self._data.unseen_passages, self.prefixes, "unseen passages"))
        of_stop, of_resting = (
            {name: unseen[name] if below == "unseen" else float(below) for name, below in asked.items()}
            for asked in (self.stop, resting)
        )
        return of_stop, of_resting

    def _judge(self, trainer: pl.Trainer, found: list[Finding]) -> None:
        """Tell remembered from forgotten, log it, and stop where there is nothing left to do."""
        assert self.report is not None
        thresholds, bounds, epoch = self.report.thresholds, self.report.bounds, len(self.report.trace)
        verdicts = [c.forgotten([f["values"][c.name] for f in found], bounds[c.name]) for c in self.forgotten]
        trained = len(self._refinement.active) if epoch else 0
        self._refinement.update([any(of_one) for of_one in zip(*verdicts, strict=True)] if verdicts else [False] * len(found))
        self._data.active = self._refinement.active
        remembered, means = len(self._refinement.remembered), means_of(found)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": trainer.global_step,
            "trained": trained,
            "remembered": remembered,
        } | means
        entry["other_perplexity"], self._other = self._other, None
        self.report.trace.append(entry)
        if self.refine and not self._refinement.active:
            self._end(trainer, "every passage is forgotten")
        elif self.stop and all(means[name] <= thresholds[name] for name in self.stop):
            self._end(trainer, f"{' and '.join(self.stop)} have reached their thresholds")
        for logger in trainer.loggers:
            numbers = {name: value for name, value in entry.items() if name not in ("epoch", "step") and value is not None}
            logger.log_metrics({f"passages/{name}": value for name, value in numbers.items()}, step=trainer.global_step)

    def _end(self, trainer: pl.Trainer, reason: str) -> None:
        assert self.report is not None
        self.report.status, self.report.reason = "unlearned", reason
        trainer.should_stop = True

    def _conclude(self, module: CausalLMModule, last: list[Finding]) -> None:
        """Put together what was found."""
        report = self.report
        assert report is not None
        names = ("memorization_accuracy", "extraction_likelihood", "bleu")
        report.passages = [
            {"number": i, **status}
            | {
                "before": {name: was[name] for name in names},
                "after": {name: now[name] for name in names},
                "values": now["values"],
            }
            for i, (status, was, now) in enumerate(zip(self._refinement.to_list(), self._first, last, strict=True))
        ]
        report.samples = [
            {"prompt": was["prefix"], "truth": was["truth"], "before": was["completion"], "after": now["completion"]}
            for was, now in list(zip(self._first, last, strict=True))[: self.samples]
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

    def _publish(self, trainer: pl.Trainer) -> None:
        """Tell the loggers how it ended."""
        assert self.report is not None
        for logger in trainer.loggers:
            for when, measured in (("before", self.report.before), ("after", self.report.after)):
                logger.log_metrics(
                    {f"{when}/{texts}_{name}": v for texts, values in measured.items() for name, v in values.items()}, step=0
                )
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_figure"):
                for name, figure in self.report.figures().items():
                    writer.add_figure(f"unlearn/{name}", figure)
                writer.add_text("unlearn/completions", samples_table(self.report.samples))
                writer.add_text("unlearn/report", f"<pre>{self.report.to_text()}</pre>")
            logger.save()


def _is_in_a_fit(trainer: pl.Trainer) -> bool:
    """Not by itself (`trainer.validate`), and not as a check before it."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _refuse_limits(trainer: Any, refine: bool) -> None:
    """Refuse what does not go together with epochs that get shorter, before anything is computed."""
    if not trainer.fast_dev_run and trainer.limit_train_batches != 1.0:
        raise UnlearnError("Trainer(limit_train_batches=…): an epoch would leave out passages; give fewer to forget instead")
    if refine and isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is not None:
        raise UnlearnError("Trainer(val_check_interval=…): epochs get shorter as passages rest; give a share, such as 0.5")


class Clock:
    """Seconds by phase: one phase at a time, until another one starts.

    Example:
        >>> clock = Clock()
        >>> with clock.phase("report"):
        ...     pass
        >>> sorted(clock.seconds), clock.seconds["training"]
        (['report', 'training', 'validation'], 0.0)
    """

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

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Inside, count for this phase; afterwards for none."""
        self.start(phase)
        try:
            yield
        finally:
            self.start(None)

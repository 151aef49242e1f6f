"""`slug-lightning fit`: LightningCLI, with everything of a run in one folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class

import slug_lightning.callbacks
import slug_lightning.datamodules
import slug_lightning.modules  # noqa: F401  (imported, so that a config may name classes by their short names)
from slug_lightning.callbacks import ICUCallback, UnlearnCallback
from slug_lightning.errors import UnlearnError
from slug_lightning.reports.passages import PassagesReport
from slug_lightning.reports.run_files import earlier_edits, fresh_folder
from slug_lightning.reports.several import AnyReport
from slug_lightning.utils.names import concept_of

CONFIG = "config.yaml"
OURS = (UnlearnCallback, ICUCallback)
# Lightning reads a torch class that torch has renamed, and warns of pretrained models in evaluation mode, where forgetting puts
# them anyway; whoever runs this command can change neither.
NOISE = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"Found \d+ module\(s\) in eval mode")


class SaveConfig(SaveConfigCallback):
    """Write the resolved config to the folder of the run, whatever logger there is; rank 0 does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=False, multifile=False)


class UnlearnCLI(LightningCLI):
    """LightningCLI for one run, with everything that it writes in `output_dir`.

    Each rank chooses the folder for itself, and perhaps another one, as when each machine has its own disks; only rank 0
    writes (the callback asks it where), so that its folder is that of the run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            type=str,
            default="runs/unlearn",
            help="Folder for report, patch, checkpoint, weights, figures, TensorBoard events and the resolved config. "
            "If it holds a run already, a numbered folder next to it.",
        )

    def before_instantiate_classes(self) -> None:
        """Choose the folder, and let the logger and the callback write there."""
        config = self.config.fit
        folder = fresh_folder(config.output_dir, CONFIG)
        config.output_dir = str(folder)
        if config.trainer.logger in (None, True):
            config.trainer.logger = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder.parent), "name": "", "version": folder.name},
            }
        ours = _of_ours(config)
        if not ours:
            names = " or ".join(f"slug_lightning.callbacks.{kind.__name__}" for kind in OURS)
            raise UnlearnError(f"trainer.callbacks: none of them unlearns; add one with class_path: {names}")
        for callback in ours:
            callback.init_args.output_dir = str(folder)

    @property
    def callback(self) -> Any:
        """The callback that unlearns."""
        return next(c for c in self.trainer.callbacks if isinstance(c, OURS))  # type: ignore[attr-defined]

    @classmethod
    def run(cls, args: Sequence[str] | None) -> AnyReport | PassagesReport:
        """Parse `args` (None: those of the process), fit, and return the report."""
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        cli = cls(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            args=None if args is None else list(args),
        )
        report = cli.callback.report
        assert report is not None
        if cli.trainer.is_global_zero:
            print(f"{report.status}: {Path(cli.config.fit.output_dir).resolve()}", flush=True)
        # A launcher ends all processes as soon as one has exited with a code that isn't 0.
        cli.trainer.strategy.barrier("the result is printed")
        return report


class AnotherCLI(UnlearnCLI):
    """Forget another concept on the model of an earlier run: with its config, its edits and its retain set.

    `earlier` is the folder of that run, `forget` a datamodule of which only the forget set is used.
    """

    earlier: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_subclass_arguments(LightningDataModule, "forget", required=True, help="Datamodule of the new forget set.")

    def before_instantiate_classes(self) -> None:
        """Give the events a folder of their own, and name the earlier run to the callback."""
        logger = self.config.fit.trainer.logger
        if logger and logger.get("init_args", {}).get("version") == self.earlier.name:
            self.config.fit.trainer.logger = None
        super().before_instantiate_classes()
        for callback in _of_ours(self.config.fit):
            if str(callback.class_path).rpartition(".")[2] != UnlearnCallback.__name__:
                raise UnlearnError(f"run: {self.earlier} is a run of ICU, to which no concept can be added; use fit")
            callback.init_args.earlier = str(self.earlier)

    def before_fit(self) -> None:
        """Pass the callback the concepts of the earlier run and the new ones."""
        added = [self.config_init.fit.forget, *_added(self.earlier)]
        for datamodule in added:
            if self.trainer.is_global_zero:
                datamodule.prepare_data()
            self.trainer.strategy.barrier("the data are prepared")
            datamodule.setup("fit")
        names = [getattr(datamodule, "concepts", None) or [concept_of(datamodule)] for datamodule in added]
        forget = dict.fromkeys(earlier_edits(self.earlier), self.datamodule)
        # Those of the first run come from the config's own data, later ones from what was named in --forget then.
        for datamodule, own in zip(added[1:], names[1:], strict=True):
            forget |= {name: datamodule for name in own if name in forget}
        self.callback.forget = forget | dict.fromkeys(names[0], added[0])
        self.callback.retain = self.callback.retain or self.datamodule

    @classmethod
    def run_after(cls, earlier: Path, args: Sequence[str]) -> AnyReport | PassagesReport:
        """Run with the config of an earlier run, changed by `args`."""
        if not (earlier / CONFIG).is_file():
            raise FileNotFoundError(f"run: no {CONFIG} in {earlier}; name the folder of a run of slug-lightning fit")
        cls.earlier = earlier
        # Lightning expects all arguments on the command line; some of these come from RUN instead.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return cls.run(["fit", "--config", str(earlier / CONFIG), *args])


def _of_ours(config: Any) -> list[Any]:
    """The configs of the callbacks that unlearn."""
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return [c for c in callbacks if str(c.class_path).rpartition(".")[2] in {kind.__name__ for kind in OURS}]


def _added(folder: Path) -> list[LightningDataModule]:
    """The datamodules that were named for `forget-another`, by the run in a folder and by those before it."""
    config = yaml.safe_load((folder / CONFIG).read_text())
    if "forget" not in config:
        return []
    callbacks = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(UnlearnCallback.__name__)]
    return [instantiate_class((), config["forget"]), *_added(Path(callbacks[0]["init_args"]["earlier"]))]

"""`slug-lightning fit`: LightningCLI, with everything of a run in one folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

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
# Lightning reads a torch class that torch has renamed, and wonders at pretrained models in evaluation mode, where forgetting puts
# them anyway; nobody who runs this command can mend either.
NOISE = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"Found \d+ module\(s\) in eval mode")


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config to the folder of the run, whatever logger there is; of several processes, the first does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=False, multifile=False)


class UnlearnCLI(LightningCLI):
    """LightningCLI for one run: `output_dir` is where report, patch, weights, events and config go.

    Of several processes each settles the folder for itself, and perhaps on another one, as when each machine has disks of
    its own; only the first writes (the callback asks it where), so that its folder is that of the run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder of the run."""
        parser.add_argument(
            "--output_dir",
            type=str,
            default="runs/unlearn",
            help="Folder for report, patch, checkpoint, weights, figures, TensorBoard events and the resolved config. "
            "If it holds a run already, a numbered folder beside it.",
        )

    def before_instantiate_classes(self) -> None:
        """Settle the folder, and let the logger and the callback write there."""
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
            raise UnlearnError(f"trainer.callbacks: none of them forgets; add one with class_path: {names}")
        for callback in ours:
            callback.init_args.output_dir = str(folder)

    @property
    def callback(self) -> Any:
        """The one that forgets."""
        return next(c for c in self.trainer.callbacks if isinstance(c, OURS))  # type: ignore[attr-defined]

    @classmethod
    def run(cls, args: Optional[Sequence[str]]) -> Union[AnyReport, PassagesReport]:
        """Parse (None: what the process was started with), forget, and give the report."""
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
        # A launcher ends all processes as soon as one has ended with an exit code that isn't 0.
        cli.trainer.strategy.barrier("the result is printed")
        return report


class AnotherCLI(UnlearnCLI):
    """One more concept, for the model of an earlier run: its config, its edits, its data to keep.

    `earlier` is the folder of that run, `forget` a datamodule whose concepts are to be forgotten, too. What `forget` has to
    keep is not used: it is kept what the earlier run has kept.
    """

    earlier: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the new concept comes from."""
        super().add_arguments_to_parser(parser)
        parser.add_subclass_arguments(
            LightningDataModule, "forget", required=True, help="Datamodule of what is to be forgotten, too."
        )

    def before_instantiate_classes(self) -> None:
        """Give the events a folder of their own, beside those of the earlier run, and let the config say which that is."""
        logger = self.config.fit.trainer.logger
        if logger and logger.get("init_args", {}).get("version") == self.earlier.name:
            self.config.fit.trainer.logger = None
        super().before_instantiate_classes()
        for callback in _of_ours(self.config.fit):
            if str(callback.class_path).rpartition(".")[2] != UnlearnCallback.__name__:
                raise UnlearnError(f"run: {self.earlier} forgot passages by ICU, beside which nothing is added; fit anew")
            callback.init_args.earlier = str(self.earlier)

    def before_fit(self) -> None:
        """Ask for what the earlier run has forgotten, which it tells how, and for the new concepts."""
        added = [self.config_init.fit.forget, *_added(self.earlier)]
        for datamodule in added:
            if self.trainer.is_global_zero:
                datamodule.prepare_data()
            self.trainer.strategy.barrier("the data are prepared")
            datamodule.setup("fit")
        names = [_names(datamodule) for datamodule in added]
        forget = dict.fromkeys(earlier_edits(self.earlier), self.datamodule)
        # The first that was forgotten of the folder's own data, later ones of what was named then.
        for datamodule, own in zip(added[1:], names[1:], strict=True):
            forget |= {name: datamodule for name in own if name in forget}
        self.callback.forget = forget | dict.fromkeys(names[0], added[0])
        self.callback.retain = self.callback.retain or self.datamodule

    @classmethod
    def beside(cls, earlier: Path, args: Sequence[str]) -> Union[AnyReport, PassagesReport]:
        """Forget another concept beside those of an earlier run, and give the report.

        Raises:
            FileNotFoundError: if that run's folder holds no config.
        """
        if not (earlier / CONFIG).is_file():
            raise FileNotFoundError(f"run: no {CONFIG} in {earlier}; name the folder of a run of slug-lightning fit")
        cls.earlier = earlier
        # Lightning expects what it is told to stand on the command line; some of it stands in RUN instead.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return cls.run(["fit", "--config", str(earlier / CONFIG), *args])


def _of_ours(config: Any) -> list[Any]:
    """The configs of the callbacks that forget."""
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return [c for c in callbacks if str(c.class_path).rpartition(".")[2] in {kind.__name__ for kind in OURS}]


def _names(datamodule: LightningDataModule) -> list[str]:
    """What a datamodule that is set up has to forget."""
    return getattr(datamodule, "concepts", None) or [concept_of(datamodule)]


def _added(folder: Path) -> list[LightningDataModule]:
    """The datamodules that were named for `forget-another`, by the run in a folder and by those before it."""
    config = yaml.safe_load((folder / CONFIG).read_text())
    if "forget" not in config:
        return []
    home, _, name = config["forget"]["class_path"].rpartition(".")
    made = getattr(import_module(home), name)(**config["forget"].get("init_args") or {})
    callbacks = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(UnlearnCallback.__name__)]
    return [made, *_added(Path(callbacks[0]["init_args"]["earlier"]))]

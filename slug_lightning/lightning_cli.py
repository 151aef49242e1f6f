"""`slug-lightning fit`: LightningCLI, with everything of a run in one folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import slug_lightning.callbacks
import slug_lightning.datamodules
import slug_lightning.modules  # noqa: F401  (imported, so that a config may name classes by their short names)
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.errors import UnlearnError
from slug_lightning.output import fresh_folder
from slug_lightning.report import UnlearnReport

CALLBACK = "slug_lightning.callbacks.UnlearnCallback"
# Lightning reads a torch class that torch has renamed; nobody who runs this command can mend that.
TORCH_NOISE = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config to the folder of the run, whatever logger there is; of several processes, the first does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=False, multifile=False)


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
        folder = fresh_folder(config.output_dir, "config.yaml")
        config.output_dir = str(folder)
        if config.trainer.logger in (None, True):
            config.trainer.logger = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder.parent), "name": "", "version": folder.name},
            }
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        ours = [c for c in callbacks if str(c.class_path).rpartition(".")[2] == UnlearnCallback.__name__]
        if not ours:
            raise UnlearnError(f"trainer.callbacks: there is no UnlearnCallback; add one with class_path: {CALLBACK}")
        for callback in ours:
            callback.init_args.output_dir = str(folder)

    @classmethod
    def run(cls, args: Optional[Sequence[str]]) -> UnlearnReport:
        """Parse (None: what the process was started with), forget, and give the report."""
        warnings.filterwarnings("ignore", TORCH_NOISE)
        cli = cls(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            args=None if args is None else list(args),
        )
        report = next(c.report for c in cli.trainer.callbacks if isinstance(c, UnlearnCallback))  # type: ignore[attr-defined]
        assert report is not None
        if cli.trainer.is_global_zero:
            print(f"{report.status}: {Path(cli.config.fit.output_dir).resolve()}", flush=True)
        # A launcher ends all processes as soon as one has ended with an exit code that isn't 0.
        cli.trainer.strategy.barrier("the result is printed")
        return report

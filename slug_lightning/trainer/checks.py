"""Callbacks and loggers of the Trainer: what would undo the edit, what must save it, where files go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.modules import lightning_base

AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}


def refuse_surroundings(trainer: Any) -> None:
    """Refuse limits that end the fit before the edit or train over it, and callbacks that average weights.

    Those write an average, from a copy that was made before the edit, over it when the fit ends.
    """
    for callback in trainer.callbacks:
        # By name: a callback may come from the `pytorch_lightning` package.
        if AVERAGES & {kind.__name__ for kind in type(callback).__mro__}:
            raise UnlearnError(
                f"Trainer(callbacks=…): {type(callback).__name__}'s weight averaging would overwrite the edit with an average "
                "that was not measured; leave it out, and unlearn in a separate fit after the averaging"
            )
    if trainer.min_epochs or trainer.min_steps:
        raise UnlearnError("Trainer(min_epochs=…, min_steps=…): they would train over the edit; leave them out")
    if 0 in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches):
        raise UnlearnError(
            "Trainer(max_epochs=0, max_steps=0 or limit_train_batches=0): the fit would end before the edit; give at least 1"
        )
    if trainer.precision == "16-true":
        rank_zero_warn(
            "Trainer(precision='16-true'): losses and gradients easily underflow or overflow float16; use 'bf16-mixed', or "
            "'bf16-true' to save memory",
            stacklevel=3,
        )


def outdate_checkpoints(trainer: Any) -> None:
    """Let each ModelCheckpoint save again: what it saved in the training before is not the edited model.

    Those with `save_last` do so when the fit ends, even without a batch, unless they believe that they have saved already.
    """
    for callback in trainer.callbacks:
        if lightning_base(callback, "Checkpoint"):  # `checkpoint_callbacks` has only those of the trainer's own package
            vars(callback).update(_last_checkpoint_saved="", _last_global_step_saved=0)


def folder_of(trainer: Any) -> str | None:
    """The folder of the first logger's run, or one of its own below the trainer's; None without a logger."""
    if not trainer.loggers or trainer.fast_dev_run:
        return None
    logger = trainer.loggers[0]
    if folder := getattr(logger, "log_dir", None):
        return str(folder)
    # Such a logger's save_dir is shared by all its runs, often the working folder, or is no folder at all.
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return str(Path(logger.save_dir or trainer.default_root_dir, *(parts or ["unlearned"])))

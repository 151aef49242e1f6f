"""What has become of an edit by the end of the fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Optional

from torch import nn
from torch.distributed.tensor import DTensor

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.edit import edited
from slug_lightning.reports.several import AnyReport
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.trainer.previous_run import digest_of_edited
from slug_lightning.trainer.progress import progress_of
from slug_lightning.trainer.run_folder import save_report
from slug_lightning.utils.modules import unwrap_model
from slug_lightning.utils.names import some_of

OURS = {"slug_lightning", "lightning", "pytorch_lightning"}
"""Packages whose callbacks don't come over an edit, as far as they are not refused."""


def drift(report: AnyReport, module: nn.Module) -> Optional[str]:
    """Say by how much of the edit's length the edited tensors lie off what it made of them; None of a sharded model."""
    patch, named = report.patch, plain_parameters(unwrap_model(module))
    if patch is None or any(isinstance(named[name], DTensor) for name in patch.base):
        return None
    moved = made = 0.0
    for name, base in patch.base.items():
        after = edited(base, [(e.directions[name], e.step * e.strength) for e in patch.edits if name in e.directions]).double()
        moved += (named[name].detach().cpu().double() - after).square().sum().item()
        made += (after - base.double()).square().sum().item()
    share = math.sqrt(moved / made) if made else 0.0
    return f"continue_training: since the edit, training has moved the edited tensors by {share:.1%} of the edit's length"


def say_drift(trainer: Any, module: nn.Module, report: AnyReport, folder: Optional[Path]) -> None:
    """Add to a report, and to the one in its folder, how far training has moved the edit."""
    said = drift(report, module)
    if said is None or said in report.notes:
        return
    report.notes.append(said)
    progress_of(trainer).say(said)
    if folder is not None and trainer.is_global_zero:
        save_report(folder, report)


def refuse_overwritten(trainer: Any, module: Any, report: AnyReport, weights: str | None) -> None:
    """Refuse to end a fit in which nothing was trained, where the edited tensors are not what the edit made of them.

    Args:
        trainer: whose callbacks may have done it.
        module: the edited module.
        report: of the edit.
        weights: digest of the edited tensors right after the edit.
    """
    if weights in (None, digest_of_edited(module, report)):
        return
    suspects = [type(c).__name__ for c in trainer.callbacks if type(c).__module__.split(".")[0] not in OURS]
    raise UnlearnError(
        f"the edit of {some_of(report.tensors)} was overwritten before the fit ended, though nothing was trained: nothing is "
        f"forgotten. Leave out what restores or averages weights"
        + (f" (callbacks: {some_of(suspects)})" if suspects else "")
        + ", and unlearn in a fit of its own; the patch that was saved can be applied to the weights afterwards"
    )

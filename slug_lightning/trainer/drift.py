"""What training after the edit has done to it."""

from __future__ import annotations

import math
from typing import Optional

from torch import nn
from torch.distributed.tensor import DTensor

from slug_lightning.patches.edit import edited
from slug_lightning.reports.several import AnyReport
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.utils.modules import unwrap_model


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

"""What an earlier fit has done, so that the same request is not carried out twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Union

from torch import nn

from slug_lightning.methods import SLUG
from slug_lightning.reports.several import JointReport
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.layers import plain_parameters
from slug_lightning.utils.modules import unwrap_model


@dataclass(frozen=True)
class PreviousRun:
    """Report and request of an earlier edit: of the last fit, or of the one that wrote the checkpoint."""

    report: Union[UnlearnReport, JointReport]
    request: dict[str, Any]
    data: Optional[str]
    """Fingerprint of the forget set; None in checkpoints of earlier versions."""
    weights: Optional[str] = None
    """Digest of the edited tensors as that fit left them; None for a checkpoint, which brings its weights along."""

    def is_same_request(self, request: dict[str, Any]) -> bool:
        """Whether the same is asked for now; what an earlier version has not recorded was as it is by default."""
        recorded, slug = {"near_tolerance": None, **self.request}, SLUG.paper().request()
        if "method" not in recorded:  # version 0.1, which knew SLUG only, and did not record how long it may search
            now = {name: request["method"].get(name) for name in ("max_evaluations",)}
            recorded["method"] = slug | now | {name: recorded.pop(name) for name in ("layers", "granularity")}
            recorded["method"]["step_margin"] = recorded.pop("margin")
        if recorded["method"].get("class_path") == slug["class_path"]:
            recorded["method"] = slug | recorded["method"]
        return recorded == request


def digest_of_edited(module: nn.Module, report: Union[UnlearnReport, JointReport]) -> str:
    """Digest the tensors that a report says were edited, as far as the module has them."""
    named = plain_parameters(unwrap_model(module))
    return digest_of({name: p for name, p in named.items() if name in report.tensors}, "")

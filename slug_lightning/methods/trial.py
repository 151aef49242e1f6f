"""One evaluation of one edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Optional


class RetainDetails(NamedTuple):
    """What one pass over the retain set logged, batch by batch.

    Attributes:
        usage: by metric, then by number of the batch: constraint usage in that batch, and how many samples it counts for.
        loss: the mean of all values logged under `…nll` on the same data, or None without any.
    """

    usage: Mapping[str, Mapping[int, tuple[float, int]]]
    loss: Optional[float]


@dataclass(frozen=True)
class Trial:
    """One evaluation of one edit, on the validation split.

    Attributes:
        layer: name of the layer.
        step: λ, the factor of the direction.
        relative_step: ‖Δ‖/‖θ‖ of the change Δ; along a straight line λ‖D‖/‖θ‖.
        forgotten: whether the forget target is met.
        constraint_usage: the largest loss of a retain metric as a share of its tolerance, on the retain data with the near ones
            or on the latter alone: at most 1 is within bounds, below 0 is a gain; None where it was not measured.
        forget: value of the forget metric; of several, the one with the smallest share of its way to the target.
        retain: values of the retain metrics by name, None where not measured.
        dropped: whether the measurement of the retain metrics was broken off, since the trial could no longer win.
        together: whether the edits of other concepts were in the model as well.
        direction: name of the rule that the way begins with.
        curve: name of the rule that says how it goes on.
        distance: length of a way that bends, relative to ‖θ‖; None where it is the relative step.
        ended: why the search went no further along this way, if it was given up.
        near: values of the retain metrics on near data by name, where there are some and they bind.
        margin: how much of the way from the smallest step that forgets, relative to it, the step goes beyond it.
        forget_metrics: values of all forget metrics by name, where there are several.
        details: what each retain batch logged, for a choice that compares trials pairwise; not in reports.
    """

    layer: str
    step: float
    relative_step: float
    forgotten: bool
    constraint_usage: Optional[float]
    forget: float
    retain: Optional[dict[str, float]]
    dropped: bool = False
    together: bool = False
    direction: str = "gradient"
    curve: str = "line"
    distance: Optional[float] = None
    ended: str = ""
    near: Optional[dict[str, float]] = field(default=None, compare=False)
    margin: float = 0.0
    forget_metrics: Optional[dict[str, float]] = field(default=None, compare=False)
    details: Optional[RetainDetails] = field(default=None, compare=False, repr=False)

    @property
    def way(self) -> tuple[str, str, str]:
        """Layer, direction and curve."""
        return self.layer, self.direction, self.curve

    @property
    def feasible(self) -> bool:
        """Whether both bounds hold."""
        return self.forgotten and not self.dropped and self.constraint_usage is not None and self.constraint_usage <= 1

    @property
    def is_broken(self) -> bool:
        """Whether the model gives no numbers any more."""
        return not math.isfinite(self.forget)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report; what came with later versions only where it says something."""
        plain = asdict(replace(self, details=None))
        silent = {"together": False, "direction": "gradient", "curve": "line", "distance": None, "ended": ""}
        silent |= {"near": None, "margin": 0.0, "forget_metrics": None, "details": None}
        return {name: value for name, value in plain.items() if name not in silent or value != silent[name]}

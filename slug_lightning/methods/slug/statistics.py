"""What a method may know of each layer before it is edited."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from torch import Tensor

from slug_lightning.distributed.processes import Processes
from slug_lightning.methods.norms import product_share
from slug_lightning.objective.factors import Factor
from slug_lightning.tensors.dtensor import local
from slug_lightning.tensors.layers import Layer


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Weights, gradients and, where a direction needs them, further factors of one layer; a group counts as one long vector.

    Attributes:
        layer: its tensors.
        weight_norm: ‖θ‖.
        forget_norm: ‖g_f‖.
        retain_norm: ‖g_r‖; None where no gradient over retain data was taken.
        inner: <g_f, g_r>, or None.
        depth: 0 for the first layer of its tower, 1 for the last, in the order of the module's parameters.
        is_known: whether the layer is worth searching by its place alone (`slug_lightning.methods.slug.structure`), so that
            what directions need is computed for it with the retain gradient.
        factors: by what a direction `needs`, then by tensor name.
    """

    layer: Layer
    weight_norm: float
    forget_norm: float
    retain_norm: Optional[float]
    inner: Optional[float]
    depth: float = 0.0
    is_known: bool = False
    factors: Mapping[str, Mapping[str, Factor]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def importance(self) -> float:
        """‖g_f‖ / ‖θ‖ (SLUG, arXiv 2407.11867)."""
        return self.forget_norm / self.weight_norm

    @property
    def alignment(self) -> Optional[float]:
        """|cos(g_f, g_r)|, in [0, 1] (SLUG, arXiv 2407.11867); None where no gradient over retain data was taken."""
        if self.inner is None or self.retain_norm is None:
            return None
        # A layer that the retain loss doesn't touch is at right angles to it: editing it harms nothing at first order.
        return min(abs(self.inner) / (self.forget_norm * self.retain_norm), 1.0) if self.retain_norm else 0.0

    def row(self, on_front: bool) -> dict[str, Any]:
        """The layer's row in the report's table."""
        names = ("importance", "alignment", "forget_norm", "weight_norm", "retain_norm")
        values = {name: getattr(self, name) for name in names}
        return {"layer": self.name, "tower": self.layer.tower, **values, "on_front": on_front}


def layer_statistics(
    layers: Sequence[Layer],
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor] | None,
    processes: Processes | None = None,
    known: Collection[str] = (),
) -> list[LayerStatistics]:
    """Compute norms and products of each layer's weights and gradients, in fp64 from fp32 gradients.

    Products of the parts that processes hold are added up, so that no tensor is gathered. Layers whose forget gradient or
    weight is zero are left out: a relative step can't move them. `known` are the names of layers known by their place.
    """
    processes = processes or Processes()
    parts = []
    for layer in layers:
        weights = {name: local(p) for name, p in layer.parameters.items()}
        pairs = [(forget, forget), (weights, weights)] + ([] if retain is None else [(retain, retain), (forget, retain)])
        parts.append([product_share(layer, one, other, processes.world_size) for one, other in pairs])
    everywhere = processes.all_gather_object("products of gradients", parts)
    sizes, seen = Counter(layer.tower for layer in layers), Counter[str]()
    found = []
    for layer, of_processes in zip(layers, zip(*everywhere, strict=True), strict=True):
        depth = seen[layer.tower] / max(sizes[layer.tower] - 1, 1)
        seen[layer.tower] += 1
        forget_square, weight_square, *others = (math.fsum(column) for column in zip(*of_processes, strict=True))
        retain_square, inner = others or (None, None)
        if forget_square and weight_square:
            retain_norm = None if retain_square is None else math.sqrt(retain_square)
            norms = math.sqrt(weight_square), math.sqrt(forget_square), retain_norm
            found.append(LayerStatistics(layer, *norms, inner, depth, layer.name in known))
    return found

"""What a LightningModule may define for unlearning, besides Lightning's own hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples


class ModuleHooks:
    """Attributes and methods that a module may define; all are optional, None without, and read only when they are needed.

    Attributes:
        forget_step: `(batch, batch_idx) -> loss` of the forget set; `training_step` where it isn't defined.
        retain_step: likewise of the retain set.
        anchor_step: `(batch, batch_idx) -> features [B, D]` of the retain set, whose mean is the anchor of `source="anchored"`.
        anchored_step: `(batch, batch_idx, anchor [D]) -> loss` of the forget set, less that of the anchor in place of its inputs.
        embed: a method `(batch, batch_idx) -> features [B, D]`, by which near data are found: what has similar ones is near.
        labels: a method `(batch) -> {kind: B names, or None where a sample has none}`, the concepts that samples show, such as
            `{"thing": ["cat", None]}`.
        batch_size: a method `(batch) -> int`, how many samples a batch has, where the first dimensions of its tensors don't say
            so, as of graphs and of boxes in pictures. Samples weigh equally in every mean.
        forget_metric: name or names of the values, logged by `validation_step`, that forgetting must change; the loss without.
        forget_target: value of it that counts as forgotten, or one by metric name; without one,
            `slug_lightning.objective.metrics.Metric.default_target`.
        retain_metric: name or names of the logged values that must stay within their tolerance; the loss without one.
        wanted_metrics: set while something is measured: names of the values that count, so that a step may leave out others.
        higher_is_better: by metric name, where the name doesn't tell.
        chance: what a model scores that knows nothing: a number, or one by metric name.
        num_classes: gives `chance` where that isn't defined.
        towers: by name, patterns of the tensors whose layers are compared with each other, such as those of an image tower.
        max_step: longest step that is tried along a layer, relative to its weights, where a search has a limit.
        nothing_to_forget: `() -> str`, asked at the end of a pass over the unedited forget set: a hint for the error message if
            the forget metric meets its target already.
        gallery_step: `(batch, batch_idx) -> (pictures [n, 3, H, W] in [0, 1], n titles)`, shown before and after the edit.
        save_pretrained: `(folder)`, writes the weights as the model's own library loads them.

    Example:
        >>> class Net:
        ...     forget_metric = "accuracy"
        >>> ModuleHooks(Net()).forget_metric, ModuleHooks(Net()).towers
        ('accuracy', None)
    """

    forget_step: Callable[..., Any] | None
    retain_step: Callable[..., Any] | None
    anchor_step: Callable[..., Any] | None
    anchored_step: Callable[..., Any] | None
    embed: Callable[..., Any] | None
    labels: Callable[[Any], Mapping[str, Sequence[str | None]]] | None
    batch_size: Callable[[Any], int] | None
    forget_metric: str | Sequence[str] | None
    forget_target: float | Mapping[str, float] | None
    retain_metric: str | Sequence[str] | None
    wanted_metrics: Sequence[str] | None
    higher_is_better: Mapping[str, bool] | None
    chance: float | Mapping[str, float] | None
    num_classes: int | None
    towers: Mapping[str, str | Sequence[str]] | None
    max_step: float | None
    nothing_to_forget: Callable[[], str] | None
    gallery_step: Callable[..., Any] | None
    save_pretrained: Callable[..., Any] | None

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name not in type(self).__annotations__:
            raise AttributeError(name)
        found = getattr(self._module, name, None)
        return found if name not in COMMON or _takes_batch(self._module, name) else None

    def samples(self, batch: Any) -> int:
        """Count the samples of a batch, by the module's `batch_size` or else by its tensors.

        Example:
            >>> import torch
            >>> class Detector:
            ...     def batch_size(self, batch):
            ...         return len(batch["boxes"])
            >>> ModuleHooks(Detector()).samples({"boxes": [torch.zeros(3, 4), torch.zeros(7, 4)]})
            2
        """
        if self.batch_size is None:
            return batch_samples(batch)
        count = self.batch_size(batch)
        if count < 0 or int(count) != count:
            raise UnlearnError(f"batch_size(batch) must return the number of samples, got {count}")
        return int(count)


COMMON = ("embed", "labels", "batch_size")
"""Names that modules have for other things, too, such as an embedding, a list of classes, or a hyperparameter."""


def _takes_batch(module: Any, name: str) -> bool:
    """Whether this is a method whose first argument is called `batch`."""
    method = getattr(type(module), name, None)
    return inspect.isfunction(method) and list(inspect.signature(method).parameters)[1:2] == ["batch"]

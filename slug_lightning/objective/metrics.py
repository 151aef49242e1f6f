"""The bounds on forgetting and on the loss of retain performance, for any metric."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.module_hooks import ModuleHooks

LOSS_WORDS = set("loss nll ce bce xent entropy perplexity ppl kl error err mse mae rmse wer cer distance fid".split())  # noqa: SIM905
SCORE_WORDS = set("acc accuracy score f precision recall auc auroc map iou dice bleu rouge top r psnr ssim match".split())  # noqa: SIM905
UNLIKE_LIKELIHOOD = set("mae mse rmse l huber error err wer cer distance fid kl dice iou cosine hinge triplet margin".split())  # noqa: SIM905
"""Words of losses that are no negative log-likelihoods: by how much one must rise to count as forgotten, nobody can say."""
PERPLEXITY = {"perplexity", "ppl"}
SHARES = set("acc accuracy f precision recall auc auroc map iou dice top".split())  # noqa: SIM905
"""Words of scores between 0 and 1, which some log in per cent."""
LEAST_LOSS = 0.1
"""A tolerance is a share of the loss, or of so much where the loss is smaller: a share of nearly nothing allows nothing."""
USAGE_SLACK = 1e-9
"""Equal counts divide to slightly different floats; this is far below one sample of any real set."""
TARGET_SLACK = 1e-6
"""An accuracy is a mean in fp32: one in five comes out as 0.20000000298, and is at chance all the same."""
NORMAL_95 = 1.96
"""Half the width of a 95 % interval, in standard errors."""
LIKELIHOOD_DROP = 100.0
"""By default, a loss reaches its target once the data are this many times less likely than before."""


Goal = Union[float, Sequence[float]]
"""A target: a number to get to or beyond, or the lower and the upper end of an interval."""


def _slack(target: float) -> float:
    return TARGET_SLACK * max(1.0, abs(target))


@dataclass(frozen=True)
class Metric:
    """A metric and which way is better.

    Attributes:
        name: as logged.
        higher_is_better: True for an accuracy, False for a loss.
        chance: score of a model that knows nothing, or None if unknown.
    """

    name: str
    higher_is_better: bool
    chance: float | None = None

    def default_target(self, before: float) -> tuple[float, str]:
        """Choose the value from which on the metric counts as forgotten, and say how it came about.

        An accuracy: chance; in per cent, if it is above 1 before. A loss: read as a negative log-likelihood in nats,
        `before + ln 100`, so that the data are a hundred times less likely than before (per sample or token; a perplexity
        grows a hundredfold), but at least `log(number of classes)` where that is known, and at least twice `before`. Why a
        hundred: a fixed value or a mere doubling would call 0.01 -> 0.02 forgotten; and a mean can be reached by driving some
        samples far while others hold. At ten times, half of a forgotten class's answers were still right in
        tests/test_somebody_elses_module.py; at a hundred, as many as by chance.

        Raises:
            UnlearnError: if chance is unknown, or a loss by its name is no likelihood, such as an absolute error or a cosine.
        """
        if self.higher_is_better:
            if self.chance is None:
                raise UnlearnError(
                    f"forget_target: the chance level of {self.name!r} is unknown; give forget_target=…, or set "
                    "num_classes on the module"
                )
            return self.chance * self._unit(before), f"chance level of {self.name}"
        if self._words & PERPLEXITY:
            return LIKELIHOOD_DROP * before, f"{LIKELIHOOD_DROP:g} times {self.name} before"
        if self._words & UNLIKE_LIKELIHOOD:
            raise UnlearnError(
                f"forget_target: {self.name!r} is {before:.4g} and no negative log-likelihood, so that nobody can say from which "
                "value on it counts as forgotten; give forget_target=…, or name an accuracy by forget_metric=…"
            )
        floors = [
            (before + math.log(LIKELIHOOD_DROP), f"{self.name} before + ln {LIKELIHOOD_DROP:g}: a hundred times less likely"),
            (2 * before, f"twice {self.name} before"),
        ]
        if self.chance is not None:
            floors.append((self.chance, f"{self.name} of a model that knows nothing"))
        return max(floors, key=lambda floor: floor[0])

    def reaches(self, value: float, target: Goal) -> bool:
        """Whether the metric is forgotten: an accuracy at or below the target, a loss at or above it, or within an interval."""
        if not isinstance(target, (int, float)):
            low, high = target
            return low - _slack(low) <= value <= high + _slack(high)
        return value <= target + _slack(target) if self.higher_is_better else value >= target - _slack(target)

    def loss_of_retain(self, before: float, after: float) -> float:
        """How much worse a retain metric became: absolute for an accuracy, relative for a loss; below 0 is a gain.

        Where an accuracy is in per cent, it counts as a share all the same. A loss below `LEAST_LOSS` counts relative to that.
        """
        change = (before - after) if self.higher_is_better else (after - before)
        return change / self._unit(before)

    def limit(self, before: float, tolerance: float) -> float:
        """The worst that a retain metric may be."""
        most = tolerance * self._unit(before)
        return before - most if self.higher_is_better else before + most

    def _unit(self, before: float) -> float:
        """What a tolerance is a share of."""
        if self.higher_is_better:
            return 100.0 if self._words & SHARES and 1 < before <= 100 and (self.chance or 0) <= 1 else 1.0
        return abs(before) if self._words & UNLIKE_LIKELIHOOD and before else max(abs(before), LEAST_LOSS)

    @property
    def _words(self) -> set[str]:
        return set(re.split(r"[^a-z]+", self.name.lower()))


def constraint_usage(
    metrics: Mapping[str, Metric], before: Mapping[str, float], after: Mapping[str, float], tolerance: float
) -> float:
    """The worst retain metric's loss divided by the tolerance: at most 1 where every bound holds."""
    losses = [metric.loss_of_retain(before[name], after[name]) for name, metric in metrics.items()]
    if not all(map(math.isfinite, losses)):  # also -inf: a metric that ran away is no gain
        return math.inf
    lost = max(losses)
    return max(lost - USAGE_SLACK, 0.0) / (tolerance + USAGE_SLACK) if lost > 0 else lost / (tolerance or 1.0)


def refuse_infinite(kind: str, values: Mapping[str, float]) -> None:
    """Refuse to start from a metric that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UnlearnError(f"{kind}_metric: {name} is {value} before any edit; look at the {kind} data and the model")


def describe_metric(name: str, module: Any, logged: Any = None) -> Metric:
    """Find out which way a metric is better and where chance lies.

    The module's `higher_is_better` (a dict by metric) decides, else the attribute of a logged torchmetrics object,
    else the words of the name ("val_ce" is a loss, "val_acc" an accuracy). Chance is the module's `chance`
    (a number, or a dict by metric), else 1 / `num_classes` (for a loss its logarithm), read from the metric
    object, the module or the module's `hparams`.
    """
    hooks = ModuleHooks(module)
    higher = (hooks.higher_is_better or {}).get(name, getattr(logged, "higher_is_better", None))
    if higher is None:
        words = set(re.split(r"[^a-z]+", name.lower()))
        is_loss = not words.isdisjoint(LOSS_WORDS) or "loss" in name.lower() or "error" in name.lower()
        if not is_loss and words.isdisjoint(SCORE_WORDS) and "acc" not in name.lower():
            raise UnlearnError(
                f"{name}: unknown whether higher is better; set higher_is_better = {{{name!r}: …}} on the module, log a "
                "torchmetrics object, or put 'loss' or 'acc' into the name"
            )
        higher = not is_loss
    declared = hooks.chance
    chance = declared.get(name) if isinstance(declared, Mapping) else declared
    hparams = getattr(module, "hparams", None) or {}
    classes = getattr(logged, "num_classes", None) or hooks.num_classes or hparams.get("num_classes")
    if chance is None and isinstance(classes, int):
        chance = 1 / classes if higher else math.log(classes)
    return Metric(name, bool(higher), chance)

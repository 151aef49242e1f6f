"""The null space of a concept's name: a closed form for the image projection of a CLIP, without any gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.methods.base import Context, Method, Outcome
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.slug.layer_search import smallest_step
from slug_lightning.methods.slug.step_search import interpolation
from slug_lightning.methods.trial import Trial
from slug_lightning.patches.temporary import EditStep
from slug_lightning.tensors.dtensor import local, shard_like, whole
from slug_lightning.tensors.layers import Layer, find_layers, plain_parameters
from slug_lightning.utils.names import some_of

PROJECTIONS = ("visual.proj", "visual_projection.weight")
"""The image projection's name in open_clip, `[width, dim]`, and in transformers, `[dim, width]`."""
METRICS = ("_accuracy", "_nll")
"""What follows the name of a set of prompts in the names of its metrics."""
MOST = 2.0
"""At a strength of 1 nothing is left of the image features along the name, at 2 the opposite of what was there."""
FIRST = 0.5
"""The first strength that is tried where the smallest is searched."""
DEPENDENT = 1e-5
"""Names are the same to the text tower if their unit features differ by less: these are computed in 32 bits."""


@dataclass(frozen=True)
class NullSpace(Method):
    """Take a concept's name out of what a CLIP's image projection gives: W ← W (I - s U Uᵀ).

    The columns of U are an orthonormal basis of the text embeddings of the concept's names, each minus the mean of the other
    names', so that what all names share stays (NullSpace, arXiv 2512.14137, which takes the embedding itself; centred here).
    At s = 1 no image has a component along U any more. No gradient is computed. For a projection that is stored transposed,
    as in transformers, the factor is on the left.

    The concept's names are those of the labels in its forget set, among the prompts of the forget metric. Each of several
    concepts gets its own edit, and the harness measures their sum; strengths are not searched again together.

    Args:
        strength: s, in (0, 2]; None searches for the smallest one that reaches the forget target.
        max_evaluations: most evaluations where it is searched, at least 1.

    Raises:
        UnlearnError: if an option is out of range; in a run, if the module is not a CLIP with prompts, or if the forget set
            does not say which of them are to be forgotten.

    Example:
        >>> NullSpace().strength, NullSpace(strength=None).max_evaluations
        (1.0, 10)
    """

    strength: Optional[float] = 1.0
    max_evaluations: int = 10

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= MOST:
            raise UnlearnError(f"strength must be in (0, {MOST:g}], or None to search for it, got {self.strength}")
        if self.max_evaluations < 1:
            raise UnlearnError(f"max_evaluations must be >= 1, got {self.max_evaluations}")

    def layers_of(self, module: nn.Module, towers: Optional[Mapping[str, Any]] = None) -> list[Layer]:
        """The image projection alone."""
        if not (getattr(module, "prompts", None) and callable(getattr(module, "class_features", None))):
            raise UnlearnError(
                f"method: NullSpace needs the names of the classes, which {type(module).__name__} does not have; give a "
                "slug_lightning.modules.ClipModule with prompts=…, or use another method"
            )
        names = [name for name in plain_parameters(module) if f".{name}".endswith(tuple(f".{one}" for one in PROJECTIONS))]
        if len(names) != 1:
            raise UnlearnError(
                f"method: NullSpace edits the image projection of a CLIP ({' or '.join(PROJECTIONS)}), and this model has "
                f"{some_of(names) if names else 'none'}; give a CLIP with a vision transformer, without an adapter on its "
                "projection, or use another method"
            )
        return find_layers(module, names, towers=towers)

    def run(self, context: Context) -> list[Outcome]:
        """Give each concept its edit; those of an earlier run keep theirs."""
        with context.phase("search"):
            return [self._outcome(context, concept) for concept in context.concepts]

    def _outcome(self, context: Context, concept: Concept) -> Outcome:
        outcome = Outcome(concept.name)
        if concept.edit is not None and concept.report is not None:
            outcome.edit, outcome.relative_step = concept.edit, concept.report.relative_step
            return outcome
        (layer,) = context.layers
        direction = null_direction(layer, name_basis(concept))
        unit = context.unit_step(layer, direction)
        tried: dict[float, Trial] = {}
        evaluations = 1 if self.strength else self.max_evaluations
        with context.progress.bar("search", evaluations) as advance, context.evaluator(concept, [layer]) as evaluate:

            def at(strength: float) -> Trial:
                strength = min(strength, MOST)
                if strength not in tried:  # a search that does not know the end may ask for it again
                    tried[strength] = evaluate(EditStep(layer, direction, strength), strength / unit)
                    advance()
                return tried[strength]

            if self.strength is None:
                interpolation(at, concept.share, self.max_evaluations, FIRST)
            else:
                at(self.strength)
        outcome.trials = list(tried.values())
        self._choose(context, concept, outcome, direction)
        return outcome

    def _choose(self, context: Context, concept: Concept, outcome: Outcome, direction: dict[str, Tensor]) -> None:
        """Take the smallest strength that forgets, if it is within the retain bound; else say why not."""
        found = smallest_step(outcome.trials)
        if found is not None and found.feasible:
            outcome.edit = EditStep(context.layers[0], direction, found.step)
            outcome.relative_step = found.relative_step
            if len(context.concepts) == 1:
                outcome.search_after = {"forget": concept.values_of(found), "retain": dict(found.retain or {})}
            return
        last = found or outcome.trials[-1]
        target = concept.counting(concept.values_of(last))
        outcome.notes.append(
            f"{concept.name}: at a strength of {last.step:.3g}, {target.metric.name} is {last.forget:.4g} (target "
            f"{target.words}) and constraint usage is {last.constraint_usage:.2f}; give another strength, a looser bound, "
            "or use another method"
        )


def null_direction(layer: Layer, basis: Tensor) -> dict[str, Tensor]:
    """What a step of 1 adds to an image projection, so that its features have no component in the span of a basis, `[D, k]`."""
    ((name, parameter),) = layer.parameters.items()
    weight = whole(parameter).cpu().double()  # some devices have no 64 bits
    is_right = name.endswith(PROJECTIONS[0])  # features are x @ W in open_clip, and x @ W.T in transformers
    part = (weight @ basis) @ basis.T if is_right else basis @ (basis.T @ weight)
    change = -part.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return {name: local(shard_like(change, parameter))}


def name_basis(concept: Concept) -> Tensor:
    """An orthonormal basis, `[D, k]`, of the text embeddings of a concept's names, each minus the mean of the other names'."""
    module, prompts = concept.objective.module, _prompts(concept)
    labels = _labels(concept, prompts)
    with torch.no_grad(), concept.objective.passing():
        features = module.class_features(prompts).cpu().double()  # type: ignore[operator]
    if len(labels) == len(features):
        raise UnlearnError(f"forget: {concept.name!r} has every name of the prompts {prompts!r}, so that none is left to retain")
    basis = basis_of(features, labels)
    if not basis.shape[1]:
        raise UnlearnError(f"forget: the text tower does not tell {concept.name!r} from the other names; use another method")
    return basis


def basis_of(features: Tensor, labels: list[int]) -> Tensor:
    """An orthonormal basis, `[D, k]`, of these of the unit features, `[C, D]`, each minus the mean of all others."""
    own = torch.zeros(len(features), dtype=torch.bool)
    own[labels] = True
    directions = (features[own] - features[~own].mean(0)).T
    # Not by QR: of names that mean the same to the text tower it would go on with directions of chance.
    basis, lengths, _ = torch.linalg.svd(directions, full_matrices=False)
    return basis[:, lengths > DEPENDENT]


def _prompts(concept: Concept) -> str:
    """The set of prompts that the forget metric is about."""
    sets: Any = concept.objective.module.prompts
    first = concept.targets[0].metric.name
    for name in sets:
        if first in [name + metric for metric in METRICS]:
            return str(name)
    raise UnlearnError(
        f"forget_metric: NullSpace takes a concept's name from the prompts of the forget metric, and {first!r} "
        f"has none; give {' or '.join(f'{name}{METRICS[0]}' for name in sets)}"
    )


def _labels(concept: Concept, prompts: str) -> list[int]:
    """The labels that occur in the forget set's gradient split, on any rank."""
    objective = concept.objective
    own: set[int] = set()
    for one in objective.runner.batches(objective.loaders["forget"]["train"]):
        labels = one.batch.get(prompts) if isinstance(one.batch, Mapping) else None
        own |= set() if labels is None else set(labels.flatten().tolist())
    everywhere = objective.processes.all_gather_object("labels to forget", own)
    if not (found := sorted({label for labels in everywhere for label in labels if label >= 0})):
        raise UnlearnError(
            f"forget: no batch of {concept.name!r} has a label of the prompts {prompts!r}; give batch[{prompts!r}], or name a "
            "forget_metric of other prompts"
        )
    return found

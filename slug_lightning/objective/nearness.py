"""Find what lies near a concept, from gradient data alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import call_step
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.utils.loaders import NearBatches, Split
from slug_lightning.utils.names import listed, some_of
from slug_lightning.utils.rows import Rows, rows_of, shuffles_anew

CONCEPTS = 5
"""The nearest so many concepts are near,"""
SAMPLES = 16
"""each known by at most so many samples of the gradient data;"""
SHARE = 0.05
"""where samples have no labels, the nearest so many of them,"""
UNLABELLED = 10_000
"""told by the first so many."""


class Nearest(NamedTuple):
    """What lies near a concept.

    Attributes:
        kind: of the labels, as `ModuleHooks.labels` names it; None where samples have none.
        concepts: the labels that are near, nearest first.
        centre: `[D]`, mean of the retain set's features.
        towards: `[D]`, unit vector from there to the forget set's mean.
        threshold: cosine with it from which on a sample without labels is near.
    """

    kind: str | None
    concepts: list[str]
    centre: Tensor
    towards: Tensor
    threshold: float

    def rows(self, labels: Sequence[str | None] | None, features: Tensor | None) -> list[int]:
        """Which samples of a batch are near, by their labels of this kind, or else by their features, `[B, D]`."""
        if self.kind is not None:
            return [row for row, label in enumerate(labels or ()) if label in self.concepts]
        assert features is not None
        return (_unit(features - self.centre) @ self.towards >= self.threshold).nonzero()[:, 0].tolist()

    @property
    def what(self) -> str:
        """In words."""
        if self.kind is not None:
            how = "the nearest by the module's embed" if len(self.centre) else "as named"
            return f"{how}: {listed(self.concepts, CONCEPTS)}"
        return f"the nearest {SHARE:.0%} of the retain samples, by the module's embed"


Features = Sequence[tuple[Tensor, Mapping[str, "str | None"]]]
"""Features, `[D]`, of samples, with their labels by kind."""
Kinds = tuple[str, ...]
"""Of labels."""


def find_nearest(forget: Features, retain: Callable[[Kinds], Features]) -> Nearest | None:
    """Find what lies near a forget set; None where the module has no `embed`, or the retain set shows the same concepts.

    By label, the five concepts of the retain set whose mean feature has the largest cosine with the forget set's, both less the
    mean of all concepts; without labels, the 5 % of the samples nearest to the forget set's mean.

    Args:
        forget: `features_of` the forget set.
        retain: gives `features_of` the retain set by some kinds of labels.
    """
    if not forget:
        return None
    own = torch.stack([feature for feature, _ in forget]).mean(0)
    every = dict.fromkeys(kind for _, labels in forget for kind in labels)
    kinds = tuple(kind for kind in every if all(labels.get(kind) is not None for _, labels in forget))
    labelled = retain(kinds) if kinds else []
    is_same = False
    for kind in kinds:
        asked = {labels[kind] for _, labels in forget}
        # As where samples of any class are to be forgotten, and not a class; a few may be there by mistake.
        if _counted(labelled, kind, asked) >= _counted(forget, kind, asked):
            is_same = True
            continue
        groups: dict[str, list[Tensor]] = {}
        for feature, labels in labelled:
            label = labels.get(kind)
            if label is not None and label not in asked:
                groups.setdefault(label, []).append(feature)
        if not groups:
            continue
        means = {label: torch.stack(some[:SAMPLES]).mean(0) for label, some in groups.items()}
        centre = torch.stack(list(means.values())).mean(0)
        towards = _unit(own - centre)
        cosines = {label: float(_unit(mean - centre) @ towards) for label, mean in means.items()}
        return Nearest(kind, sorted(cosines, key=lambda label: -cosines[label])[:CONCEPTS], centre, towards, 0.0)
    if is_same:
        return None
    if not (everything := retain(())):
        return None
    features = torch.stack([feature for feature, _ in everything])
    centre = features.mean(0)
    towards = _unit(own - centre)
    threshold = (_unit(features - centre) @ towards).quantile(1 - SHARE)
    return Nearest(None, [], centre, towards, float(threshold))


def _counted(samples: Features, kind: str, labels: Collection[str | None]) -> int:
    """How many samples have one of these labels; of each label, no more than are known of any."""
    counts = Counter(own.get(kind) for _, own in samples)
    return sum(min(counts[label], SAMPLES) for label in labels)


def named_nearest(objective: Objective, names: Sequence[str]) -> Nearest:
    """Take concepts by their names. It is collective.

    Raises:
        UnlearnError: if the module has no `labels`, or no sample of the retain set's gradient split has one of the names.
    """
    if objective.hooks.labels is None:
        raise UnlearnError(
            "near_retain: names need a method labels(batch) of the module, whose argument is called batch; define it, or give a "
            "loader"
        )
    known: dict[str, set[str]] = {}
    for _, _, labels, _ in _embedded(objective, "retain", "train", False):
        for kind, values in labels.items():
            known.setdefault(kind, set()).update(value for value in values if value is not None)
    everywhere = objective.processes.all_gather_object("labels", known)
    merged: dict[str, set[str]] = {}
    for own in everywhere:
        for kind, found in own.items():
            merged.setdefault(kind, set()).update(found)
    for kind in sorted(merged):
        if set(names) <= merged[kind]:
            nothing = torch.zeros(0)
            return Nearest(kind, list(names), nothing, nothing, 0.0)
    every = sorted(set[str]().union(*merged.values()))
    missing = [name for name in names if name not in every] or list(names)
    raise UnlearnError(
        f"near_retain: no sample of the retain set has the label {some_of(map(repr, missing))}; there are {listed(every, 20)}"
    )


def near_rows(objective: Objective, nearest: Nearest) -> NearBatches | None:
    """Take the near rows of the retain set's validation and test split; None if one has none. It is collective.

    A loader that shuffles by a generator of its own serves other batches each time, of which no rows can be named; nor can they
    be taken out of batches whose samples only the module can count.
    """
    splits: dict[Split, Any] = {}
    if any(shuffles_anew(objective.loaders["retain"][split]) for split in ("val", "test")):
        return None
    for split in ("val", "test"):
        found: list[tuple[int, list[int], int]] = []
        for number, batch, labels, features in _embedded(objective, "retain", split, nearest.kind is None):
            own = labels.get(nearest.kind) if nearest.kind is not None else None
            found.append((number, nearest.rows(own, features), objective.hooks.samples(batch)))
        everywhere = objective.processes.all_gather_object("near rows", found, each_data_rank=True)
        told = sorted(row for rows in everywhere for row in rows)
        objective.forward_samples += sum(size for *_, size in told) if nearest.kind is None else 0
        if not any(rows for _, rows, _ in told):
            return None
        loader = objective.loaders["retain"][split]
        splits[split] = rows_of(loader, [rows for _, rows, _ in told], [size for *_, size in told])
        if objective.hooks.batch_size is not None and isinstance(splits[split], Rows):
            return None
    return NearBatches(splits, f"{nearest.what}; of the retain data", nearest.concepts, is_part=True)


def features_of(objective: Objective, kind: Kind, kinds: Kinds | None = None) -> Features:
    """The features of the gradient samples, and their labels by kind; none where the module has no `embed`. It is collective.

    Of those with the same labels there are at most `SAMPLES`, of those without any `UNLABELLED`. Every process gets the same
    ones, in the order of the batches, whatever the world size.

    Args:
        objective: of the concept.
        kind: of data.
        kinds: of labels that count, None for all of them; with some, samples without a label of these are left out.
    """
    if objective.hooks.embed is None:
        return []
    found, counted = list[_Sample](), _Counted(kinds)
    for number, batch, labels, features in _embedded(objective, kind, "train", True, counted.is_wanted):
        assert features is not None
        for row in range(objective.hooks.samples(batch)):
            own = {name: values[row] for name, values in labels.items()}
            if counted.takes(own):  # copies, as what goes to other processes is whole storages
                found.append(_Sample(number, row, features[row].clone(), own))
    mine = found, counted.embedded
    everywhere = objective.processes.all_gather_object("features", mine, each_data_rank=True)
    objective.forward_samples += sum(count for _, count in everywhere)
    ordered, counted = sorted((one for part, _ in everywhere for one in part), key=lambda one: one[:2]), _Counted(kinds)
    return [(one.feature, one.labels) for one in ordered if counted.takes(one.labels)]


class _Sample(NamedTuple):
    number: int
    row: int
    feature: Tensor
    labels: dict[str, str | None]


class _Counted:
    """Counts samples by their labels of some kinds, so that the first few of each are taken."""

    def __init__(self, kinds: Kinds | None) -> None:
        self.kinds = kinds
        self.seen: dict[tuple[tuple[str, str], ...], int] = {}
        self.embedded = 0

    def takes(self, labels: Mapping[str, str | None]) -> bool:
        """Count a sample; whether it is among the first with these labels."""
        key = self._key(labels)
        self.seen[key] = self.seen.get(key, 0) + 1
        self.embedded += 1
        return not self._is_full(key, self.seen[key] - 1)

    def is_wanted(self, labels: Mapping[str, Sequence[str | None]]) -> bool:
        """Whether a batch has a sample that would be taken."""
        rows = [dict(zip(labels, row, strict=True)) for row in zip(*labels.values(), strict=True)]
        keys = [self._key(row) for row in rows] or [()]
        return any(not self._is_full(key, self.seen.get(key, 0)) for key in keys)

    def _is_full(self, key: tuple[tuple[str, str], ...], count: int) -> bool:
        return count >= (SAMPLES if key else 0 if self.kinds else UNLABELLED)

    def _key(self, labels: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
        # By kind, too: batches may have different kinds, or the same in another order.
        counting = labels if self.kinds is None else [kind for kind in self.kinds if kind in labels]
        return tuple(sorted((kind, label) for kind in counting if (label := labels[kind]) is not None))


def _embedded(
    objective: Objective,
    kind: Kind,
    split: str,
    with_features: bool,
    is_wanted: Callable[[Mapping[str, Sequence[str | None]]], bool] = lambda labels: True,
) -> Iterator[tuple[int, Any, Mapping[str, Sequence[str | None]], Tensor | None]]:
    """Number, batch, labels by kind and features, `[B, D]`, of each batch of this process that is wanted."""
    hooks, runner = objective.hooks, objective.runner
    batches = objective.progress(runner.batches(objective.loaders[kind][split]), f"near data, {kind}")
    with torch.no_grad(), objective.passing(), runner.forward_context():
        for number, batch, is_real in batches:
            labels = hooks.labels(batch) if hooks.labels else {}
            if objective.processes.world_size == 1 and not is_wanted(labels):  # others may run together
                continue
            features = call_step(hooks.embed, batch, number).float().cpu() if with_features and hooks.embed else None
            if is_real:
                yield number, batch, labels, features


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=-1)

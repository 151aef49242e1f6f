"""Find the samples that the sets of a run share."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import Batches, Chained, EveryFourth, First, Split
from slug_lightning.utils.names import listed

Sample = tuple[int, int]
"""`id` of the dataset, and index; a stream has only its `id`, and the index -1."""


def indices_of(sampler: Iterable[int], count: int) -> list[int]:
    """Return which of `count` samples a sampler may draw, each once."""
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero()[:, 0].tolist()
    if isinstance(sampler, (RandomSampler, DistributedSampler)):  # the latter gives one rank its share
        return list(range(count))
    return sorted({int(i) for i in sampler})


def samples_in(loaders: Mapping[Split, Batches]) -> set[Sample]:
    """Return the samples that loaders read."""
    found: set[Sample] = set()
    for loader in (loader for batches in loaders.values() for loader in _sources(batches)):
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            found.add((id(dataset if dataset is not None else loader), -1))
            continue
        indices = indices_of(getattr(loader.batch_sampler, "sampler", loader.sampler), len(dataset))
        while isinstance(dataset, Subset):
            indices = [int(dataset.indices[i]) for i in indices]
            dataset = dataset.dataset
        found.update((id(dataset), i) for i in indices)
    return found


def _sources(batches: Any) -> Iterator[Any]:
    """Yield the loaders that batches come from; a stream is one, whatever it consists of."""
    if isinstance(batches, (Chained, First)):
        for loader in batches.loaders if isinstance(batches, Chained) else [batches.loader]:
            yield from _sources(loader)
    else:
        yield batches.loader if isinstance(batches, EveryFourth) else batches


def refuse_same_data(forget: Mapping[str, Mapping[Split, Batches]], retain: Mapping[Split, Batches]) -> list[str]:
    """Refuse the same data under two names, warn if retain has some of a concept, and return notes on what concepts share."""
    concepts = {name: samples_in(loaders) for name, loaders in forget.items()}
    retained = samples_in(retain)
    if inside := [name for name, own in concepts.items() if own and own <= retained]:
        raise UnlearnError(f"forget {listed(inside)}: the same data as retain, or a part of it; leave it out of retain")
    partly = [f"{len(own & retained)} of {len(own)} samples of {name!r}" for name, own in concepts.items() if own & retained]
    if partly:
        more = f", and samples of {len(partly) - 5} more concepts," if len(partly) > 5 else ""
        warnings.warn(f"forget, retain: {', '.join(partly[:5])}{more} are in retain too", stacklevel=3)
    same: dict[frozenset[Sample], str] = {}
    for name, own in concepts.items():
        if own and (first := same.setdefault(frozenset(own), name)) != name:
            raise UnlearnError(f"forget: {first!r} and {name!r} are the same data; give them once")
    return _shared(concepts)


def _shared(concepts: Mapping[str, set[Sample]]) -> list[str]:
    """Write sentences on the pairs of concepts that share most samples."""
    owners: dict[Sample, list[str]] = defaultdict(list)
    for name, own in concepts.items():
        for sample in own:
            if sample[1] >= 0:  # what two streams share is unknown
                owners[sample].append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names, count in Counter(map(tuple, owners.values())).items():  # many samples have the same owners
        shared.update(dict.fromkeys(combinations(names, 2), count))
    notes = []
    for pair, count in shared.most_common(5):
        (small, fewer), (large, more) = sorted(((name, len(concepts[name])) for name in pair), key=lambda each: each[1])
        if count == fewer:
            notes.append(f"forget: {small!r} lies within {large!r}, {count} of its {more} samples")
        else:
            notes.append(f"forget: {small!r} and {large!r} share {count} samples, of {fewer} and {more}")
    if len(shared) > 5:
        notes.append(f"forget: {len(shared) - 5} more pairs of concepts share samples")
    return notes

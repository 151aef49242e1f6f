"""Which samples the sets of a run share."""

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
"""Identity of the dataset, and index; a stream is known by its identity alone, and has the index -1."""


def meant(sampler: Iterable[int], count: int) -> list[int]:
    """Which of `count` samples a sampler means, each once: it may repeat some, and draw them at random."""
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero()[:, 0].tolist()
    if isinstance(sampler, (RandomSampler, DistributedSampler)):  # the latter serves one process its part
        return list(range(count))
    return sorted({int(i) for i in sampler})


def samples_in(loaders: Mapping[Split, Batches]) -> set[Sample]:
    """Which samples loaders read."""
    found: set[Sample] = set()
    for batches in loaders.values():
        for loader in _sources(batches):
            dataset = getattr(loader, "dataset", None)
            if dataset is None or isinstance(dataset, IterableDataset):
                found.add((id(dataset if dataset is not None else loader), -1))
                continue
            sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
            indices = meant(sampler, len(dataset))
            while isinstance(dataset, Subset):
                indices = [int(dataset.indices[i]) for i in indices]
                dataset = dataset.dataset
            found.update((id(dataset), i) for i in indices)
    return found


def _sources(batches: Any) -> Iterator[Any]:
    """The loaders that batches come from."""
    if isinstance(batches, Chained):
        for loader in batches.loaders:
            yield from _sources(loader)
    elif isinstance(batches, First):
        yield from _sources(batches.loader)
    else:  # a stream is one source, whatever it consists of
        yield batches.loader if isinstance(batches, EveryFourth) else batches


def refuse_same_data(forget: Mapping[str, Mapping[Split, Batches]], retain: Mapping[Split, Batches]) -> list[str]:
    """Refuse one set under two names, warn where a part of a concept is in retain, and say what concepts share.

    A concept may lie within another, or share samples with it.

    Args:
        forget: batches by concept and split.
        retain: batches by split.

    Returns:
        Notes on what concepts share, at most six.

    Raises:
        UnlearnError: if a concept is a part of retain, or if two concepts are the same data.
    """
    concepts = {name: samples_in(parts) for name, parts in forget.items()}
    kept = samples_in(retain)
    if inside := [name for name, own in concepts.items() if own and own <= kept]:
        raise UnlearnError(
            f"forget {listed(inside)}: the same data as retain, or a part of it; leave out of retain what is to be forgotten"
        )
    partly = [f"{len(own & kept)} of {len(own)} samples of {name!r}" for name, own in concepts.items() if own & kept]
    if partly:
        more = f", and samples of {len(partly) - 5} more concepts," if len(partly) > 5 else ""
        warnings.warn(f"forget, retain: {', '.join(partly[:5])}{more} are in retain too", stacklevel=3)
    same: dict[frozenset[Sample], str] = {}
    for name, own in concepts.items():
        if own and (first := same.setdefault(frozenset(own), name)) != name:
            raise UnlearnError(f"forget: {first!r} and {name!r} are the same data; give them once")
    return _shared(concepts)


def _shared(concepts: Mapping[str, set[Sample]]) -> list[str]:
    """Sentences on the pairs of concepts that share samples, those that share most first."""
    owners: dict[Sample, list[str]] = defaultdict(list)
    for name, own in concepts.items():
        for sample in own:
            if sample[1] >= 0:  # how much two readings of a stream have in common cannot be told
                owners[sample].append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names, count in Counter(map(tuple, owners.values())).items():  # many samples have the same owners
        for pair in combinations(names, 2):
            shared[pair] += count
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

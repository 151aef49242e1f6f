"""Serve only the passages that train now, shared among ranks so that no rank has an empty batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler


class ActiveSampler(DistributedSampler):
    """Draws this rank's share of the active samples, each once an epoch, as (index, weight).

    The active samples are shuffled in every epoch and cut into global batches of `num_replicas * batch_size`; of each, rank r
    takes every `num_replicas`-th from the r-th on. Where the last one cannot be shared evenly, some ranks draw a sample that
    another one has too, with weight 0, so that all ranks have equally many batches, none of them empty. Any other sample has the
    weight `num_replicas / n`, for n samples in the global batch: the sum of weighted losses, averaged over the ranks as DDP does
    with gradients, is their mean.

    Lightning leaves a `DistributedSampler` as it is, and tells it the epoch. Which samples are active is asked for anew whenever
    the sampler is iterated or its length is taken.

    Args:
        dataset: for `len(dataset)`; its items are taken by (index, weight).
        active: gives the indices of the active samples, the same on all ranks.
        batch_size: samples of one rank in a batch, the `DataLoader`'s.
        num_replicas: how many ranks share the samples.
        rank: of this process.
        seed: of the order, together with the epoch.

    Example:
        >>> shares = [ActiveSampler(range(9), lambda: [1, 4, 6], batch_size=2, num_replicas=2, rank=r) for r in range(2)]
        >>> [[(index, round(weight, 2)) for index, weight in share] for share in shares]
        [[(1, 0.67), (4, 0.67)], [(6, 0.67), (1, 0.0)]]
    """

    def __init__(
        self,
        dataset: Any,
        active: Callable[[], Sequence[int]],
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(cast(Dataset, dataset), num_replicas, rank, seed=seed)
        self.active = active
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[int, float]]:
        order = sorted(self.active())
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        whole = self.batch_size * self.num_replicas
        for start in range(0, len(order), whole):
            batch = order[start : start + whole]
            for place in range(self.rank, math.ceil(len(batch) / self.num_replicas) * self.num_replicas, self.num_replicas):
                yield (batch[place], self.num_replicas / len(batch)) if place < len(batch) else (batch[0], 0.0)

    def __len__(self) -> int:
        return math.ceil(len(self.active()) / self.num_replicas)

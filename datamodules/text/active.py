"""Serve only the passages that train now, to several processes, without a batch that is empty anywhere."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler


class ActiveSampler(DistributedSampler):
    """Draws this process' share of the samples that are active, each once an epoch, with a weight.

    The active samples are mixed anew in every epoch and cut into batches of `num_replicas * batch_size`, the same for any
    number of processes that serves as many samples at once; of each, process r takes every `num_replicas`-th from the r-th
    on. Where the last one cannot be shared out evenly, some processes draw a stand-in, a sample that another one has too,
    with weight 0, so that every process has as many batches, none of them empty. A sample that counts has the weight
    `num_replicas / n`, where n samples are in the batch of all processes: the sum of weighted losses, averaged over the
    processes as DDP does with gradients, is their mean.

    Lightning leaves a `DistributedSampler` as it is, and tells it the epoch. What is active may change from epoch to epoch:
    it is asked for whenever the sampler is iterated, or its length wanted.

    Args:
        dataset: what there is, for `len(dataset)`; a sample is asked for by (index, weight).
        active: gives the indices of the samples that are active, the same in every process.
        batch_size: samples of one process in a batch, the `DataLoader`'s.
        num_replicas: how many processes share the samples.
        rank: which of them this one is.
        seed: of the order, together with the epoch.

    Example:
        >>> sampler = ActiveSampler(range(9), lambda: [1, 4, 6], batch_size=2)
        >>> sorted(sampler)
        [(1, 0.5), (4, 1.0), (6, 0.5)]
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

"""Several processes, one after the other in one: for arithmetic, in milliseconds, with nothing but the sending left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slug_lightning.distributed.processes import Processes


class _Waiting(BaseException):
    """What the others will say is not known yet."""


class Simulated(Processes):
    """One of several processes whose messages are kept from earlier attempts."""

    def __init__(self, number: int, count: int, shares: int, in_step: bool, rounds: list[dict[int, Any]]) -> None:
        super().__init__(number * shares // count, shares, in_step=in_step)
        self.rank, self.world_size = number, count
        self.rounds = rounds
        self.exchanges = 0

    def _gather(self, message: Any) -> list[Any]:
        if self.exchanges == len(self.rounds):
            self.rounds.append({})
        said = self.rounds[self.exchanges]
        said[self.rank] = message
        if len(said) < self.world_size:
            raise _Waiting
        self.exchanges += 1
        return [said[number] for number in range(self.world_size)]

    def all_reduce_sum(self, tensors: Any) -> None:
        if self.data_world_size == 1:
            return
        for tensor in tensors:
            self.sums += 1
            found = self.all_gather_object("a sum", tensor.clone(), each_data_rank=True)
            tensor.copy_(torch.stack(found).sum(0))


def simulate(count: int, function: Callable[[Processes], Any], shares: int | None = None, in_step: bool = False) -> list[Any]:
    """Call `function` for each of `count` processes; gives what each one returns, or the exception that it raises.

    It is called again and again, until the others' messages are known: it must do the same each time.
    """
    rounds: list[dict[int, Any]] = []
    while True:
        known = sum(map(len, rounds))
        results: list[Any] = []
        for number in range(count):
            try:
                results.append(function(Simulated(number, count, shares or count, in_step, rounds)))
            except _Waiting:
                continue
            except Exception as error:
                results.append(error)
        if len(results) == count:
            return results
        assert sum(map(len, rounds)) > known, "the processes wait for each other for ever"

"""Exchange between ranks: results, failures, sums. A single process sends nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Optional

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slug_lightning.errors import UnlearnError


class _Message(NamedTuple):
    data_rank: int
    name: str
    item: Any
    problem: Optional[str] = None


class OtherProcessError(UnlearnError):
    """Another rank has failed; its message is this one's."""


class Processes:
    """The processes of a run, seen from one of them.

    Every decision rests on what `all_gather_object` gives, which is the same on all ranks. All of them call it equally often and
    in the same order; if one fails inside `together`, all end with its message.

    Args:
        data_rank: which part of the data this process reads; ranks that hold parts of one model (tensor parallelism) read
            the same part.
        data_world_size: number of these parts.
        group: of the ranks with different parts of the data, for sums; None for all ranks.
        in_step: whether the model itself communicates in its steps, as a sharded one does: then a rank that fails
            leaves the others waiting there, and only its end can end them.
    """

    def __init__(
        self, data_rank: int = 0, data_world_size: int = 1, group: Optional[dist.ProcessGroup] = None, in_step: bool = False
    ) -> None:
        self.data_rank = data_rank
        self.data_world_size = data_world_size
        self.group = group
        self.in_step = in_step
        running = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if running else 1
        self.rank = dist.get_rank() if running else 0
        self.sums = 0
        """How many sums over the ranks `all_reduce_sum` has asked for."""
        self._broken = False

    @classmethod
    def alone(cls) -> Processes:
        """As if there were no others."""
        processes = cls()
        processes.world_size, processes.rank = 1, 0
        return processes

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and logs."""
        return self.rank == 0

    def all_gather_object(self, name: str, item: Any, each_data_rank: bool = False) -> list[Any]:
        """Gather an item from every rank, in their order.

        Args:
            name: the same on all ranks, unless one has taken another branch.
            item: small and picklable, without tensors on a device.
            each_data_rank: give one item for each part of the data instead.

        Raises:
            OtherProcessError: if another rank has failed, or taken another branch.
        """
        messages = self._gather(_Message(self.data_rank, name, item))
        for rank, message in enumerate(messages):
            if message.problem is not None:
                raise OtherProcessError(f"rank {rank}: {message.problem}")
        if len({message.name for message in messages}) > 1:
            branches = ", ".join(f"rank {rank} at {message.name!r}" for rank, message in enumerate(messages))
            raise OtherProcessError(f"Collective calls differ across ranks: {branches}; does a step depend on the rank?")
        if not each_data_rank:
            return [message.item for message in messages]
        firsts = {message.data_rank: message.item for message in reversed(messages)}
        return [firsts[data_rank] for data_rank in sorted(firsts)]

    def broadcast(self, name: str, item: Any) -> Any:
        """Return rank 0's item."""
        return self.all_gather_object(name, item)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make what fails inside fail on all ranks, by telling the others, who wait in `all_gather_object`."""
        try:
            yield
        except Exception as error:
            if not (isinstance(error, OtherProcessError) or self.in_step or self._broken):
                self._broken = True  # told once
                with suppress(RuntimeError):  # where the others are gone: this rank's own error says more
                    self._gather(_Message(self.data_rank, "", None, problem=str(error) or type(error).__name__))
            raise

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, code other than ours makes the ranks wait for each other: one that fails there tells nobody."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the parts of the data, in place, each by one collective operation."""
        if self.data_world_size == 1:
            return
        for tensor in tensors:
            self.sums += 1
            dist.all_reduce(tensor, group=self.group)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors in place by rank 0's."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.broadcast(tensor, src=0)

    def _gather(self, message: _Message) -> list[_Message]:
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(messages, message)
        except RuntimeError as error:
            self._broken = True  # nobody can be told anything any more
            raise RuntimeError(f"rank {self.rank} has lost the connection to the others, see their messages ({error})") from error
        return messages


class Collectives(TorchDispatchMode):
    """Sees whether what runs inside communicates with other ranks."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen |= "c10d" in func.namespace
        return func(*args, **(kwargs or {}))

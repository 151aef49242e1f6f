"""What several processes share: results, failures, sums. With one process, nothing is sent anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Optional

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slug_lightning.errors import UnlearnError


class _Message(NamedTuple):
    share: int
    what: str
    item: Any
    problem: Optional[str] = None


class OtherProcessError(UnlearnError):
    """Another process has failed; its message is this one's."""


class Processes:
    """The processes of a run, seen from one of them.

    Every decision rests on what `all_gather_object` gives, which is the same everywhere: no process acts alone. All of them call
    it equally often and in the same order; a process that cannot go on calls `fail` instead, and all end with its message.

    Args:
        share: number of the part of the data that this process reads; processes that hold parts of one model
            (tensor parallelism) read the same.
        shares: how many such parts there are.
        group: of the processes with different parts of the data, for sums; None for all processes.
        in_step: whether the model itself communicates in its steps, as a sharded one does: then a process that fails
            leaves the others waiting there, and only its end can end them.

    Example:
        >>> alone = Processes()
        >>> alone.all_gather_object("a number", 3), alone.world_size, alone.is_first
        ([3], 1, True)
    """

    def __init__(self, share: int = 0, shares: int = 1, group: Optional[dist.ProcessGroup] = None, in_step: bool = False) -> None:
        self.share = share
        self.shares = shares
        self.group = group
        self.in_step = in_step
        running = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if running else 1
        """All processes."""
        self.rank = dist.get_rank() if running else 0
        """Of this one."""
        self.sums = 0
        """How many sums over the processes `all_reduce_sum` has asked for."""
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

    def all_gather_object(self, what: str, item: Any, each_share: bool = False) -> list[Any]:
        """Give something to all processes, and get theirs, in their order.

        Args:
            what: names it; a process that has gone another way gives something else.
            item: small and picklable, without tensors on a device.
            each_share: give one item for each part of the data, not for each process.

        Raises:
            OtherProcessError: if another process has failed, or gone another way.
        """
        messages = self._gather(_Message(self.share, what, item))
        for number, message in enumerate(messages):
            if message.problem is not None:
                raise OtherProcessError(f"process {number}: {message.problem}")
        if len({message.what for message in messages}) > 1:
            ways = ", ".join(f"process {number} at {message.what!r}" for number, message in enumerate(messages))
            raise OtherProcessError(f"the processes have gone different ways: {ways}; does a step depend on the rank?")
        if not each_share:
            return [message.item for message in messages]
        firsts = {message.share: message.item for message in reversed(messages)}
        return [firsts[share] for share in sorted(firsts)]

    def broadcast(self, what: str, item: Any) -> Any:
        """What the first process says."""
        return self.all_gather_object(what, item)[0]

    def fail(self, error: Exception) -> None:
        """Tell the others, who wait in `all_gather_object`, that this process cannot go on."""
        if not (isinstance(error, OtherProcessError) or self.in_step or self._broken):
            self._broken = True  # told once
            with suppress(RuntimeError):  # where the others are gone: this process's own error says more
                self._gather(_Message(self.share, "", None, problem=str(error) or type(error).__name__))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside fails in all processes."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, other code than ours makes the processes wait for each other: who fails there tells nobody."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors up over the parts of the data, in place, each by one collective operation."""
        if self.shares == 1:
            return
        for tensor in tensors:
            self.sums += 1
            dist.all_reduce(tensor, group=self.group)

    def _gather(self, message: _Message) -> list[_Message]:
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(messages, message)
        except RuntimeError as error:
            self._broken = True  # nobody can be told anything any more
            raise RuntimeError(f"process {self.rank} has lost the others, look at their messages ({error})") from error
        return messages


class Collectives(TorchDispatchMode):
    """Sees whether what runs inside communicates with other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen |= "c10d" in func.namespace
        return func(*args, **(kwargs or {}))

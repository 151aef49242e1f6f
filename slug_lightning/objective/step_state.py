"""Undo what steps write: to parameters and buffers, to attributes, to metric objects and whatever else the module holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.attributes import Attributes
from slug_lightning.objective.stand_ins import Spent
from slug_lightning.tensors.dtensor import is_sharded, reshard
from slug_lightning.tensors.memory import storages, written_tensors
from slug_lightning.utils.names import some_of


class Scope:
    """What must be put back where a block ends."""

    def __init__(self, before: Attributes, watches: bool, watched: bool = True) -> None:
        self.before = before
        self.watches = watches
        tensors = before.tensors if watches and watched else ()
        self.storages = {memory._cdata for one in tensors for memory in storages(one.held)}
        self.versions = [] if watches else [one.version for one in before.tensors]
        self.copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        """Memory that was written to, and what was there before."""
        self.states = before.states()
        self.is_whole = True
        """Whether what runs inside is all that its name stands for."""

    def put_back(self) -> None:
        """Let everything be as it was."""
        with _disable_current_modes():  # these operations are ours
            self.before.put_back()
            for memory, copy in self.copies.values():
                memory.copy_(copy)
        for state in self.states:
            state()

    def unnoticed(self) -> list[str]:
        """Names of tensors that were written to though nobody watched."""
        pairs = zip(self.before.tensors, self.versions, strict=True) if self.versions else ()
        return [one.name for one, before in pairs if one.version != before]


class StepState:
    """Runs steps of a module, and lets everything that it holds be as before, bit for bit.

    What attributes, containers and objects hold is compared by identity. Of tensors only those are copied that a step writes
    to, just before it does: every operation is looked at during the first pass over some data, and in all passes once a step
    has written to anything. Nothing is communicated: each process puts back what it has changed itself.

    Args:
        module: whose steps run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._now: Attributes | None = None
        """What the module held when it was last looked at."""
        self._scopes: list[Scope] = []
        self._known: set[Hashable] = set()
        """Passes in which no step has written to a tensor."""
        self._writes = False

    @contextmanager
    def undone(self, only_if_it_fails: bool = False, where: Hashable = None) -> Iterator[Scope]:
        """Undo afterwards what happens inside.

        Args:
            only_if_it_fails: leave everything as it is if no exception is raised.
            where: names the pass that runs inside, if it will run again; then it need not be watched again.
        """
        outer = self._scopes[-1] if self._scopes else None
        if outer is None:  # as a shard, a tensor is always the same object
            reshard(self.module)
        watches = outer.watches if outer else self._writes or where not in self._known
        # Within a pass a sharded model also holds gathered tensors, to which FSDP2 writes.
        scope = Scope(self._look(), watches, watched=outer is None or not is_sharded(self.module))
        self._scopes.append(scope)
        try:
            with _Writes(self) if watches and outer is None else nullcontext():
                yield scope
        except BaseException:
            only_if_it_fails = False
            raise
        else:
            if outer is None and where is not None and scope.is_whole:
                self._known.add(where)
        finally:
            self._scopes.pop()
            if not only_if_it_fails:
                self._put_back(scope)
            elif outer is not None:
                outer.copies = scope.copies | outer.copies
        if outer is None and (missed := scope.unnoticed()):
            raise UnlearnError(
                f"{type(self.module).__name__}: a step has written to {some_of(missed)}, which it didn't do before on the same "
                "data, so that no copy was made, and the weights are not what they were; load them again, and let the step "
                "write each time or never"
            )

    def holds_iterators(self) -> bool:
        """Whether a step could use up what nobody can set back."""
        return any(type(outlet.stand_in) is Spent for outlet in self._look().outlets)

    def put_stand_ins(self) -> None:
        """Inside `undone`, let steps find stand-ins for the iterators, files and loggers among the attributes."""
        for container, key, stand_in in self._scopes[-1].before.outlets:
            container[key] = stand_in

    def is_about_to_write(self, memory: torch.UntypedStorage) -> None:
        """Copy what is about to be overwritten, if it is the module's and was not copied before."""
        key = memory._cdata
        if key not in self._scopes[-1].copies and any(key in scope.storages for scope in self._scopes):
            self._writes = True
            with _disable_current_modes():
                self._scopes[-1].copies[key] = memory, memory.clone()

    def _look(self) -> Attributes:
        """What the module holds; the same object as before if that is the same."""
        if self._now is None or not self._now.is_current():
            self._now = Attributes(self.module)
        return self._now

    def _put_back(self, scope: Scope) -> None:
        if not self._scopes:  # else only this rank might do so, and gather again when the others don't
            reshard(self.module)
        scope.put_back()
        self._now = scope.before


class _Writes(TorchDispatchMode):
    """Tells of every operation that writes to a tensor."""

    supports_higher_order_operators = True

    def __init__(self, state: StepState) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written_tensors(func, args, kwargs):
            for memory in storages(tensor):
                self.state.is_about_to_write(memory)
        return func(*args, **kwargs)

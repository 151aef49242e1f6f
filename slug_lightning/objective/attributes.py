"""What a module holds at one moment: its attributes, and the containers, objects and tensors that these lead to."""

from __future__ import annotations

import functools
import itertools
import operator
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slug_lightning.objective.stand_ins import Silent, Spent, stand_in_for
from slug_lightning.tensors.digests import UNCHANGEABLE
from slug_lightning.tensors.dtensor import is_sharded
from slug_lightning.tensors.memory import plain_tensors, version

MOST = 100_000
"""Containers and objects that are looked at; what lies behind more of them, as the records of a data set, is left alone."""
HOOKS = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)} - {"_parameters", "_buffers", "_modules"}
"""Attributes in which PyTorch keeps a module's hooks."""
LEAVES = {*UNCHANGEABLE, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType, Silent, Spent}
CLOSED = ("lightning.", "pytorch_lightning.", "torch.", "logging", "threading", "multiprocessing", "concurrent", "asyncio")
"""Packages whose objects, such as a Trainer or a loader, are no state of the module, though it may hold them."""


class Held(Protocol):
    """The content of one container, as it was."""

    def is_same(self) -> bool:
        """Whether the container holds the same objects."""

    def put_back(self) -> None:
        """Let the container hold them again."""


class _Dict:
    def __init__(self, held: dict) -> None:
        self.held = held
        self.kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict  # whatever a subclass makes of it
        self.keys, self.values = list(self.kind.keys(held)), list(self.kind.values(held))

    def is_same(self) -> bool:
        same = len(self.held) == len(self.keys) and all(map(operator.is_, self.keys, self.kind.keys(self.held)))
        return same and all(map(operator.is_, self.values, self.kind.values(self.held)))

    def put_back(self) -> None:
        self.kind.clear(self.held)
        for key, value in zip(self.keys, self.values, strict=True):
            self.kind.__setitem__(self.held, key, value)


class _Sequence:
    def __init__(self, held: list | deque) -> None:
        self.held = held
        self.items = list(held)

    def is_same(self) -> bool:
        return len(self.held) == len(self.items) and all(map(operator.is_, self.items, self.held))

    def put_back(self) -> None:
        self.held.clear()
        self.held.extend(self.items)


class _Set:
    def __init__(self, held: set) -> None:
        self.held = held
        self.items = set(held)

    def is_same(self) -> bool:
        return self.held == self.items

    def put_back(self) -> None:
        self.held.clear()
        self.held.update(self.items)


class _Slots:
    def __init__(self, held: Any) -> None:
        self.held = held
        self.values = {name: getattr(held, name) for name in _slots(held) if hasattr(held, name)}

    def is_same(self) -> bool:
        now = {name: getattr(self.held, name) for name in _slots(self.held) if hasattr(self.held, name)}
        return now.keys() == self.values.keys() and all(now[name] is value for name, value in self.values.items())

    def put_back(self) -> None:
        for name in _slots(self.held):
            if name in self.values:
                object.__setattr__(self.held, name, self.values[name])
            elif hasattr(self.held, name):
                object.__delattr__(self.held, name)


class _Numbers:
    """An array, or bytes: nothing tells who writes to it, so that all of it is copied."""

    def __init__(self, held: Any) -> None:
        self.held = held
        self.copy: Any = held.copy()

    def is_same(self) -> bool:
        if isinstance(self.held, bytearray):
            return self.held == self.copy
        return self.held.shape == self.copy.shape and self.held.tobytes() == self.copy.tobytes()

    def put_back(self) -> None:
        if isinstance(self.held, np.ndarray):
            self.held[...] = self.copy
        else:
            self.held[:] = self.copy


class _Tensor:
    """A tensor's memory, which `tensor.data = …` exchanges, and whether it gets a gradient."""

    def __init__(self, held: Tensor, name: str) -> None:
        self.held = held
        self.name = name
        self.requires_grad = held.requires_grad
        self.parts = [(part, part.detach()) for part in plain_tensors(held) if part.layout == torch.strided]

    @property
    def version(self) -> int:
        """How often it was written to."""
        return sum(version(part) for part, _ in self.parts)

    def is_same(self) -> bool:
        return self.held.requires_grad == self.requires_grad and all(itertools.starmap(_is_same_memory, self.parts))

    def put_back(self) -> None:
        for part, before in self.parts:
            if not _is_same_memory(part, before):
                part.data = before
        if self.held.requires_grad != self.requires_grad and self.held.is_leaf:
            self.held.requires_grad_(self.requires_grad)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class Outlet(NamedTuple):
    """Where a container holds what can be used only once, or tells others: an iterator, a file, a logger."""

    container: Any
    key: Any
    stand_in: Any


class Attributes:
    """All that a module holds now, by identity: cheap to compare and to put back, as no tensor is copied."""

    def __init__(self, module: nn.Module) -> None:
        self.held: list[Held] = []
        self.tensors: list[_Tensor] = []
        self.generators: list[Any] = []
        self.outlets: list[Outlet] = []
        self._is_sharded = is_sharded(module)
        self._seen: set[int] = set()
        self._next: deque[tuple[Any, str]] = deque()
        self._visit(module, "", None, None)
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):  # of a scripted module, too
            self._visit(tensor, name, None, None)
        while self._next and len(self.held) < MOST:
            self._open(*self._next.popleft())
        self._next.clear()

    def is_current(self) -> bool:
        """Whether the module still holds all this."""
        return all(one.is_same() for one in self.held) and all(one.is_same() for one in self.tensors)

    def put_back(self) -> None:
        """Let the module hold all this again."""
        for one in itertools.chain[Held](self.held, self.tensors):
            if not one.is_same():
                one.put_back()

    def states(self) -> list[Callable[[], Any]]:
        """Functions that put the generators of random numbers back as they are now."""
        return [_state(generator) for generator in self.generators]

    def _visit(self, value: Any, name: str, container: Any, key: Any) -> None:
        """Note what is found in a container, and whether to look into it."""
        if type(value) in LEAVES:
            return
        if container is not None and (stand_in := stand_in_for(value, name)) is not None:
            self.outlets.append(Outlet(container, key, stand_in))  # wherever it is found
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.tensors.append(_Tensor(value, name))
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self.generators.append(value)
        else:
            self._next.append((value, name))

    def _open(self, value: Any, name: str) -> None:
        """Note the content of a container or an object, and visit it."""
        kind: Any = type(value)
        if isinstance(value, nn.Module):
            self._open_dict(vars(value), name, HOOKS | {"_parameters"} if self._is_sharded else HOOKS)
            if self._is_sharded:  # where it puts shards and what it has gathered, FSDP2 decides
                for key, parameter in value._parameters.items():
                    self._visit(parameter, f"{name}.{key}".lstrip("."), None, None)
        elif isinstance(value, dict):
            self._open_dict(value, name)
        elif isinstance(value, (list, deque, tuple)):
            if not isinstance(value, tuple):
                self.held.append(_Sequence(value))
            for number, item in enumerate(value):
                self._visit(item, f"{name}[{number}]", None if isinstance(value, tuple) else value, number)
        elif isinstance(value, set):
            self.held.append(_Set(value))
        elif isinstance(value, bytearray) or (isinstance(value, np.ndarray) and _is_writable(value)):
            self.held.append(_Numbers(value))
        elif _is_open(kind):
            if isinstance(getattr(value, "__dict__", None), dict):
                self._open_dict(vars(value), name)
            if _slots(value):
                self.held.append(_Slots(value))
                for slot in _slots(value):
                    self._visit(getattr(value, slot, None), f"{name}.{slot}", None, None)

    def _open_dict(self, content: dict, name: str, left_out: set[str] | frozenset[str] = frozenset()) -> None:
        self.held.append(_Dict(content))
        for key, item in content.items():
            if key not in left_out:
                inner = name if key in ("_parameters", "_buffers", "_modules") else f"{name}.{key}".lstrip(".")
                self._visit(item, inner, content, key)


def _is_writable(array: np.ndarray) -> bool:
    return array.flags.writeable and not isinstance(array, np.memmap) and not array.dtype.hasobject


@functools.cache
def _is_open(kind: Any) -> bool:
    """Whether objects of a class are looked into: those of the user's own classes, and optimizers."""
    if issubclass(kind, (Enum, type, torch.optim.Optimizer)):
        return issubclass(kind, torch.optim.Optimizer)
    return not any(f"{base.__module__}.".startswith(CLOSED) for base in kind.__mro__)


def _slots(held: Any) -> tuple[str, ...]:
    """The attributes of an object that are in no `__dict__`."""
    kind: Any = type(held)
    return _slots_of(kind)


@functools.cache
def _slots_of(kind: Any) -> tuple[str, ...]:

    def names() -> Iterator[str]:
        for base in kind.__mro__:
            own = vars(base).get("__slots__", ())
            for name in (own,) if isinstance(own, str) else tuple(own):
                if name not in ("__dict__", "__weakref__"):
                    is_private = name.startswith("__") and not name.endswith("__")
                    yield f"_{base.__name__.lstrip('_')}{name}" if is_private else name

    return tuple(names())


def _state(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)

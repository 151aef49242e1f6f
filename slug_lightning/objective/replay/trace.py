"""Find out, in one ordinary run of one batch, which module calls depend on which layer."""

from __future__ import annotations

import functools
import random
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from slug_lightning.tensors.digests import UNCHANGEABLE
from slug_lightning.tensors.layers import Layer

ROOT = 0
"""The place of everything that is not inside a module call."""
EVERY = -1
"""As a bit mask: every layer."""


class CannotTrace(RuntimeError):
    """What depends on what cannot be told for this module."""


class Places:
    """Numbers the places of a program: the n-th call of a module within another call.

    The number of a place does not depend on what happens elsewhere, so that leaving out a call moves no other.

    Args:
        module: whose modules' calls are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(_interceptable(module))
        self.numbers: dict[tuple[int, int, int], int] = {}
        self.parents = [ROOT]
        """By place: the place around it, whose number is smaller."""
        self.names = ["the step"]
        self.stack = [ROOT]

    @contextmanager
    def intercepted(self, visit: Callable[[int, Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
        """Inside, every call of a module is `visit(place, forward, args, kwargs)`."""
        own = {name: vars(m)["forward"] for name, m in self.modules if "forward" in vars(m)}
        calls = [Counter[int]()]
        self.stack = [ROOT]

        def wrapped(number: int, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)  # some libraries ask for a forward's signature
            def call(*args: Any, **kwargs: Any) -> Any:
                key = (self.stack[-1], number, calls[-1][number])
                calls[-1][number] += 1
                if key not in self.numbers:
                    self.numbers[key] = len(self.parents)
                    self.parents.append(key[0])
                    self.names.append(name)
                self.stack.append(self.numbers[key])
                calls.append(Counter())
                try:
                    return visit(self.numbers[key], forward, args, kwargs)
                finally:
                    self.stack.pop()
                    calls.pop()

            return call

        try:
            for number, (name, m) in enumerate(self.modules):
                vars(m)["forward"] = wrapped(number, name, m.forward)
            yield
        finally:
            for name, m in self.modules:
                vars(m).pop("forward", None)
                if name in own:
                    vars(m)["forward"] = own[name]


def _interceptable(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose calls can be looked at: not what is scripted, nor metrics, which count."""
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, (torch.jit.ScriptModule, torchmetrics.Metric)):
        return
    seen.add(id(module))
    yield name or type(module).__name__, module
    for child_name, child in module.named_children():
        yield from _interceptable(child, f"{name}.{child_name}".lstrip("."), seen)


@dataclass(eq=False)
class _Memory:
    """What is known of one storage.

    Attributes:
        storage: refers to it, weakly.
        bits: the layers it depends on.
        home: place that made it; None if it was there before.
        writer: place that wrote to it last.
        writes: how often it was written to.
        returned: each output that is this memory: place, position, number of writes by then.
    """

    storage: weakref.ref[torch.UntypedStorage]
    bits: int = 0
    home: int | None = None
    writer: int | None = None
    writes: int = 0
    returned: list[tuple[int, int, int]] = field(default_factory=list)

    def as_returned(self) -> list[tuple[int, int]]:
        """The outputs that are this memory as it is now."""
        return [(place, position) for place, position, writes in self.returned if writes == self.writes]


class _Read(NamedTuple):
    """An operation reads a memory: where, who wrote it, how often it was written to, which outputs it is."""

    place: int
    writer: int | None
    memory: _Memory
    writes: int
    outputs: list[tuple[int, int]]


class Output(NamedTuple):
    """What a call returned: its leaves, and how they hang together."""

    leaves: list[Any]
    structure: TreeSpec


class Plan(NamedTuple):
    """How to evaluate an edit of one layer.

    Attributes:
        skipped: calls that need not be computed, though the code around them is.
        kept: of their outputs those that are read: place and position.
        changed: of these, those that are written to later, so that a copy must be handed out.
        reason: why nothing can be skipped, or None.
    """

    skipped: frozenset[int] = frozenset()
    kept: frozenset[tuple[int, int]] = frozenset()
    changed: frozenset[tuple[int, int]] = frozenset()
    reason: str | None = None


class Trace(TorchDispatchMode):
    """Follows the influence of layers through one run: from their tensors through every operation to module outputs.

    Influence is followed operation by operation and not by `requires_grad`, since it also passes `no_grad` blocks,
    `detach`, `argmax` and generated text. What leaves the tensors (`item()`, `tolist()`, a data-dependent shape) may
    decide anything that happens afterwards.

    Args:
        places: of the module.
        layers: candidates; the number in this list is the layer's bit.
        before: the trace of the batch before: what still lives of it may have been remembered, and matters again.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> places = Places(net)
        >>> trace = Trace(places, [Layer(f"{i}.weight", {"weight": net[i].weight}) for i in (0, 2)])
        >>> with torch.no_grad():
        ...     trace.run(lambda: net(torch.ones(1, 2)))
        >>> [sorted(places.names[place] for place in trace.plan(layer).skipped) for layer in (0, 1)]
        [[], ['0', '1']]
    """

    def __init__(self, places: Places, layers: Sequence[Layer], before: Trace | None = None) -> None:
        super().__init__()
        self.places = places
        self.memory: dict[int, _Memory] = {}
        for old in before.memory.values() if before else ():
            storage = old.storage()
            if old.bits and storage is not None:
                self.memory[storage._cdata] = _Memory(old.storage, old.bits)
        for number, layer in enumerate(layers):
            for parameter in layer.parameters.values():
                self._of(parameter).bits |= 1 << number
        # What a module has assigned may be a number, and decide what the next batch does.
        self.escaped: int = before.escaped if before and before.assigned else 0
        self.assigned: bool = False
        self.failed: CannotTrace | None = None
        self.depends: dict[int, int] = {}
        self.outputs: dict[int, Output] = {}
        """By place, each leaf as it was when the call returned."""
        self.reads: list[_Read] = []
        self.writes: list[tuple[int, _Memory]] = []

    def run(self, step: Callable[[], Any]) -> None:
        """Run one batch.

        Raises:
            CannotTrace: if a tensor has no plain memory.
        """
        with self.places.intercepted(self._visit), _conversions_seen_by(self._escapes), _assignments_seen_by(self._assign), self:
            step()
        if self.failed:  # and somebody has caught it
            raise self.failed

    def _of(self, tensor: Tensor) -> _Memory:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError) as error:
            self.failed = CannotTrace(f"a tensor without plain memory ({type(tensor).__name__})")
            raise self.failed from error
        if storage._cdata not in self.memory:
            self.memory[storage._cdata] = _Memory(weakref.ref(storage))
        return self.memory[storage._cdata]

    def _escapes(self, tensor: Tensor) -> None:
        self.escaped |= self._of(tensor).bits

    def _assign(self) -> None:
        """A module gets an attribute: what is inside which calls must not be left out, as others may read it."""
        self.assigned = True
        self.depends.update(dict.fromkeys(self.places.stack, EVERY))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        here = self.places.stack[-1]
        given = {id(m): m for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) for m in [self._of(leaf)]}
        written = {id(m): m for leaf in _written(func, args, kwargs) for m in [self._of(leaf)]}
        bits = 0
        for m in given.values():
            bits |= m.bits
            self.reads.append(_Read(here, m.writer, m, m.writes, m.as_returned()))
        for m in written.values():
            for place, position in m.as_returned():
                leaves = self.outputs[place].leaves
                leaves[position] = leaves[position].clone()
        out = func(*args, **kwargs)
        for m in written.values():
            m.bits, m.writer, m.writes = m.bits | bits, here, m.writes + 1
            self.writes.append((here, m))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                self.escaped |= 0 if leaf is None else bits
            elif id(self._of(leaf)) not in given:  # new, perhaps where something freed has been
                storage = leaf.untyped_storage()
                self.memory[storage._cdata] = _Memory(weakref.ref(storage), bits, here, here)
        if torch.Tag.dynamic_output_shape in func.tags:
            self.escaped |= bits
        return out

    def _visit(self, place: int, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        before = _random_states()
        out = forward(*args, **kwargs)
        leaves, structure = tree_flatten(out)
        self.outputs[place] = Output(leaves, structure)
        bits = self.escaped | self.depends.get(place, 0)
        if _random_states() != before:
            bits = EVERY  # left out, it would leave its random numbers to others
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                m = self._of(leaf)
                bits |= m.bits
                m.returned.append((place, position, m.writes))
            elif not isinstance(leaf, UNCHANGEABLE):
                bits = EVERY  # an object of its own kind: nobody knows what it holds
        self.depends[place] = bits
        return out

    def let_go(self, held: Collection[int]) -> list[tuple[int, int]]:
        """Let go of every output; gives those, place and position, that somebody else remembers.

        They outlive their batch, so later code may read them.

        Args:
            held: storages that the caller keeps alive.
        """
        self.outputs.clear()
        self.reads.clear()
        self.writes.clear()
        living = [m for key, m in self.memory.items() if m.home is not None and key not in held and m.storage() is not None]
        return [(place, position) for m in living for place, position, _ in m.returned]

    def kept_by(self, plan: Plan) -> dict[tuple[int, int], Tensor]:
        """The outputs that a plan reads, each as it was when the call returned."""
        return {(place, position): self.outputs[place].leaves[position] for place, position in plan.kept}

    def plan(self, layer: int) -> Plan:
        """Say what need not be computed again when only this layer changes."""
        gone: dict[int | None, bool] = {ROOT: False, None: False}  # is it, or a call around it, left out?
        for place in range(1, len(self.places.parents)):
            unchanged = not (self.depends.get(place, EVERY) >> layer) & 1
            gone[place] = unchanged or gone[self.places.parents[place]]
        skipped = frozenset(p for p, left_out in gone.items() if p and left_out and not gone[self.places.parents[p]])
        for place, memory in self.writes:
            if gone[place] and not gone[memory.home]:
                return Plan(reason=f"{self.places.names[place]} changes a buffer, or what it was given")
        kept: dict[tuple[int, int], bool] = {}
        times: dict[int, int] = {}
        for read in self.reads:
            if gone[read.place]:
                continue
            outputs = [output for output in read.outputs if output[0] in skipped]
            if gone[read.writer] and not outputs:
                assert read.writer is not None
                return Plan(reason=f"{self.places.names[read.writer]} hands on a value otherwise than as its output")
            if outputs and times.setdefault(id(read.memory), read.writes) != read.writes:
                return Plan(reason=f"an output of {self.places.names[outputs[0][0]]} is overwritten and read again")
            kept.update(dict.fromkeys(outputs, read.memory.writes > read.writes))
        return Plan(skipped, frozenset(kept), frozenset(output for output, changed in kept.items() if changed))


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


to_numpy = Tensor.numpy  # as it is while nobody listens


def _random_states() -> list[Any]:
    """Where the generators of random numbers stand."""
    with _disable_current_modes():  # these operations are ours
        states = [torch.default_generator.get_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
        torch_states = [to_numpy(state).tobytes() for state in states]
    _, numbers, position, *_ = np.random.get_state(legacy=True)
    return [*torch_states, random.getstate(), numbers.tobytes(), position]  # type: ignore[union-attr]


@contextmanager
def _assignments_seen_by(spy: Callable[[], None]) -> Iterator[None]:
    """Inside, `spy` is called whenever a module's attribute is set."""
    own = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        spy()
        own(module, name, value)

    try:
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.__setattr__ = own  # type: ignore[method-assign]


@contextmanager
def _conversions_seen_by(spy: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `spy` gets every tensor that becomes a list or an array, which is no operation that a mode would see."""
    names = ("numpy", "tolist", "__array__", "__dlpack__")
    own = {name: vars(Tensor)[name] for name in names if name in vars(Tensor)}

    def seen(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            spy(tensor)
            return method(tensor, *args, **kwargs)

        return convert

    try:
        for name in names:
            setattr(Tensor, name, seen(getattr(Tensor, name)))
        yield
    finally:
        for name in names:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)

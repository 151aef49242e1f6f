"""Find out, in one ordinary run of one batch, which module calls depend on which layer."""

from __future__ import annotations

import functools
import random
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
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
from slug_lightning.tensors.memory import written_tensors

ROOT = 0
"""The call of the step itself: all that is not inside a module call."""
EVERY = -1
"""As a bit mask: every layer."""
CONVERSIONS = ("numpy", "tolist", "__array__", "__dlpack__")
"""Methods by which a tensor becomes a list or an array, which are no operations that a mode would see."""
OutputAt = tuple[int, int]
"""One leaf of what a call returned: the call's number, and the leaf's position."""


class CannotTrace(RuntimeError):
    """Dependencies of this module cannot be found."""


class ModuleCalls:
    """Numbers the module calls of a step: the n-th call of a module within another call.

    A call's number does not depend on what happens elsewhere, so that skipping one call renumbers no other.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(_interceptable(module))
        self.numbers: dict[tuple[int, int, int], int] = {}
        self.parents = [ROOT]
        """By call: the call around it, whose number is smaller."""
        self.names = ["the step"]
        self.stack = [ROOT]

    @contextmanager
    def intercepted(self, visit: Callable[[int, Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
        """Inside, every call of a module is `visit(call, forward, args, kwargs)`."""
        own = {name: vars(m)["forward"] for name, m in self.modules if "forward" in vars(m)}
        counts = [Counter[int]()]
        self.stack = [ROOT]

        def wrapped(index: int, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)  # some libraries ask for a forward's signature
            def visited(*args: Any, **kwargs: Any) -> Any:
                key = (self.stack[-1], index, counts[-1][index])
                counts[-1][index] += 1
                if key not in self.numbers:
                    self.numbers[key] = len(self.parents)
                    self.parents.append(key[0])
                    self.names.append(name)
                self.stack.append(self.numbers[key])
                counts.append(Counter())
                try:
                    return visit(self.numbers[key], forward, args, kwargs)
                finally:
                    self.stack.pop()
                    counts.pop()

            return visited

        try:
            for index, (name, m) in enumerate(self.modules):
                vars(m)["forward"] = wrapped(index, name, m.forward)
            yield
        finally:
            for name, m in self.modules:
                vars(m).pop("forward", None)
                if name in own:
                    vars(m)["forward"] = own[name]


def _interceptable(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose calls can be looked at: neither scripted ones, nor metrics, which count."""
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, (torch.jit.ScriptModule, torchmetrics.Metric)):
        return
    seen.add(id(module))
    yield name or type(module).__name__, module
    for child_name, child in module.named_children():
        yield from _interceptable(child, f"{name}.{child_name}".lstrip("."), seen)


@dataclass(eq=False)
class _Memory:
    """What is known of one storage."""

    storage: weakref.ref[torch.UntypedStorage]
    bits: int = 0
    """The layers it depends on."""
    home: int | None = None
    """The call that made it; None if it was there before."""
    writer: int | None = None
    """The call that wrote to it last."""
    writes: int = 0
    returned: list[tuple[OutputAt, int]] = field(default_factory=list)
    """Each output that is this memory, and the number of writes by then."""

    def as_returned(self) -> list[OutputAt]:
        """The outputs that are this memory as it is now."""
        return [output for output, writes in self.returned if writes == self.writes]


class _Read(NamedTuple):
    """An operation in a call reads a memory, which is these outputs."""

    call: int
    writer: int | None
    memory: _Memory
    writes: int
    outputs: list[OutputAt]


class Output(NamedTuple):
    """What a call returned: its leaves, and their structure."""

    leaves: list[Any]
    structure: TreeSpec


class SkipPlan(NamedTuple):
    """How to evaluate an edit of one layer."""

    skipped: frozenset[int] = frozenset()
    """Calls that need not be computed, though the code around them is."""
    kept: frozenset[OutputAt] = frozenset()
    """Their outputs that are read."""
    changed: frozenset[OutputAt] = frozenset()
    """Of these, those that are written to later, so that a copy must be handed out."""
    reason: str | None = None
    """Why nothing can be skipped, or None."""


class Trace(TorchDispatchMode):
    """Follows the influence of layers through one run, from their tensors through every operation to module outputs.

    Influence is followed operation by operation and not by `requires_grad`, since it also passes `no_grad` blocks,
    `detach`, `argmax` and generated text. What leaves the tensors (`item()`, `tolist()`, a data-dependent shape) may
    decide anything that happens afterwards. A layer's bit is its position in `layers`. What still lives of the batch
    `before` may have been remembered, and matters again.
    """

    def __init__(self, calls: ModuleCalls, layers: Sequence[Layer], before: Trace | None = None) -> None:
        super().__init__()
        self.calls = calls
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
        """By call, each leaf as it was when the call returned."""
        self.reads: list[_Read] = []
        self.writes: list[tuple[int, _Memory]] = []

    def run(self, step: Callable[[], Any]) -> None:
        """Run one batch; raises `CannotTrace` if a tensor has no plain memory."""
        conversions = _spied(Tensor, CONVERSIONS, self._escapes)
        assignments = _spied(nn.Module, ["__setattr__"], self._assign)
        with self.calls.intercepted(self._visit), conversions, assignments, self:
            step()
        if self.failed:  # and somebody has caught it
            raise self.failed

    def _of(self, tensor: Tensor) -> _Memory:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError) as error:
            self.failed = CannotTrace(f"a tensor without plain memory ({type(tensor).__name__})")
            raise self.failed from error
        known = self.memory.get(storage._cdata)
        if known is None or known.storage() is None:  # what was there is gone: another tensor lies in its place
            known = self.memory[storage._cdata] = _Memory(weakref.ref(storage))
        return known

    def _escapes(self, tensor: Tensor) -> None:
        self.escaped |= self._of(tensor).bits

    def _assign(self, _: nn.Module) -> None:
        """A module gets an attribute: the calls around must not be skipped, as others may read it."""
        self.assigned = True
        self.depends.update(dict.fromkeys(self.calls.stack, EVERY))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        here = self.calls.stack[-1]
        given = {id(m): m for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) for m in [self._of(leaf)]}
        written = {id(m): m for leaf in written_tensors(func, args, kwargs) for m in [self._of(leaf)]}
        bits = 0
        for m in given.values():
            bits |= m.bits
            self.reads.append(_Read(here, m.writer, m, m.writes, m.as_returned()))
        for m in written.values():
            for call, position in m.as_returned():
                leaves = self.outputs[call].leaves
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

    def _visit(self, call: int, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        before = _random_states()
        out = forward(*args, **kwargs)
        leaves, structure = tree_flatten(out)
        self.outputs[call] = Output(leaves, structure)
        bits = self.escaped | self.depends.get(call, 0)
        if _random_states() != before:
            bits = EVERY  # skipped, it would leave its random numbers to others
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                m = self._of(leaf)
                bits |= m.bits
                m.returned.append(((call, position), m.writes))
            elif not isinstance(leaf, UNCHANGEABLE):
                bits = EVERY  # an object of its own kind: nobody knows what it holds
        self.depends[call] = bits
        return out

    def release(self, held: Collection[int]) -> list[OutputAt]:
        """Drop every output; return those that anybody but the caller, who has `held` storages, keeps alive for later code."""
        self.outputs.clear()
        self.reads.clear()
        self.writes.clear()
        living = [m for key, m in self.memory.items() if m.home is not None and key not in held and m.storage() is not None]
        return [output for m in living for output, _ in m.returned]

    def kept_by(self, plan: SkipPlan) -> dict[OutputAt, Tensor]:
        """The outputs that a plan reads, each as it was when the call returned."""
        return {(call, position): self.outputs[call].leaves[position] for call, position in plan.kept}

    def plan(self, layer: int) -> SkipPlan:
        """Find what need not be computed again when only this layer changes."""
        names, parents = self.calls.names, self.calls.parents
        gone: dict[int | None, bool] = {ROOT: False, None: False}  # is it, or a call around it, skipped?
        for call in range(1, len(parents)):
            unchanged = not (self.depends.get(call, EVERY) >> layer) & 1
            gone[call] = unchanged or gone[parents[call]]
        skipped = frozenset(call for call, is_gone in gone.items() if call and is_gone and not gone[parents[call]])
        for call, memory in self.writes:
            if gone[call] and not gone[memory.home]:
                return SkipPlan(reason=f"{names[call]} changes a buffer, or its arguments")
        kept: dict[OutputAt, bool] = {}
        times: dict[int, int] = {}
        for read in self.reads:
            if gone[read.call]:
                continue
            outputs = [output for output in read.outputs if output[0] in skipped]
            if gone[read.writer] and not outputs:
                assert read.writer is not None
                return SkipPlan(reason=f"{names[read.writer]} hands on a value otherwise than as its output")
            if outputs and times.setdefault(id(read.memory), read.writes) != read.writes:
                return SkipPlan(reason=f"an output of {names[outputs[0][0]]} is overwritten and read again")
            kept.update(dict.fromkeys(outputs, read.memory.writes > read.writes))
        return SkipPlan(skipped, frozenset(kept), frozenset(output for output, changed in kept.items() if changed))


to_numpy = Tensor.numpy  # as it is while nobody listens


def _random_states() -> list[Any]:
    """The states of all generators of random numbers."""
    with _disable_current_modes():  # these operations are ours
        states = [torch.default_generator.get_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
        torch_states = [to_numpy(state).tobytes() for state in states]
    _, numbers, position, *_ = np.random.get_state(legacy=True)
    return [*torch_states, random.getstate(), numbers.tobytes(), position]  # type: ignore[union-attr]


@contextmanager
def _spied(owner: type, names: Sequence[str], spy: Callable[[Any], None]) -> Iterator[None]:
    """Inside, `spy` gets every object of a class before one of these methods is called on it."""
    own = {name: vars(owner)[name] for name in names if name in vars(owner)}

    def spying(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
            spy(instance)
            return method(instance, *args, **kwargs)

        return call

    try:
        for name in names:
            setattr(owner, name, spying(getattr(owner, name)))
        yield
    finally:
        for name in names:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)

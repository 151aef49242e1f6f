"""Evaluate an edited model by computing only what the edit can change.

While the original is evaluated, `trace.Trace` finds out which module calls depend on which layer. Of the calls that do not,
`Replay` keeps the outputs that other code reads, and returns them in later evaluations instead of computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from slug_lightning.objective.log_capture import Attempt
from slug_lightning.objective.replay.trace import ROOT, ModuleCalls, Output, OutputAt, SkipPlan, Trace
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.digests import UNCHANGEABLE, fingerprint
from slug_lightning.tensors.layers import Layer
from slug_lightning.tensors.memory import version

SHARE = 0.25
"""Of the memory that is free when a run starts, the part that may hold recorded outputs."""
CPU = torch.device("cpu")


class NotKept(RuntimeError):
    """Code reads an output that nothing read when the original was evaluated."""


class Absent(Tensor):
    """Stands for an output that nobody reads: it has a shape and a dtype, and no values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    touched = False
    """Whether anything has tried to read one: a module may catch what is raised."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Absent:
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        Absent.touched = True
        raise NotKept(f"{func} reads an output that was not kept")


@dataclass
class _Recorded:
    """One batch of one pass."""

    fingerprint: list[Any]
    plans: dict[str, SkipPlan]
    """By layer."""
    outputs: dict[int, Output] = field(default_factory=dict)
    """By call, with `Absent` for every tensor."""
    kept: dict[OutputAt, Tensor] = field(default_factory=dict)

    def take(self, trace: Trace) -> None:
        """Take over what the skipped calls returned; of what is not kept only the shape."""
        held = _storages(self.kept.values())
        for call in {call for plan in self.plans.values() for call in plan.skipped}:
            leaves, structure = trace.outputs[call]
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in held:
                    self.kept.setdefault((call, position), leaf)  # costs nothing, as its memory is held anyway
            self.outputs[call] = Output([Absent(v) if isinstance(v, Tensor) else v for v in leaves], structure)


class Replay:
    """Evaluates edits of single layers by computing only what depends on the layer.

    Exact: what is returned was computed by the same code in the same mode, and the first batch of every layer is
    computed both ways and compared to the last bit. Where they differ, or where dependencies cannot be found, everything is
    computed, and `notes()` says so. All weights but the edited layer's must be as they were while recording.

    Bounded: what exceeds the budget of the device goes to the host, and what exceeds the host's is computed again. The
    budget is in bytes, on the device and again on the host; by default a quarter of what is free.

    With `LossStep`s it serves gradients: a call that does not depend on the layer is in no graph of the layer's, so that what
    was recorded stands for it in the forward pass, and the backward pass ends behind it anyway. `purpose` is for notes.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[Layer], budget: int | None = None, purpose: str = "evaluation"
    ) -> None:
        self.purpose = purpose
        self.layers = {layer.name: number for number, layer in enumerate(layers)}
        self.candidates = list(layers)
        self.calls = ModuleCalls(module)
        self.batches: dict[tuple[str, ...], dict[int, _Recorded]] = {}
        self.device = next(iter(module.parameters())).device
        self.budget = {where: int(SHARE * _free(where)) if budget is None else budget for where in (self.device, CPU)}
        self.held = dict.fromkeys(self.budget, 0)
        self.most_held = 0
        self.skipped_calls = 0
        self.over_budget = 0
        """Batches that were computed whole for want of memory."""
        self._before: Trace | None = None
        self._checked: set[tuple[str, str]] = set()
        compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
        # What is inside a compiled module must not see a wrapper, so that nothing is intercepted.
        reason = "a part of the module is compiled, and cannot be traced without changing its bits"
        self._refused: dict[str, str] = dict.fromkeys(self.layers, reason) if compiled else {}

    def run(
        self,
        where: tuple[str, ...],
        number: int,
        batch: Any,
        step: Attempt,
        record: Sequence[str] = (),
        edited: str | None = None,
    ) -> None:
        """Run a batch as an `Evaluator` does."""
        if record:
            self.record(where, number, batch, step, record)
        elif edited:
            self.evaluate(where, number, batch, step, edited)
        else:
            step()

    @property
    def is_of_use(self) -> bool:
        """Whether any layer may still be replayed."""
        return self._refused.keys() != self.layers.keys()

    def refuse(self, reason: str) -> None:
        """Compute everything whole from now on, for this reason."""
        self._refused = dict.fromkeys(self.layers, reason) | self._refused

    # ---- the original

    def record(self, where: tuple[str, ...], number: int, batch: Any, step: Attempt, layers: Sequence[str]) -> None:
        """Run a batch with the original weights, and keep what evaluations of these layers read.

        `where` names the step that runs, then the pass over the data, and `number` the batch in it.
        """
        if all(layer in self._refused for layer in layers):
            step()
            return
        trace = Trace(self.calls, self.candidates, self._before if self.batches.get(where) else None)
        try:
            found = fingerprint(batch)  # first, as a step may write into its batch
            with step.undone(only_if_it_fails=True):
                trace.run(step)
        except Exception as error:  # if it was not the trace's fault, the plain run fails too
            step()
            self._refused.update(dict.fromkeys(layers, f"dependencies could not be traced ({error})"))
            return
        self._before = trace
        plans = {name: trace.plan(self.layers[name]) for name in layers}
        recorded = self.batches.setdefault(where, {})[number] = _Recorded(found, plans)
        # The smallest first: the features of one tower spare as much as all activations of the other.
        for plan in sorted(plans.values(), key=lambda plan: sum(_storages(trace.kept_by(plan).values()).values())):
            self._keep(recorded, {at: t for at, t in trace.kept_by(plan).items() if at not in recorded.kept})
        recorded.take(trace)
        for call, position in trace.release(_storages(recorded.kept.values())):
            for name, plan in plans.items():
                if call in plan.skipped and (call, position) not in recorded.kept:
                    plans[name] = SkipPlan(reason=f"an output of {self.calls.names[call]} is remembered beyond its batch")

    def forget(self) -> None:
        """Drop what was kept."""
        self.batches.clear()
        self.held = dict.fromkeys(self.budget, 0)

    def _keep(self, recorded: _Recorded, outputs: dict[OutputAt, Tensor]) -> None:
        """Keep the outputs that a plan reads, all of them or none."""
        needed = sum(_storages(outputs.values()).values())
        for device in self.budget:
            if self.held[device] + needed <= self.budget[device]:
                recorded.kept.update({at: _moved(tensor.detach(), device) for at, tensor in outputs.items()})
                self.held[device] += needed
                self.most_held = max(self.most_held, sum(self.held.values()))
                return

    # ---- an edit

    def evaluate(self, where: tuple[str, ...], number: int, batch: Any, step: Attempt, layer: str) -> None:
        """Run a batch with one layer edited; the arguments are as in `record`."""
        recorded = self.batches.get(where, {}).get(number)
        plan = recorded.plans.get(layer) if recorded else None
        if recorded is None or plan is None or layer in self._refused:
            step()
        elif not plan.skipped:
            if plan.reason:
                self._refused[layer] = plan.reason
            step()
        elif not plan.kept <= recorded.kept.keys():
            self.over_budget += 1
            step()
        elif not _is_same_batch(recorded.fingerprint, batch):
            self._refused[layer] = "the loader serves other batches, or another order, in every pass"
            step()
        elif problem := self._replay(recorded, plan, step, (where[0], layer)):
            self._refused[layer] = problem

    def _replay(self, recorded: _Recorded, plan: SkipPlan, step: Attempt, name: tuple[str, str]) -> str | None:
        """Run a batch by a plan, the first one of a name also whole; return why the plan cannot be trusted, or None."""
        is_checked = name in self._checked
        self._checked.add(name)
        problem = None
        replayed: dict[OutputAt, Any] = {}
        seen: list[Any] = []
        try:
            with step.undone(only_if_it_fails=is_checked):
                replayed = self._run(recorded, plan, step)
                seen = [] if is_checked else step.seen()
        except Exception as error:  # if it was not the replay's fault, the plain run fails too
            problem = str(error) or type(error).__name__
        if is_checked and problem:
            step()
        elif not is_checked:
            unchanged: list[bool] = []
            computed = self._run(recorded, SkipPlan(), step, plan.kept, unchanged)
            if not step.is_telling:
                self._checked.discard(name)  # the next batch is compared
            # What nobody reads has no values in one of the two.
            both = [at for at, leaf in replayed.items() if not isinstance(leaf, Absent)]
            if problem is None:
                ours, others = [*seen, *map(replayed.get, both)], [*step.seen(), *map(computed.get, both)]
                if not (all(unchanged) and len(ours) == len(others) and all(map(_is_same, ours, others))):
                    problem = f"with calls skipped, it gives other bits than a plain {self.purpose} (a fused kernel?)"
        return problem

    def _run(
        self, recorded: _Recorded, plan: SkipPlan, step: Attempt, watched: Collection[OutputAt] = (), unchanged: Any = None
    ) -> dict[OutputAt, Any]:
        """Run a batch by a plan, and return the outputs of the outermost calls that were computed.

        To the list `unchanged` it appends, for each of the `watched` outputs, whether it is what was kept. Raises `NotKept`
        if something has read an output that is absent, even if the module has caught that.
        """
        found: dict[OutputAt, Any] = {}
        versions = {at: version(kept) for at, kept in recorded.kept.items()}

        def visit(call: int, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            if call in plan.skipped:
                self.skipped_calls += 1
                leaves = list(recorded.outputs[call].leaves)
                for position in range(len(leaves)):
                    at = call, position
                    if at in recorded.kept:
                        lent = _moved(recorded.kept[at], self.device)
                        leaves[position] = lent.clone() if at in plan.changed else lent
                # A container of its own: callers may write into it.
                return tree_unflatten(leaves, recorded.outputs[call].structure)
            out = forward(*args, **kwargs)
            for position, leaf in enumerate(tree_leaves(out)):
                at = call, position
                if self.calls.parents[call] == ROOT:  # without its graph, which would outlive the run
                    found[at] = leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
                if unchanged is not None and at in watched:  # nothing is kept if the replayed run has written into it
                    unchanged.append(at in recorded.kept and bitwise_equal(recorded.kept[at], leaf))
            return out

        Absent.touched = False
        with self.calls.intercepted(visit):
            step()
        if Absent.touched:
            raise NotKept("an output that was not kept was read")
        if any(version(kept) != versions[at] for at, kept in recorded.kept.items()):
            recorded.kept.clear()  # somebody wrote into what was lent: right this time, wrong the next
        return found

    def report(self) -> dict[str, Any]:
        """Report the budget, the most that was held of it, and how many calls were skipped, as plain data."""
        return {
            "budget_bytes": sum(self.budget.values()),
            "most_held_bytes": self.most_held,
            "skipped_calls": self.skipped_calls,
            "batches_over_budget": self.over_budget,
        }

    def notes(self) -> list[str]:
        """Say which layers were evaluated whole, and why."""
        layers: dict[str, list[str]] = {}
        for layer, reason in self._refused.items():
            layers.setdefault(reason, []).append(layer)
        notes = [
            f"replay: {', '.join(names)} computed whole in every {self.purpose}: {reason}" for reason, names in layers.items()
        ]
        if self.over_budget:
            notes.append(f"replay: {self.over_budget} batches computed whole, as replay_budget was used up")
        return notes


def _free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage: several tensors may share one, and a small view keeps all of its own alive."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on the host pinned, if it comes from elsewhere."""
    moved = tensor.to(device)
    return moved.pin_memory() if device == CPU and tensor.device.type == "cuda" else moved


def _is_same_batch(before: list[Any], batch: Any) -> bool:
    try:
        return before == fingerprint(batch)
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def _is_same(a: Any, b: Any) -> bool:
    """Compare two leaves, tensors to the last bit; objects of unknown kinds are not looked into."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bitwise_equal(a, b)
    return not (isinstance(a, UNCHANGEABLE) and isinstance(b, UNCHANGEABLE)) or repr(a) == repr(b)

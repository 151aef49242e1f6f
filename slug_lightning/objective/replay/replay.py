"""Forward again only what the edit can change.

An evaluation of an edited model differs from one of the original only behind the edited tensor. While the original is
evaluated, `trace.Trace` finds out which module calls depend on which layer; of the calls that do not, `Replay` keeps the
outputs that other code reads, and gives them back in later evaluations instead of computing them.
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
from slug_lightning.objective.replay.trace import ROOT, Output, Places, Plan, Trace
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.digests import UNCHANGEABLE, fingerprint
from slug_lightning.tensors.layers import Layer

SHARE = 0.25
"""Of the memory that is free when a run starts, so much may hold recorded outputs."""
CPU = torch.device("cpu")


class NotKept(RuntimeError):
    """Code reads an output that nothing read when the original was evaluated."""


class Absent(Tensor):
    """Stands for an output that nobody reads: it has a shape and a dtype, and no values.

    Example:
        >>> absent = Absent(torch.zeros(2, 3))
        >>> absent.shape
        torch.Size([2, 3])
        >>> absent + 1
        Traceback (most recent call last):
        ...
        slug_lightning.objective.replay.replay.NotKept: aten.add.Tensor reads an output that was not kept
    """

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
    """One batch of one pass.

    Attributes:
        fingerprint: of the batch.
        plans: by layer.
        outputs: by place, with `Absent` for every tensor.
        kept: the tensors that are kept, by place and position.
    """

    fingerprint: list[Any]
    plans: dict[str, Plan]
    outputs: dict[int, Output] = field(default_factory=dict)
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def take(self, trace: Trace) -> None:
        """Take over what the skipped calls returned; of what is not kept only the shape."""
        held = _storages(self.kept.values())
        for place in {place for plan in self.plans.values() for place in plan.skipped}:
            leaves, structure = trace.outputs[place]
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in held:
                    self.kept.setdefault((place, position), leaf)  # costs nothing, as its memory is held anyway
            self.outputs[place] = Output([Absent(v) if isinstance(v, Tensor) else v for v in leaves], structure)


class Replay:
    """Evaluates edits of single layers, and computes only what depends on the layer.

    Exact: what is given back was computed by the same code in the same mode, and the first batch of every layer is
    computed both ways and compared to the last bit. Where they differ, or where it cannot be told what depends on what,
    everything is computed, and `notes()` says so. Apart from the edited layer the weights must be as they were while
    recording.

    Bounded: what exceeds the budget of the device goes to the host, and what exceeds the host's is computed again.

    Args:
        module: the whole module whose steps are run.
        layers: candidates.
        budget: bytes that may be kept on the device, and again on the host if that is another; None for a quarter of
            what is free.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> replay, x, seen = Replay(net, [Layer("2.weight", {"2.weight": net[2].weight})]), torch.ones(1, 2), []
        >>> step = Attempt(net, lambda: seen.append(net(x)))
        >>> with torch.no_grad():
        ...     replay.record(("step", "val"), 0, x, step, ["2.weight"])
        ...     _ = net[2].weight.mul_(2)
        ...     for _ in range(2):  # once with the check, once without
        ...         replay.evaluate(("step", "val"), 0, x, step, "2.weight")
        >>> replay.skipped_calls, torch.equal(seen[-1], net(x))
        (4, True)
    """

    def __init__(self, module: nn.Module, layers: Sequence[Layer], budget: int | None = None) -> None:
        self.layers = {layer.name: number for number, layer in enumerate(layers)}
        self.candidates = list(layers)
        self.places = Places(module)
        self.batches: dict[tuple[str, ...], dict[int, _Recorded]] = {}
        self.device = next(iter(module.parameters())).device
        self.budget = {where: int(SHARE * _free(where)) if budget is None else budget for where in (self.device, CPU)}
        self.held = dict.fromkeys(self.budget, 0)
        self.most_held = 0
        self.skipped_calls = 0
        self.over_budget = 0
        """Batches that were computed whole, since there was no room for what would have spared it."""
        self._before: Trace | None = None
        self._checked: set[tuple[str, str]] = set()
        compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
        # What is inside a compiled module must not see a wrapper, so that nothing is intercepted.
        reason = "a part of the module is compiled, and cannot be followed with the bits it has when it is not"
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

    # ---- the original

    def record(self, where: tuple[str, ...], number: int, batch: Any, step: Attempt, layers: Sequence[str]) -> None:
        """Run a batch with the original weights, and keep what evaluations of these layers read.

        Args:
            where: names the program that runs, then the pass over the data.
            number: of the batch in it.
            batch: the batch; another one of the same number is told from it by its content.
            step: runs it.
            layers: names of the layers that will be evaluated.
        """
        if all(layer in self._refused for layer in layers):
            step()
            return
        trace = Trace(self.places, self.candidates, self._before if self.batches.get(where) else None)
        try:
            found = fingerprint(batch)  # first, as a step may write into its batch
            with step.undone(only_if_it_fails=True):
                trace.run(step)
        except Exception as error:  # if it was not the trace's fault, the plain run fails too
            step()
            self._refused.update(dict.fromkeys(layers, f"what depends on what could not be followed ({error})"))
            return
        self._before = trace
        plans = {name: trace.plan(self.layers[name]) for name in layers}
        recorded = self.batches.setdefault(where, {})[number] = _Recorded(found, plans)
        # The smallest first: the features of one tower spare as much as all activations of the other.
        for plan in sorted(plans.values(), key=lambda plan: sum(_storages(trace.kept_by(plan).values()).values())):
            self._keep(recorded, {at: t for at, t in trace.kept_by(plan).items() if at not in recorded.kept})
        recorded.take(trace)
        for place, position in trace.let_go(_storages(recorded.kept.values())):
            for name, plan in plans.items():
                if place in plan.skipped and (place, position) not in recorded.kept:
                    plans[name] = Plan(reason=f"an output of {self.places.names[place]} is remembered beyond its batch")

    def forget(self) -> None:
        """Drop what was kept."""
        self.batches.clear()
        self.held = dict.fromkeys(self.budget, 0)

    def _keep(self, recorded: _Recorded, outputs: dict[tuple[int, int], Tensor]) -> None:
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
        """Run a batch with one layer edited, as far as that layer matters.

        Args:
            where: pass, as recorded.
            number: of the batch.
            batch: the batch.
            step: runs it.
            layer: name of the edited layer.
        """
        recorded = self.batches.get(where, {}).get(number)
        plan = recorded.plans.get(layer) if recorded else None
        if recorded is None or plan is None or layer in self._refused:
            step()
        elif plan.reason:
            self._refused[layer] = plan.reason
            step()
        elif not plan.skipped:
            step()
        elif not plan.kept <= recorded.kept.keys():
            self.over_budget += 1
            step()
        elif not _is_same_batch(recorded.fingerprint, batch):
            self._refused[layer] = "the loader serves other batches, or in another order, in every pass"
            step()
        elif (where[0], layer) not in self._checked:
            self._checked.add((where[0], layer))
            self._check(recorded, plan, step, layer)
        else:
            try:
                with step.undone(only_if_it_fails=True):
                    self._run(recorded, plan, step)
            except Exception as error:  # if it was not the replay's fault, the plain run fails too
                self._refused[layer] = str(error) or type(error).__name__
                step()

    def _check(self, recorded: _Recorded, plan: Plan, step: Attempt, layer: str) -> None:
        """Run a batch both ways; the plain run is what counts."""
        problem = None
        replayed: dict[tuple[int, int], Any] = {}
        seen: list[Any] = []
        try:
            with step.undone():
                replayed = self._run(recorded, plan, step)
                seen = step.seen()
        except Exception as error:  # if it was not the replay's fault, the plain run fails too
            problem = str(error) or type(error).__name__
        unchanged: list[bool] = []
        computed = self._run(recorded, Plan(), step, plan.kept, unchanged)
        if problem is None:
            # What nobody reads has no values in one of the two.
            both = [at for at, leaf in replayed.items() if not isinstance(leaf, Absent)]
            ours, others = [*seen, *map(replayed.get, both)], [*step.seen(), *map(computed.get, both)]
            if not all(unchanged) or not _same(ours, others):
                problem = "spared of calls, it gives other bits than a plain evaluation (a fused kernel?)"
        if problem:
            self._refused[layer] = problem

    def _run(
        self,
        recorded: _Recorded,
        plan: Plan,
        step: Attempt,
        watched: Collection[tuple[int, int]] = (),
        unchanged: list[bool] | None = None,
    ) -> dict[tuple[int, int], Any]:
        """Run a batch by a plan, and give the outputs of the outermost calls that were computed.

        Of those that are `watched`, `unchanged` gets whether they are what was kept.

        Raises:
            NotKept: if something has read an output that is absent, even if the module has caught that.
        """
        found: dict[tuple[int, int], Any] = {}
        versions = {at: _version(kept) for at, kept in recorded.kept.items()}

        def visit(place: int, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            if place in plan.skipped:
                self.skipped_calls += 1
                leaves = list(recorded.outputs[place].leaves)
                for position in range(len(leaves)):
                    at = place, position
                    if at in recorded.kept:
                        lent = _moved(recorded.kept[at], self.device)
                        leaves[position] = lent.clone() if at in plan.changed else lent
                # A container of its own: callers may write into it.
                return tree_unflatten(leaves, recorded.outputs[place].structure)
            out = forward(*args, **kwargs)
            for position, leaf in enumerate(tree_leaves(out)):
                if self.places.parents[place] == ROOT:
                    found[place, position] = leaf
                if unchanged is not None and (place, position) in watched:
                    unchanged.append(bitwise_equal(recorded.kept[place, position], leaf))
            return out

        Absent.touched = False
        with self.places.intercepted(visit):
            step()
        if Absent.touched:
            raise NotKept("an output that was not kept was read")
        if any(_version(kept) != versions[at] for at, kept in recorded.kept.items()):
            recorded.kept.clear()  # somebody wrote into what was lent: right this time, wrong the next
        return found

    def report(self) -> dict[str, Any]:
        """Plain data: the budget, the most that was held of it, how many calls were spared, how many batches were not."""
        return {
            "budget_bytes": sum(self.budget.values()),
            "most_held_bytes": self.most_held,
            "skipped_calls": self.skipped_calls,
            "batches_over_budget": self.over_budget,
        }

    def notes(self) -> list[str]:
        """Sentences for the report: which layers were evaluated whole, and why."""
        reasons = dict.fromkeys(self._refused.values())
        layers = {reason: [layer for layer, its in self._refused.items() if its == reason] for reason in reasons}
        notes = [f"replay: {', '.join(layers[reason])} computed whole in every evaluation: {reason}" for reason in reasons]
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


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; a tensor made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _is_same_batch(before: list[Any], batch: Any) -> bool:
    try:
        return before == fingerprint(batch)
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def _same(ours: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same, tensors to the last bit; objects of unknown kinds are not looked into."""
    if len(ours) != len(others):
        return False
    for a, b in zip(ours, others, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not bitwise_equal(a, b):
                return False
        elif isinstance(a, UNCHANGEABLE) and isinstance(b, UNCHANGEABLE) and repr(a) != repr(b):
            return False
    return True

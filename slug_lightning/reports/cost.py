"""What a run cost: seconds, memory and operations of each phase, compared with the one pass that no method can avoid."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

UNAVOIDABLE = "gradients"
"""The phase that is one forward and backward pass over forget and retain set: the lower bound of every such method.

Statistics that come with the same pass are a phase of their own."""


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, with formulas for what it does not know.

    Without those of fused attention and encoder layers the same attention costs FLOPs with gradients and none without; and on a
    CPU it costs none before torch 2.15. The others are of directions: leading terms (Golub and Van Loan, Matrix Computations).
    """
    aten = torch.ops.aten
    mapping = {
        aten.linalg_cholesky_ex: lambda a, **_: math.prod(a) * a[-1] // 3,
        aten.cholesky_solve: lambda b, *_, **__: 2 * math.prod(b) * b[-2],
        aten._linalg_eigh: lambda a, *_, **__: 9 * math.prod(a) * a[-1],
        aten._linalg_svd: lambda a, *_, **__: math.prod(a) * (6 * min(a[-2:]) + 20 * min(a[-2:]) ** 2 // max(a[-2:])),
        aten._native_multi_head_attention: _attention_flops,
        aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *gqkv, **_: sdpa_backward_flop_count(*gqkv[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Four projections, scores, weighted sum; a multiplication and an addition are two operations."""
    batch, length, width = query
    return 2 * batch * length * width * 4 * width + 4 * batch * length * key[1] * width


def _encoder_layer_flops(source: Any, *rest: Any, **_: Any) -> int:
    """Attention and the two layers of the feed-forward part, whose weights are the last matrices given."""
    batch, length, width = source
    hidden = next(shape for shape in reversed(rest) if isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 2)[-1]
    return _attention_flops(source, source, source) + 4 * batch * length * width * hidden


class CostMeter:
    """Measure the phases of a run on a device; with `count` also its FLOPs and the bytes of live tensors, which slows it."""

    def __init__(self, device: torch.device, count: bool = False) -> None:
        self.device = device
        self.count = count
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._inside: list[float] | None = None
        """Seconds and FLOPs of phases within the one that is open."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside. A phase within another is taken out of it, but for memory, which stays the outer one's."""
        memory = LiveTensors() if self.count else _Allocated(self.device) if self.device.type == "cuda" else _Resident()
        is_outer, around, self._inside = self._inside is None, self._inside or [0.0, 0], [0.0, 0]
        try:
            with ExitStack() as stack:
                stack.enter_context(memory if is_outer else self._synchronised())
                counter = stack.enter_context(flop_counter()) if self.count else None
                start = time.perf_counter()
                yield
            # Read after the stack has synchronised the device. A phase may come again, for another concept.
            spent = time.perf_counter() - start, counter.get_total_flops() if counter else 0
            seconds, flops = (whole - inside for whole, inside in zip(spent, self._inside, strict=True))
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if is_outer:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), memory.peak)
            if self.count:
                self.flops[name] = self.flops.get(name, 0) + int(flops)
            around = [a + b for a, b in zip(around, spent, strict=True)]
        finally:
            self._inside = None if is_outer else around

    @contextmanager
    def _synchronised(self) -> Iterator[None]:
        """Wait for the device before and after, so that seconds belong to what takes them."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda _: None
        wait(self.device)
        yield
        wait(self.device)

    def report(self) -> dict[str, Any]:
        """Return plain data: `seconds`, `peak_bytes` and, where counted, `flops` by phase; `lower_bound` and `ratio` to it.

        `peak_bytes` is the peak of the tensors made in the phase if these were counted, else of the device's allocator, else
        (on a CPU) of the resident memory of the whole process.
        """
        flops = {"flops": self.flops} if self.count else {}
        return joined([{"seconds": self.seconds, **flops, "peak_bytes": self.peak_bytes}])


def joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the costs of all ranks: operations add up; seconds and memory are the largest."""
    figures = {
        # A rank without samples has no phase within another.
        name: {
            phase: (sum if name == "flops" else max)(report[name].get(phase, 0) for report in reports)
            for phase in dict.fromkeys(phase for report in reports for phase in report[name])
        }
        for name in reports[0]
        if name in ("seconds", "flops", "peak_bytes")
    }
    bound = {name: phases[UNAVOIDABLE] for name, phases in figures.items() if name != "peak_bytes" and phases.get(UNAVOIDABLE)}
    ratio = {name: sum(figures[name].values()) / value for name, value in bound.items()}
    return figures | {"lower_bound": bound, "ratio": ratio}


class _Allocated:
    """Peak of a CUDA device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device)


class _Resident(threading.Thread):
    """Peak of the process's resident memory, sampled fifty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        self.peak = process.memory_info().rss
        while not self.done.wait(0.02):
            self.peak = max(self.peak, process.memory_info().rss)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


class LiveTensors(TorchDispatchMode):
    """Peak of the bytes of all live tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storage of every dense tensor in a tree; the parts of a sparse one are tensors of their own."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()

"""What a run cost: seconds, memory and operations of each phase, beside the pass that nothing can avoid."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

UNAVOIDABLE = "gradients"
"""The phase that is one forward and backward pass over forget and retain: the lower bound of every such method."""


class CostMeter:
    """Measures the phases of a run.

    Args:
        device: where the model is.
        count: also count floating-point operations and the bytes of live tensors, which slows the run.

    Example:
        >>> meter = CostMeter(torch.device("cpu"), count=True)
        >>> with meter.phase("gradients"):
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> meter.report()["flops"], meter.report()["ratio"]["flops"]
        ({'gradients': 48}, 1.0)
    """

    def __init__(self, device: torch.device, count: bool = False) -> None:
        self.device = device
        self.count = count
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.flops: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        memory = _LiveTensors() if self.count else _Allocated(self.device) if self.device.type == "cuda" else _Resident()
        with ExitStack() as stack:
            stack.enter_context(memory)
            flops = stack.enter_context(FlopCounterMode(display=False)) if self.count else None
            start = time.perf_counter()
            yield
            self.seconds[name] = time.perf_counter() - start
        self.peak_bytes[name] = memory.peak
        if flops is not None:
            self.flops[name] = flops.get_total_flops()

    def report(self) -> dict[str, Any]:
        """Plain data: `seconds`, `peak_bytes` and, where counted, `flops` by phase; `lower_bound` and `ratio` to it.

        `peak_bytes` is the peak of the tensors made in the phase where these were counted, else of what the device's
        allocator holds, else (on a CPU) of the resident memory of the whole process.
        """
        figures = {"seconds": self.seconds} | ({"flops": self.flops} if self.count else {})
        bound = {name: by_phase[UNAVOIDABLE] for name, by_phase in figures.items() if by_phase.get(UNAVOIDABLE)}
        ratio = {name: sum(figures[name].values()) / value for name, value in bound.items()}
        return figures | {"peak_bytes": self.peak_bytes, "lower_bound": bound, "ratio": ratio}


class _Allocated:
    """Peak of a device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device)


class _Resident:
    """Peak of the process's resident memory, looked at fifty times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self.done.wait(0.02):
                return

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


class _LiveTensors(TorchDispatchMode):
    """Peak of the bytes of tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.known | given:
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

"""Run a function in several processes, as torchrun starts them, and get what each one gives."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _coverage import measuring

CONTEXT = multiprocessing.get_context("fork")  # half a second; what a test defines needs no pickling


class Ended(RuntimeError):
    """A process that did not give anything: its exit code (negative: killed by that signal), and what it raised."""

    def __init__(self, code: int | None, message: str) -> None:
        super().__init__(f"exit code {code}: {message}")
        self.code = code
        self.message = message


def in_processes(count: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` in `count` processes that find each other; one result each, an `Ended` where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            CONTEXT.Process(target=_child, args=(rank, count, port, Path(folder), timeout, function, args), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        if stuck:
            where = "".join(log.read_text()[-3000:] for log in sorted(Path(folder).glob("*.log")))
            raise TimeoutError(f"processes {stuck} of {count} were still waiting after {timeout} s:\n{where}")
        return [_result(Path(folder), rank, process.exitcode) for rank, process in enumerate(processes)]


def _child(
    rank: int, count: int, port: int, folder: Path, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = open(folder / f"{rank}.log", "w")  # noqa: SIM115 (until the process ends)
    faulthandler.dump_traceback_later(timeout - 1, file=sys.stderr)
    torch.set_num_threads(1)
    if coverage := measuring():  # it slows the process, and what it measured is lost with os._exit
        coverage.stop()
    code = 0
    try:
        result = function(*args)
        (folder / f"{rank}.part").write_bytes(pickle.dumps(result))
        (folder / f"{rank}.part").rename(folder / f"{rank}.result")
    except BaseException as error:
        (folder / f"{rank}.error").write_text("".join(traceback.format_exception_only(error)))
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # without waiting for anybody, as a process that has died of an error


def _result(folder: Path, rank: int, code: int | None) -> Any:
    if (folder / f"{rank}.result").exists():
        return pickle.loads((folder / f"{rank}.result").read_bytes())
    error = folder / f"{rank}.error"
    return Ended(code, error.read_text() if error.exists() else "")

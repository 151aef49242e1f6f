"""What steps find instead of loggers, files and iterators while they are measured."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slug_lightning.errors import UnlearnError

FOLDERS = ("log_dir", "save_dir", "root_dir")
"""Attributes of loggers to which steps write files of their own."""
NAMES = ("name", "version")


class Silent:
    """Takes every call, attribute and item, and does nothing.

    It says that it is of the class of what it stands for, and has its attributes. Files may be written to its folders: they are
    those of a temporary one.

    Args:
        real: what it stands for; None for what a stand-in has returned.
        scratch: the folder.
    """

    def __init__(self, real: Any = None, scratch: Scratch | None = None) -> None:
        vars(self).update(_real=real, _scratch=scratch or Scratch())

    __class__ = property(lambda self: Silent if self._real is None else type(self._real))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for what an object can do, as to be copied
            raise AttributeError(name)
        real = self._real
        if real is not None and not hasattr(type(real), name) and name not in getattr(real, "__dict__", {}):
            raise AttributeError(f"{type(real).__name__!r} object has no attribute {name!r}")
        if real is not None and name in NAMES:
            return getattr(real, name)
        return self._scratch.path if name in FOLDERS else self._another()

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def _another(self, *_: Any, **__: Any) -> Silent:
        return Silent(scratch=self._scratch)

    __call__ = __getitem__ = __enter__ = _another
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _another

    def _nothing(self, *_: Any) -> None:
        pass

    __setitem__ = __delitem__ = __exit__ = _nothing

    def _no(self, *_: Any) -> bool:
        return False

    __contains__ = __lt__ = __le__ = __gt__ = __ge__ = _no

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    __int__ = __index__ = __len__

    def __float__(self) -> float:
        return 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __str__(self) -> str:
        return self._scratch.path

    __fspath__ = __str__


class Scratch:
    """A temporary folder, made when it is asked for."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory | None = None

    @property
    def path(self) -> str:
        self._folder = self._folder or tempfile.TemporaryDirectory()
        return self._folder.name

    def remove(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Spent:
    """Stands for an iterator, which nobody can set back, and refuses to be used."""

    def __init__(self, real: Any, name: str) -> None:
        vars(self).update(_real=real, _name=name)

    __class__ = property(lambda self: type(self._real))

    def __iter__(self) -> Spent:
        return self

    def __next__(self) -> Any:
        raise UnlearnError(
            f"{self._name}: a step takes the next item of this {type(self._real).__name__}, which cannot be set back, so that "
            "every evaluation would see other items; hold a list, or let the loader give the items with its batches"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__next__()


def stand_in_for(value: Any, name: str) -> Any:
    """What a step finds instead of an attribute, or None if it finds the attribute itself."""
    if isinstance(value, io.IOBase):
        return Silent(value) if not value.closed and value.writable() else None
    kind: Any = type(value)
    found = _stand_in_of(kind)
    return found and (Silent(value) if found is Silent else Spent(value, name))


@functools.cache
def _stand_in_of(kind: Any) -> type | None:
    bases = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    loggers = any(base.startswith(("lightning.", "pytorch_lightning.")) and base.endswith(".Logger") for base in bases)
    if loggers or any(base.endswith(".SummaryWriter") or base == "_csv.writer" for base in bases):
        return Silent
    return Spent if hasattr(kind, "__next__") and not issubclass(kind, (nn.Module, Tensor)) else None


@contextmanager
def silenced(module: Any) -> Iterator[None]:
    """Let a module find silent loggers, also by its trainer, and print nothing by `self.print`."""
    trainer: Any = getattr(module, "_trainer", None)
    loggers = list(getattr(trainer, "loggers", None) or ())
    scratch = Scratch()
    own = {name: vars(module)[name] for name in ("print",) if name in vars(module)}
    # On the instance, so that the class and every other instance stay as they are.
    vars(module)["print"] = lambda *_, **__: None
    if loggers:
        trainer.loggers = [Silent(logger, scratch) for logger in loggers]
    try:
        yield
    finally:
        if loggers:
            trainer.loggers = loggers
        del vars(module)["print"]
        vars(module).update(own)
        scratch.remove()

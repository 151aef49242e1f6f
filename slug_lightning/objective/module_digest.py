"""What a module computes, told without running it: its code as it is loaded, its constants and its settings."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torchmetrics
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._pytree import tree_leaves

from slug_lightning.tensors.bits import digest_of
from slug_lightning.tensors.digests import UNCHANGEABLE, digest

BY_VERSION = {"torch", "torchmetrics", "torchgen", "lightning", "lightning_fabric", "pytorch_lightning", "numpy"}
"""Packages whose code is told by their version alone; so is what comes with Python."""
INSTALLED = {"site-packages", "dist-packages"}
INTERNAL = set(vars(LightningModule()))
"""What every module has, which says nothing of what it computes; but for its hooks."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def digest_of_module(module: nn.Module) -> str:
    """SHA-256 over what a module computes, as far as that can be told without running it; not over its weights.

    That is, of the module and all in it, the classes, down to the bytecode of every method and of the functions and
    constants that it names, with what closures hold; attributes that are plain data, tensors, functions or containers of
    these; and the plain data in other objects, such as a configuration. Bytecode, and not the source text, as a file may
    have been edited since it was loaded. Private attributes count only if they are plain, as they often remember results.
    Of installed packages only the code that is used directly is looked at, and their version.

    Example:
        >>> one, same, other = (nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)) for p in (0.1, 0.1, 0.2))
        >>> digest_of_module(one) == digest_of_module(same) != digest_of_module(other)
        True
    """
    return digest(list(_Teller().parts(module)), _refused)


def _refused(leaf: Any) -> Any:
    raise AssertionError(f"{leaf!r} was left untold")


class _Teller:
    """Writes down what code and values are; what occurs again, as where it has occurred."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}
        """What was told, by identity, with its number: held, so that nothing else gets its place in memory."""

    def parts(self, module: nn.Module) -> Iterator[Any]:
        """A module and all modules in it, without their parameters and buffers."""
        parts = dict(module.named_modules())
        for part in parts.values():
            self._is_new(part)
        for name, part in parts.items():
            yield name, self.tell(type(part))
            for key, value in vars(part).items():
                if key not in INTERNAL and _is_setting(part, key, value):
                    yield key, self.tell(value)
            yield [self.tell(hook) for hooks in HOOKS for hook in vars(part).get(hooks, {}).values()]

    def tell(self, value: Any) -> str:
        """A digest of any value."""
        return digest(value, self._other)

    def _other(self, value: Any) -> Any:
        """What is neither plain data nor a tensor nor a container."""
        if isinstance(value, (set, frozenset)):
            return sorted(map(self.tell, value))  # in an order that differs between processes
        if isinstance(value, ModuleType):
            return _origin(value.__name__)
        if isinstance(value, functools.partial):
            return [self.tell(value.func), self.tell([value.args, value.keywords])]
        if isinstance(value, MethodType):
            return [self.tell(value.__func__), self.tell(value.__self__)]
        if isinstance(value, (staticmethod, classmethod)):
            return self.tell(value.__func__)
        if isinstance(value, property):
            return self.tell([value.fget, value.fset])
        if not self._is_new(value):
            return self.seen[id(value)][0]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, nn.Module):
            return [*self.parts(value), digest_of(dict(value.named_parameters()) | dict(value.named_buffers()), "")]
        held = getattr(value, "__dict__", {})
        plain = {key: self.tell(item) for key, item in held.items() if _is_plain(item)}
        name = value.__qualname__ if isinstance(value, BuiltinFunctionType) else None
        return [self.tell(type(value)), name, plain, self.tell(held.get("__wrapped__"))]  # the last of a cached function

    def _is_new(self, value: Any) -> bool:
        number = len(self.seen)
        return self.seen.setdefault(id(value), (number, value))[0] == number

    def _function(self, function: FunctionType) -> Any:
        told = [_origin(function.__module__), function.__qualname__]
        if _by_version(function.__module__):
            return told
        code = function.__code__
        told += [self._code(code), self.tell([function.__defaults__, function.__kwdefaults__])]
        told += [self.tell(_content(cell)) for cell in function.__closure__ or ()]
        if not _is_installed(function.__module__):
            told += [self.tell(value) for value in _named(code, function.__globals__)]
        return told

    def _code(self, code: CodeType) -> Any:
        constants = [self._code(c) if isinstance(c, CodeType) else self.tell(c) for c in code.co_consts]
        return [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants]

    def _class(self, kind: type) -> Any:
        told = [_origin(kind.__module__), kind.__qualname__]
        if _by_version(kind.__module__):
            return told
        members = {
            name: self.tell(value)
            for name, value in vars(kind).items()
            if not name.startswith("__") or isinstance(value, (FunctionType, staticmethod, classmethod))
        }
        return [*told, [self.tell(base) for base in kind.__bases__], members]


def _is_setting(part: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute says how a module computes, and not what it has computed."""
    if isinstance(part, torchmetrics.Metric):  # its states are tensors
        return not name.startswith("_") and _is_plain(value)
    # Nothing yet may be the place of something later.
    return not name.startswith("_") or (_is_plain(value) and any(leaf is not None for leaf in _leaves(value)))


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, UNCHANGEABLE) for leaf in _leaves(value))


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(dict(value) if isinstance(value, Mapping) else value)


def _by_version(name: str | None) -> bool:
    root = str(name).partition(".")[0]
    return root in BY_VERSION or root in sys.stdlib_module_names


def _is_installed(name: str | None) -> bool:
    file = getattr(sys.modules.get(str(name)), "__file__", None)
    return bool(INSTALLED & set(Path(file or "").parts))


def _origin(name: str | None) -> str:
    """Where code comes from, with the version of its package if that is known."""
    version = getattr(sys.modules.get(str(name).partition(".")[0]), "__version__", None)
    return f"{name} {version}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _named(code: CodeType, scope: Mapping[str, Any]) -> Iterator[Any]:
    """What a function's code names, also as `module.name`."""
    names = list(dict.fromkeys(_names(code)))
    for name in names:
        value = scope.get(name)
        yield value
        if isinstance(value, ModuleType) and not (_by_version(value.__name__) or _is_installed(value.__name__)):
            yield from (vars(value).get(inner) for inner in names)

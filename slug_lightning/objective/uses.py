"""Find where a model uses its weights as matrices: as linear layers, products, convolutions and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slug_lightning.objective.factors import Form

MATMULS = (torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__)
ADDMMS = (torch.addmm, Tensor.addmm)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
EMBEDDING = ("input", "weight", "padding_idx")
ATTENTION = F.multi_head_attention_forward
LINEAR = F.linear
MOST_SLICES = 16
"""Row slices of unequal size are cut into equal ones, up to this number."""


class View(NamedTuple):
    """What a use has of a tensor: these rows of W, which is the tensor itself or its transpose.

    `groups` are those of a convolution. The rows of an embedding are its columns, as it maps a one-hot id to Wᵀ's column.
    """

    kind: str
    transposed: bool = False
    start: int = 0
    stop: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Use:
    """One call that uses a tensor.

    Attributes:
        name: the tensor's.
        view: what it has of the tensor; None if that is not understood.
        x: what the tensor is applied to.
        rows_of: gives x as rows `[groups, positions, in]`; of an embedding the ids `[positions]`.
        outputs: gives a gradient with respect to y as rows `[groups, positions, out / groups]`.
        padding: id that an embedding does not learn.
    """

    name: str
    view: Optional[View]
    x: Tensor
    rows_of: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    padding: Optional[int] = None

    def inputs(self) -> Tensor:
        """Return what the tensor is applied to, as rows."""
        return self.rows_of(self.x)


def form_of(shape: tuple[int, ...], views: list[View | None]) -> tuple[Form, str] | str:
    """Return how a tensor acts, given all its uses in a batch, and the kind of use; or why that cannot be said."""
    if not views:
        return "no linear layer, matrix product, convolution or embedding uses it"
    known = [view for view in views if view is not None]
    kinds = sorted({view.kind for view in known})
    if len(known) < len(views):
        return "a call uses a part or a form of it that is not understood"
    if kinds == ["embedding"]:
        return Form(shape, transposed=True), "embedding"
    if kinds == ["convolution"]:
        groups = {view.groups for view in known}
        return (Form(shape, groups=groups.pop()), "convolution") if len(groups) == 1 else "convolutions group it differently"
    matrices = [view for view in known if view.kind == "matrix"]
    transposed = {view.transposed for view in matrices}
    if len(transposed) > 1 or "convolution" in kinds:
        return "it is used in several forms"
    out = shape[1] if transposed == {True} else shape[0]
    groups_of_rows = out // math.gcd(out, *(edge for view in matrices for edge in (view.start, view.stop)))
    if groups_of_rows > MOST_SLICES:
        return "its rows are used in unequal slices"
    if "embedding" in kinds:
        return (Form(shape), "tied") if transposed == {False} and groups_of_rows == 1 else "it is used in several forms"
    return Form(shape, transposed.pop(), groups_of_rows), "matrix"


class UseFinder(TorchFunctionMode):
    """Calls `found(use, y)` for each call that uses one of the tensors, above autograd and autocast.

    Tensors are recognised by their storage, as a call may get a view. Under FSDP2 it is the storage of what the module holds
    at that moment: a gathered copy.

    Args:
        module: owns the tensors.
        parameters: by name.
        found: takes what is found.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], found: Callable[[Use, Tensor], None]) -> None:
        super().__init__()
        names = {id(p): name for name, p in parameters.items() if p.ndim > 1}
        self.owners = [
            (names[id(p)], owner, attribute)
            for owner in module.modules()
            for attribute, p in owner._parameters.items()
            if id(p) in names
        ]
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION:
            with self._spying():
                return func(*args, **kwargs)
        y = func(*args, **kwargs)
        if func in KNOWN:
            self._look(KNOWN[func], args, kwargs, y)
        return y

    @contextmanager
    def _spying(self) -> Iterator[None]:
        """Inside, see the linear layers of an attention, which calls them where no mode is asked."""

        def spy(*args: Any, **kwargs: Any) -> Tensor:
            y = LINEAR(*args, **kwargs)
            self._look(_linear, args, kwargs, y)
            return y

        before, F.linear = F.linear, spy
        try:
            yield
        finally:
            F.linear = before

    def _look(self, read: Callable[..., Any], args: Any, kwargs: Any, y: Any) -> None:
        held = {}
        for name, owner, attribute in self.owners:
            tensor = getattr(owner, attribute)
            if type(tensor) in (Tensor, nn.Parameter):
                held[tensor.untyped_storage().data_ptr()] = name, tensor
        for value in (*args, *kwargs.values()):
            if type(value) in (Tensor, nn.Parameter) and (match := held.get(value.untyped_storage().data_ptr())):
                use = read(*match, value, args, kwargs)
                if use is not None:
                    self.found(use, y)


def _named(order: Sequence[str], args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(order, args, strict=False)), **kwargs}


def _matrix_use(name: str, held: Tensor, matrix: Tensor, x: Tensor, left: bool = False) -> Use:
    """The use of `matrix`, W or rows of it, a view of what the module holds; `left` of x, whose columns are then samples."""
    left &= x.ndim > 1

    def rows(values: Tensor, size: int) -> Tensor:
        return (values.mT if left else values).reshape(1, -1, size)

    view, (out, size) = _view(held, matrix), matrix.shape[-2:]
    return Use(name, view, x, lambda x: rows(x, size), lambda d: rows(d, out))


def _view(held: Tensor, matrix: Tensor) -> View | None:
    if held.ndim != 2 or matrix.ndim != 2:
        return None
    for transposed, whole in ((False, held), (True, held.T)):
        strides = [(a, b) for a, b, size in zip(whole.stride(), matrix.stride(), matrix.shape, strict=True) if size > 1]
        if matrix.shape[1] == whole.shape[1] and all(a == b for a, b in strides):
            start, rest = divmod(int(matrix.storage_offset()) - int(whole.storage_offset()), whole.stride(0))
            if rest == 0 and start + matrix.shape[0] <= whole.shape[0]:
                return View("matrix", transposed, start, start + matrix.shape[0])
    return None


def _linear(name: str, held: Tensor, value: Tensor, args: Any, kwargs: Any) -> Use | None:
    given = _named(("input", "weight"), args, kwargs)
    return _matrix_use(name, held, value, given["input"].detach()) if given["weight"] is value else None


def _matmul(name: str, held: Tensor, value: Tensor, args: Any, kwargs: Any) -> Use | None:
    first, second = (*args, *kwargs.values())[:2]
    if value is second:
        return _matrix_use(name, held, value.T if value.ndim == 2 else value, first.detach())
    return _matrix_use(name, held, value, second.detach(), left=True)


def _addmm(name: str, held: Tensor, value: Tensor, args: Any, kwargs: Any) -> Use | None:
    given = _named(("input", "mat1", "mat2"), args, kwargs)
    if value is given["input"]:
        return None
    if given.get("alpha", 1) != 1:
        return Use(name, None, value, lambda x: x, lambda d: d)
    return _matmul(name, held, value, (given["mat1"], given["mat2"]), {})


def _embedding(name: str, held: Tensor, value: Tensor, args: Any, kwargs: Any) -> Use | None:
    given = _named(EMBEDDING, args, kwargs)
    ids = given["input"].detach()
    whole = value.shape == held.shape and value.stride() == held.stride()
    view = View("embedding", True, 0, value.shape[1]) if whole else None
    return Use(name, view, ids, lambda ids: ids.reshape(-1), lambda d: d.reshape(1, -1, d.shape[-1]), given.get("padding_idx"))


def _convolution(name: str, held: Tensor, value: Tensor, args: Any, kwargs: Any) -> Use | None:
    given = _named(CONVOLUTION, args, kwargs)
    if given["weight"] is not value:
        return None
    dims, groups = value.ndim - 2, given.get("groups", 1)
    x = given["input"].detach()
    whole = value.shape == held.shape and value.stride() == held.stride()

    def rows(x: Tensor) -> Tensor:
        batch = x if x.ndim == dims + 2 else x[None]
        found = patches(batch, value.shape[2:], given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
        grouped = found.unflatten(1, (groups, -1)).movedim(2, 2 + dims)  # [N, groups, positions…, in, kernel…]
        return grouped.movedim(1, 0).reshape(groups, -1, value[0].numel())

    def outputs(d: Tensor) -> Tensor:
        batch = d if d.ndim == dims + 2 else d[None]
        return batch.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1).reshape(groups, -1, len(value) // groups)

    return Use(name, View("convolution", False, 0, len(value), groups) if whole else None, x, rows, outputs)


def patches(x: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Cut what a convolution sees at each position: `[N, C, *spatial]` to `[N, C, *positions, *kernel]`.

    Example:
        >>> patches(torch.arange(4.0)[None, None], [2], 1, 0, 2)
        tensor([[[[0., 2.],
                  [1., 3.]]]])
    """
    dims = len(kernel)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    x = F.pad(x, [p for pair in reversed(sides) for p in pair])
    for i in range(dims):
        x = x.unfold(2 + i, reach[i] + 1, strides[i])[..., :: dilations[i]]
    return x


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


KNOWN: dict[Any, Callable[..., Any]] = {
    LINEAR: _linear,
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(ADDMMS, _addmm),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    F.embedding: _embedding,
}

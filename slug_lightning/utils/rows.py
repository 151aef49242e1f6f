"""Some rows of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from slug_lightning.utils.loaders import KEPT, Batches, reads_as_torch


class Rows:
    """Some rows of each batch of a loader.

    Args:
        loader: gives the same batches whenever it is read.
        chosen: for each batch, which of its rows; batches without any are left out.
        size: rows of each batch.

    Example:
        >>> list(Rows([["a", "b"], ["c"], ["d", "e"]], [[1], [], [0, 1]], [2, 1, 2]))
        [['b'], ['d', 'e']]
    """

    def __init__(self, loader: Batches, chosen: Sequence[Sequence[int]], size: Sequence[int]) -> None:
        self.loader = loader
        self.chosen = chosen
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        for batch, rows, size in zip(self.loader, self.chosen, self.size, strict=True):
            if rows:
                yield take(batch, rows, size)

    def __len__(self) -> int:
        return sum(bool(rows) for rows in self.chosen)


def rows_of(loader: Batches, chosen: Sequence[Sequence[int]], size: Sequence[int]) -> Batches:
    """Return some rows of a loader's batches: as batches of its own size where its dataset can be indexed in their order."""
    source: Any = loader
    order = _order_of(source)
    if order is None or any(one != source.batch_size for one in size[:-1]) or sum(size) > len(order):
        return Rows(loader, chosen, size)
    starts = [sum(size[:number]) for number in range(len(size))]
    indices = [order[start + row] for start, rows in zip(starts, chosen, strict=True) for row in rows]
    options: dict[str, Any] = {name: getattr(source, name) for name in KEPT}
    return DataLoader(source.dataset, batch_size=source.batch_size, sampler=indices, **options)


def _order_of(loader: Any) -> Sequence[Any] | None:
    """What a loader asks its dataset for, one sample after the other; None where that isn't known without reading it."""
    if not isinstance(loader, DataLoader) or not reads_as_torch(loader) or loader.batch_size is None:
        return None
    if isinstance(loader.sampler, list):
        return loader.sampler
    is_plain = type(loader.sampler) is SequentialSampler and not isinstance(loader.dataset, IterableDataset)
    return range(len(cast(Sized, loader.sampler))) if is_plain else None


def shuffles_anew(loader: Batches) -> bool:
    """Whether a loader serves its samples in another order whenever it is read, whatever the seed."""
    parts = [part for part in getattr(loader, "loaders", [getattr(loader, "loader", loader)]) if isinstance(part, DataLoader)]
    samplers = [one for part in parts for one in (part.sampler, part.batch_sampler, getattr(part.batch_sampler, "sampler", None))]
    return any(getattr(sampler, "generator", None) is not None for sampler in samplers)


def take(batch: Any, rows: Sequence[int], size: int) -> Any:
    """Take rows of a batch of so many samples: of each tensor and list in its containers that has an entry for each.

    Example:
        >>> import torch
        >>> take({"x": torch.tensor([1, 2, 3]), "text": ["a", "b", "c"], "scale": 2.0}, [0, 2], 3)
        {'x': tensor([1, 3]), 'text': ['a', 'c'], 'scale': 2.0}
    """
    if isinstance(batch, Mapping):
        return {name: take(column, rows, size) for name, column in batch.items()}
    if isinstance(batch, Tensor):
        return batch[list(rows)] if batch.shape[:1] == (size,) else batch
    if not isinstance(batch, (list, tuple)):
        return batch
    # A list of as many tensors as there are samples may be two columns of two samples: those are columns.
    is_column = len(batch) == size and not all(isinstance(one, Tensor) and one.shape[:1] == (size,) for one in batch)
    made = [batch[row] for row in rows] if is_column else [take(column, rows, size) for column in batch]
    return made if isinstance(batch, list) else type(batch)(*made) if hasattr(batch, "_fields") else tuple(made)

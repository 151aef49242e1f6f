"""What is known of the data to keep, for several requests at the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slug_lightning.patch import digest_of


class RetainCache:
    """Keeps the last retain gradient, so that the next request at the same weights costs only its own forget pass.

    It is used again only for the same module object, the same object as `retain`, the same candidates and bitwise the
    same weights and buffers; it cannot see whether the data behind that object have changed.

    Example:
        >>> from slug_lightning.callbacks import UnlearnCallback
        >>> cache = RetainCache()
        >>> callbacks = [UnlearnCallback(retain_cache=cache) for _ in range(2)]
        >>> cache.reused
        0
    """

    def __init__(self) -> None:
        self.reused = 0
        """How often a gradient was used again."""
        self._key: tuple[Any, ...] = ()
        self._gradient: dict[str, Tensor] = {}

    def gradient(
        self, module: nn.Module, source: Any, how: Any, names: list[str], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The gradient kept, if it is the one that is asked for, else a new one.

        Args:
            module: the model.
            source: where the retain data come from.
            how: whatever else the gradient depends on, such as the precision; compared by `==`.
            names: of the candidates.
            compute: makes the gradient, by tensor name.
        """
        key = (module, source, how, names, digest_of(dict(module.named_parameters()) | dict(module.named_buffers()), ""))
        if self._key and self._key[0] is module and self._key[1] is source and self._key[2:] == key[2:]:
            self.reused += 1
        else:
            self._key, self._gradient = (), {}  # not two at a time
            self._gradient = compute()
            self._key = key
        return self._gradient

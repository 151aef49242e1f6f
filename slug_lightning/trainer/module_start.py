"""Let a module set itself up before it is measured: its own `on_train_start` comes after those of callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.trainer.call import _call_lightning_module_hook

HOOK = "on_train_start"


class _Done:
    """Stands in for a hook once, as Lightning calls it right after those of the callbacks."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.own = vars(module).get(HOOK)

    def __call__(self) -> None:
        """Do nothing, and let the module have its hook again."""
        vars(self.module).pop(HOOK, None)
        if self.own is not None:
            vars(self.module)[HOOK] = self.own


@contextmanager
def started(trainer: Any, module: Any) -> Iterator[None]:
    """Inside, the module's own `on_train_start` has been called; Lightning's call, which follows, does nothing.

    What it makes or loads is there when gradients and metrics are computed, and does not come over an edit.
    """
    if isinstance(vars(module).get(HOOK), _Done):  # by another callback of ours
        yield
        return
    done = _Done(module)
    _call_lightning_module_hook(trainer, HOOK, pl_module=module)
    vars(module)[HOOK] = done
    try:
        yield
    except BaseException:  # the fit ends here
        done()
        raise

"""Keywords of version 0.1; to be removed with 0.3."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import lightning.pytorch as pl

from slug_lightning.errors import UnlearnError
from slug_lightning.methods import SLUG, Method, Runtime
from slug_lightning.objective.retain_cache import RetainCache

RENAMED = {"margin": "step_margin", "strengths": "scales", "then": "continue_training"}
OF_METHOD = ("layers", "granularity", "max_evaluations", "margin")
OF_RUNTIME = ("replay", "replay_budget", "count_cost", "retain_cache", "offload_gradient")


DEFAULTS = {"layers": "*", "granularity": "tensor", "max_evaluations": 10, "margin": 0.0, "strengths": [], "then": "stop"}
DEFAULTS |= {"replay": True, "count_cost": False, "offload_gradient": False}
"""A config.yaml of version 0.1 has every keyword: with its default it asks for nothing."""


def refuse_unknown(old: dict[str, Any]) -> None:
    """Refuse a keyword that there has never been, as Python would."""
    if unknown := [name for name in old if name not in (*OF_METHOD, *OF_RUNTIME, "strengths", "then")]:
        raise TypeError(f"UnlearnCallback.__init__() got an unexpected keyword argument {unknown[0]!r}")


class OldKeywords(pl.Callback):
    """Takes the keywords that have moved, so that configs and code of version 0.1 go on working."""

    def __init__(
        self,
        *,
        layers: Union[str, list[str], None] = None,
        granularity: Optional[str] = None,
        max_evaluations: Optional[int] = None,
        margin: Optional[float] = None,
        strengths: Optional[Sequence[float]] = None,
        then: Optional[str] = None,
        replay: Optional[bool] = None,
        replay_budget: Optional[int] = None,
        count_cost: Optional[bool] = None,
        retain_cache: Union[str, RetainCache, None] = None,
        offload_gradient: Optional[bool] = None,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__") and value is not None}
        self._old: dict[str, Any] = {name: value for name, value in given.items() if DEFAULTS.get(name) != value}

    def _moved(
        self, method: Method, scales: Sequence[float], continue_training: bool, runtime: Runtime
    ) -> tuple[Method, Sequence[float], bool, Runtime]:
        """Put what was given under an old keyword where it belongs now, and say where that is."""
        old = self._old
        if not old:
            return method, scales, continue_training, runtime
        homes = dict.fromkeys(OF_METHOD, "method=SLUG({}=…)") | dict.fromkeys(OF_RUNTIME, "runtime=Runtime({}=…)")
        homes |= {"then": "continue_training=True"}
        places = [f"{name}={old[name]!r} is now {homes.get(name, '{}=…').format(RENAMED.get(name, name))}" for name in old]
        warnings.warn(f"UnlearnCallback: {'; '.join(places)}", FutureWarning, stacklevel=3)
        if then := old.get("then"):
            if then not in ("stop", "continue"):
                raise UnlearnError(f"then must be 'stop' or 'continue', got {then!r}")
            continue_training = continue_training or then == "continue"
        of_method = {RENAMED.get(name, name): old[name] for name in OF_METHOD if name in old}
        if of_method and not isinstance(method, SLUG):
            raise UnlearnError(f"{', '.join(of_method)}: options of SLUG; give {type(method).__name__} options of its own")
        of_runtime = {name: old[name] for name in OF_RUNTIME if name in old}
        for home, default, moved in ((method, SLUG(), of_method), (runtime, Runtime(), of_runtime)):
            for name, value in moved.items():
                if getattr(home, name) not in (getattr(default, name), value):
                    raise UnlearnError(f"{name} is given twice: {value!r} by its old keyword, {getattr(home, name)!r} by the new")
        method = replace(method, **of_method) if isinstance(method, SLUG) else method
        runtime = replace(runtime, **of_runtime)
        return method, scales or old.get("strengths", ()), continue_training, runtime

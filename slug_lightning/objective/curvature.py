"""Second moments of what layers see, for directions that spare the retain set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.objective.log_capture import read_logs
from slug_lightning.objective.objective import Kind, Objective
from slug_lightning.tensors.layers import Layer
from slug_lightning.utils.random import seed_for_batch


def input_covariance(objective: Objective, layers: Sequence[Layer], kind: Kind) -> dict[str, Tensor]:
    """Compute A = 1/N Σ_n Σ_t x xᵀ of the inputs of linear layers, by one forward pass over the gradient split.

    Args:
        objective: its loss is what runs.
        layers: weights `[out, in]` of `nn.Linear` modules.
        kind: whose samples: "forget" or "retain".

    Returns:
        By tensor name `[in, in]`, fp64, over all N samples and all positions t of each; the same in every process.

    Raises:
        UnlearnError: if a tensor isn't such a weight, or is sharded.
    """
    names = [name for layer in layers for name in layer.parameters]
    modules = {id(m.weight): m for m in objective.module.modules() if isinstance(m, nn.Linear)}
    found = {name: modules.get(id(p)) for layer in layers for name, p in layer.parameters.items()}
    if unfit := [name for name, module in found.items() if module is None]:
        raise UnlearnError(
            f"direction: {unfit[0]} isn't the weight of an nn.Linear, which its input covariance needs; name other layers by "
            "layers=…"
        )
    if objective.runner.is_sharded:
        raise UnlearnError("direction: the input covariance of a sharded model isn't supported; give direction='gradient'")
    device = objective.module.device
    sums = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64, device=device) for name, m in found.items() if m}
    samples = torch.zeros((), dtype=torch.float64, device=device)
    counted = True

    def add_to(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if counted:
                x = args[0].detach().flatten(0, -2).double()
                sums[name] += x.T @ x

        return hook

    with ExitStack() as stack:
        for name, module in found.items():
            assert module is not None
            stack.callback(module.register_forward_pre_hook(add_to(name)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(read_logs(objective.module))
        for number, batch, counted in objective.runner.batches(objective.loaders[kind]["train"]):
            seed_for_batch(number)
            with objective.runner.forward_context():
                objective.loss(kind, batch, number)
            samples += batch_samples(batch) * counted
    objective.processes.all_reduce_sum([samples, *(sums[name] for name in names)])
    objective.forward_samples += int(samples)
    if unseen := [name for name in names if not sums[name].any()]:
        raise UnlearnError(
            f"direction: {unseen[0]} has no input covariance, as its module is never called by itself (as in "
            "nn.MultiheadAttention) or sees only zeros; name other layers by layers=…"
        )
    return {name: sums[name] / samples for name in names}

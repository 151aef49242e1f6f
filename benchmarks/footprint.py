"""How many bytes a run takes, counted before there is a device that holds the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slug_lightning.distributed.batch_sharding import IndexedBatch
from slug_lightning.distributed.strategy import only_differentiating
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.gradients import mean_gradient
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.reports.cost import LiveTensors
from slug_lightning.tensors.layers import Layer


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run on one device.

    The batch itself, what the allocator wastes, the device's context and what replay keeps (`replay_budget`, of what is free)
    come on top.

    Attributes:
        weights: of all parameters and buffers.
        gradient: of one gradient of all candidates, at least fp32. A run holds two, of forget and retain data.
        phases: most bytes of tensors alive at once beside the weights, by phase of a run.

    Example:
        >>> found = Footprint(14 * 10**9, 10**9, {"gradients": 6 * 10**9, "search": 2 * 10**9})
        >>> found.peak
        20000000000
        >>> print(found.to_text())
        weights      14.00 GB
        gradients  + 6.00 GB
        search     + 2.00 GB
        peak         20.00 GB
    """

    weights: int
    gradient: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Most bytes of the weights and of all other tensors at once."""
        return self.weights + max(self.phases.values())

    def to_text(self) -> str:
        """A line each for the weights, for what every phase adds, and for the peak, in GB (10⁹ bytes)."""
        lines = [("weights", "  ", self.weights), *((name, "+ ", size) for name, size in self.phases.items())]
        return "\n".join(f"{name:<11}{sign}{size / 1e9:.2f} GB" for name, sign, size in [*lines, ("peak", "  ", self.peak)])


def footprint(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    layers: Sequence[Layer],
    evaluate: Callable[[nn.Module, Any], Any] | None = None,
) -> Footprint:
    """Count the bytes of a run on one batch, by the code that a run has for its gradients and edits.

    The model may stand on the meta device, where tensors have shapes and no values: then nothing is computed, and a model of any
    size is counted in seconds. Attention counts there as fused kernels compute it, whose scores are never whole, and what
    asks for a value of a tensor to check it is told that all is well. On a real device the batch is computed. The model is
    as before afterwards.

    Args:
        model: on one device.
        batch: of the size that loaders will give; its tensors are moved to the model's device.
        loss: takes the model and a batch, gives the mean loss, a scalar.
        layers: the candidates, as `find_layers` gives them.
        evaluate: what is run to measure an edit, without gradients; default: the loss. To generate answers on the meta device,
            give a forward pass with the cache, of the prompts with as many tokens as answers may have.

    Raises:
        UnlearnError: if the model needs values that it doesn't have on the meta device, or parts of it are elsewhere.

    Example:
        >>> from slug_lightning.tensors.layers import find_layers
        >>> with torch.device("meta"):
        ...     net = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 10, bias=False))
        >>> found = footprint(net, torch.zeros(2, 1000), lambda net, x: net(x).mean(), find_layers(net, "0.*"))
        >>> found.weights, found.gradient
        (4040000, 4000000)
        >>> found.phases["gradients"] > 2 * found.gradient
        True
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise UnlearnError(f"model: it stands on {', '.join(sorted(map(str, devices)))}; put it on one device to count its bytes")
    (device,) = devices
    measured = partial(evaluate or loss, model, move_data_to_device(batch, device))
    differentiated = partial(loss, model, move_data_to_device(batch, device))
    try:
        with ExitStack() as stack:
            stack.enter_context(preserve_state(model))
            if device.type == "meta":
                for mode in (_Told(), _Fused()):
                    stack.enter_context(mode)
            phases = _phases(model, measured, differentiated, batch_samples(batch), layers)
    except (RuntimeError, NotImplementedError) as error:
        if device.type != "meta":
            raise
        raise UnlearnError(
            f"model: {type(model).__name__} needs values that it doesn't have on the meta device ({error}); count a real one, "
            "with fewer layers if it must be"
        ) from error
    one = sum(p.numel() * torch.promote_types(p.dtype, torch.float32).itemsize for la in layers for p in la.parameters.values())
    return Footprint(sum(tensor.numel() * tensor.itemsize for tensor in tensors), one, phases)


def _phases(
    model: nn.Module,
    measured: Callable[[], Any],
    differentiated: Callable[[], Tensor],
    samples: int,
    layers: Sequence[Layer],
) -> dict[str, int]:
    """The phases of a run, as `slug_lightning.methods.slug` goes through them, on one batch each."""
    # Not by a `CostMeter`: torch's counter of operations, which it has too, keeps tensors of every batch until it is left.
    live = {name: LiveTensors() for name in ("validate", "gradients", "search")}
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    with live["validate"], torch.no_grad():
        measured()
    with live["gradients"], only_differentiating(model, parameters):
        turn = IndexedBatch(0, None)
        forget = mean_gradient(lambda *_: (differentiated(), samples), [turn], parameters, "forget").tensors
        mean_gradient(lambda *_: (differentiated(), samples), [turn], parameters, "retain")
    with live["search"], torch.no_grad():
        kept = {name: gradient.clone() for name, gradient in forget.items()}  # at worst all layers are on the front
        del forget
        largest = max(layers, key=lambda layer: sum(p.numel() for p in layer.parameters.values()))
        with TemporaryEdits().applied(EditStep(largest, kept, 1.0)):
            measured()
    return {name: mode.peak for name, mode in live.items()}


class _Told(TorchDispatchMode):
    """Code that looks at a value on the meta device is told that a check holds, or that a loss is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not args[0].is_complex():
            if args[0].dtype == torch.bool:
                return True
            if args[0].is_floating_point():
                return 1.0
        return func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    """Attention on the meta device as one kernel: the scores of all pairs of tokens, which it makes there, no device holds.

    The kernel for CPUs stands for that of any device: all keep queries, keys, values, output and one number a row.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or kwargs.get("enable_gqa") or len(args) < 3:
            return func(*args, **kwargs)
        options = {name: kwargs[name] for name in ("attn_mask", "scale", "is_causal") if name in kwargs}
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], **options)[0]

"""Second moments of what layers see and of their gradients, collected while a gradient is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from slug_lightning.distributed.backward import TENSOR
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.factors import Diagonal, Factor, Form, Identity, Tied
from slug_lightning.objective.moments import DenseMoment, DiagonalMoment, Moment, moment
from slug_lightning.objective.uses import Use, UseFinder, View, form_of
from slug_lightning.tensors.dtensor import local
from slug_lightning.utils.names import some_of

PARTS = {"input_covariance": "input", "output_covariance": "output", "batch_input": "input", "batch_output": "output"}
"""What can be collected, and the side of a tensor that it acts on."""
NEEDS = frozenset({"forget:input_covariance", *(f"retain:{part}" for part in PARTS)})
"""What a direction may need to know of a layer."""
UNACCOUNTED = 0.1
"""Share of a tensor's first gradient that the uses found may leave open, above what 16-bit rounding leaves."""
INSTEAD = "per-batch gradients are used instead"
UNSEEN = "no use was found that is understood; without a backward pass, nothing is known of it"


class Statistics(NamedTuple):
    """What was collected.

    Attributes:
        factors: by part, then by tensor name.
        fallbacks: why a tensor has factors of per-batch gradients in place of covariances, by its name.
    """

    factors: dict[str, dict[str, Factor]]
    fallbacks: dict[str, str]

    def notes(self) -> list[str]:
        """Say for the report which tensors have other factors than asked for, a sentence for each reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.fallbacks.items():
            reasons.setdefault(reason, []).append(name)
        return [
            f"directions: {some_of(names)}: {reason}" + ("" if reason == UNSEEN else f"; {INSTEAD}")
            for reason, names in reasons.items()
        ]


class Curvature:
    r"""Collects second moments of the inputs x and output gradients d of every use y = W x of some tensors.

    Over N samples n and the live positions t, those whose d is not zero: input covariance A = 1/N Σ_n Σ_t x xᵀ, output
    covariance B = 1/N Σ_n Σ_t d dᵀ with d of that sample's own loss, and of the gradients G_b of batches of n_b samples
    Σ n_b/N G_bᵀ G_b and Σ n_b/N G_b G_bᵀ. A matrix whose uses are not understood gets the latter two in place of the
    former; a vector always gets the diagonal of the first of these.

    Give it to `Objective.gradient` or `Objective.forward_statistics`; then `statistics` is set, the same on all ranks.

    Args:
        module: owns the tensors.
        parameters: the tensors, by name.
        needs: which of `PARTS` to collect.
        processes: the ranks that share the batches.
        summing: entered where products are summed, which costs something beside the pass.

    Raises:
        UnlearnError: if a part is unknown, or a tensor is split for tensor parallelism.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        needs: Iterable[str],
        processes: Processes | None = None,
        summing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.needs = sorted(set(needs))  # in the same order in every process
        if unknown := set(self.needs) - PARTS.keys():
            raise UnlearnError(f"statistics: {some_of(sorted(unknown))} cannot be collected, only {some_of(PARTS)}")
        if split := [name for name, p in parameters.items() if _is_tensor_parallel(p)]:
            raise UnlearnError(
                f"statistics: {some_of(split)}: split for tensor parallelism, so that no rank sees all of its inputs and "
                "outputs; use direction='gradient', or FSDP2 alone"
            )
        self.processes = processes or Processes()
        self.summing = summing
        self.tensors = {name: _Collected(name, p, self.needs) for name, p in parameters.items()}
        self.statistics: Optional[Statistics] = None
        self.forward_only = False
        self._finder = partial(UseFinder, module, parameters, self._found)
        self.samples = 0
        self._pending: list[tuple[Use, Optional[Tensor]]] = []
        self._gradients: dict[str, Tensor] = {}

    @property
    def asked(self) -> dict[str, list[str]]:
        """What is collected, as plain data."""
        return {"needs": self.needs, "tensors": sorted(self.tensors)}

    @contextmanager
    def watching(self, forward_only: bool = False) -> Iterator[None]:
        """Inside, see what uses the tensors."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it computes a whole block by one call
        self.forward_only = forward_only
        try:
            with self._finder():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            self.clear()

    def clear(self) -> None:
        """Drop what was seen since the last batch was folded: it is run again."""
        self._pending.clear()
        self._gradients.clear()

    def gradient(self, name: str, gradient: Tensor) -> None:
        """Take the gradient of this batch, as backward gave it."""
        collected = self.tensors.get(name)
        if collected is not None and collected.takes_gradient:
            self._gradients[name] = gradient

    def fold(self, weight: float, samples: int, batch: Any = None) -> None:
        """Add what was seen of a batch.

        Args:
            weight: by which backward's gradients are those of each sample's own loss.
            samples: of the batch; 0 for a stand-in.
            batch: whose `attention_mask` says which positions count, where there is no backward.
        """
        if samples:
            self.samples += samples
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            seen: dict[str, list[_Seen]] = {}
            for use, d in self._pending:
                seen.setdefault(use.name, []).append(_Seen(use, d, weight, mask))
            with self.summing():
                for name, collected in self.tensors.items():
                    gradient = self._gradients.get(name)
                    scaled = None if gradient is None else gradient.to(collected.dtype) * weight
                    collected.add(seen.pop(name, []), scaled, samples)
        self.clear()

    def finish(self) -> Statistics:
        """Sum over the ranks; collective, once, after the last batch."""
        told = {name: one.told for name, one in self.tensors.items()}
        everywhere = self.processes.all_gather_object("uses of tensors", told)
        counts = self.processes.all_gather_object("samples of statistics", self.samples, each_data_rank=True)
        for name, one in self.tensors.items():
            found = {of_rank[name] for of_rank in everywhere} - {None}
            if len(found) > 1:
                raise UnlearnError(f"statistics: {name} is used in another way on other ranks; does a step depend on the rank?")
            if found and one.told is None:
                one.settle(*found.pop())
        unseen = [name for name, one in self.tensors.items() if one.kind in ("", "fallback")]
        if self.forward_only:
            for name in unseen:
                self.tensors[name].settle(Form(self.tensors[name].shape), "fallback", UNSEEN)
        elif unseen := [name for name in unseen if self.tensors[name].is_sharded]:
            raise UnlearnError(
                f"statistics: {some_of(unseen)}: no use was found that is understood, and there are no gradients of single "
                "batches to go by; leave it out by layers=…"
            )
        buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in (b for one in self.tensors.values() for m in one.moments.values() for b in m.buffers):
            buffers.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        if self.processes.data_world_size > 1:
            for group in buffers.values():
                packed = torch.cat([buffer.flatten() for buffer in group])
                self.processes.all_reduce_sum([packed])
                for buffer, part in zip(group, packed.split([b.numel() for b in group]), strict=True):
                    buffer.copy_(part.view_as(buffer))
        self.samples = total = sum(counts)
        factors = {part: {name: one.factor(part, total) for name, one in self.tensors.items()} for part in self.needs}
        reasons = {name: one.reason for name, one in self.tensors.items() if one.reason}
        self.statistics = Statistics(factors, reasons)
        for one in self.tensors.values():
            one.moments.clear()
        return self.statistics

    def _found(self, use: Use, y: Tensor) -> None:
        if self.forward_only:
            # A copy: without a graph, the model may change it in place.
            self._pending.append((replace(use, x=use.x.clone()), None))
        elif torch.is_grad_enabled() and y.requires_grad:
            # When backward comes by: what a checkpoint computes again gets no gradient, and so counts once.
            y.register_hook(lambda d: self._pending.append((use, d.detach())))


class _Seen(NamedTuple):
    """A use in this batch."""

    use: Use
    d: Optional[Tensor]
    weight: float
    mask: Any

    def rows(self, view: View, form: Form, dtype: torch.dtype) -> tuple[slice, Tensor, Tensor, Optional[Tensor]]:
        """Return the groups, their inputs (ids of an embedding), which positions are live, and output gradients."""
        size = form.size("output")
        groups = slice(None) if view.kind != "matrix" else slice(view.start // size, view.stop // size)
        x, d = self.use.inputs(), None
        if self.d is None:
            count = form.groups if view.kind == "convolution" else len(range(form.groups)[groups])
            live = self._unmasked(x.shape[0 if view.kind == "embedding" else 1], view).expand(count, -1)
        else:
            d = self.use.outputs(self.d).to(dtype) * self.weight
            d = d if view.kind == "convolution" else d[0].unflatten(-1, (-1, size)).movedim(1, 0)
            if self.use.padding is not None:
                d = d * (x != self.use.padding % form.size("input"))[None, :, None]
            live = (d != 0).any(-1)
        if view.kind == "embedding":
            return groups, x, live, d
        # Few positions may be live: behind a causal mask, or where one token is read.
        where = live.any(0).nonzero()[:, 0]
        x, live = x[:, where].to(dtype), live[:, where]
        return groups, x, live, None if d is None else d[:, where]

    def _unmasked(self, positions: int, view: View) -> Tensor:
        x = self.use.x
        if isinstance(self.mask, Tensor) and view.kind != "convolution" and self.mask.shape == x.shape[:2]:
            return self.mask.reshape(-1).bool().to(x.device)
        return torch.ones(positions, dtype=torch.bool, device=x.device)


class _Collected:
    """The sums of one tensor; its first batch settles how it acts."""

    def __init__(self, name: str, parameter: Tensor, needs: Iterable[str]) -> None:
        self.name = name
        self.needs = needs
        self.shape = tuple(parameter.shape)
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.device = local(parameter).device
        self.is_sharded = isinstance(parameter, DTensor)
        self.form: Form | None = None
        self.kind = ""
        self.reason = ""
        self.moments: dict[str, Moment] = {}
        if len(self.shape) < 2:
            self.settle(Form(self.shape), "vector", "")

    @property
    def takes_gradient(self) -> bool:
        """Whether the gradient of the batch is needed."""
        return not self.is_sharded and (self.form is None or self.kind in ("vector", "fallback"))

    @property
    def told(self) -> tuple[Form, str, str] | None:
        """What is settled."""
        return None if self.form is None else (self.form, self.kind, self.reason)

    def settle(self, form: Form, kind: str, reason: str) -> None:
        """Settle how the tensor acts, and make the sums for it."""
        self.form, self.kind, self.reason = form, kind, reason
        of_batches = sorted({f"batch_{PARTS[part]}" for part in self.needs})
        for part in of_batches if kind in ("vector", "fallback") else self.needs:
            side = PARTS[part]
            if (kind == "vector" and side == "output") or (kind == "tied" and part == "output_covariance"):
                continue  # the identity
            diagonal = kind == "vector" or (kind == "embedding" and side == "input")
            self.moments[part] = moment(form, side, diagonal, self.dtype, self.device)  # type: ignore[arg-type]
        if kind == "tied" and "input_covariance" in self.needs:
            rows = Form((1, self.shape[0]))
            # Dense, however wide: what solves for both sides needs all eigenvectors.
            wide = (1, form.size("input"), form.size("input"))
            self.moments["input_covariance"] = DenseMoment(form, "input", wide, dtype=self.dtype, device=self.device)
            self.moments["counts"] = moment(rows, "input", True, self.dtype, self.device)

    def add(self, seen: list[_Seen], gradient: Tensor | None, samples: int) -> None:
        """Add one batch; `gradient` is n_b G_b."""
        if self.form is None and (seen or gradient is not None):
            self._settle_by(seen, gradient)
        if self.kind in ("vector", "fallback"):
            if self.is_sharded:
                raise UnlearnError(
                    f"statistics: {self.name}: {self.reason or 'a vector'}, and sharded, so that no rank has the gradient of "
                    "its own batch; use direction='gradient' or leave it out by layers=…"
                )
            if gradient is not None:
                assert self.form is not None
                self._add_batch(self.form.blocks(gradient), samples)
        elif seen:
            product = self._add_uses(seen)
            if product is not None:
                self._add_batch(product, samples)

    def _settle_by(self, seen: list[_Seen], gradient: Tensor | None) -> None:
        found = form_of(self.shape, [one.use.view for one in seen])
        form, kind, reason = (Form(self.shape), "fallback", found) if isinstance(found, str) else (*found, "")
        if kind != "fallback" and gradient is not None:
            self.form, self.kind = form, kind
            rest = gradient - form.tensor(self._products(seen))
            if rest.norm() > UNACCOUNTED * gradient.norm():
                form, kind, reason = Form(self.shape), "fallback", "something else than products uses it as well"
        self.settle(form, kind, reason)

    def _rows(self, one: _Seen) -> tuple[View, slice, Tensor, Tensor, Tensor | None]:
        view, form = one.use.view, self.form
        assert form is not None
        kinds = {"tied": ("matrix", "embedding")}.get(self.kind, (self.kind,))
        fits = view is not None and view.kind in kinds
        if view is not None and view.kind == "matrix":
            size = form.size("output")
            fits &= view.transposed == form.transposed and view.start % size == 0 and view.stop % size == 0
        if view is None or not fits:
            raise UnlearnError(f"statistics: {self.name} is used otherwise than in the first batch; leave it out by layers=…")
        # An embedding maps a one-hot id to a column of the transpose, whatever else the tensor does.
        acts = Form(self.shape, transposed=True) if view.kind == "embedding" else form
        return view, *one.rows(view, acts, self.dtype)

    def _product(self, view: View, groups: slice, x: Tensor, d: Tensor) -> Tensor:
        """n_b G_b of one use, as blocks of the form."""
        assert self.form is not None
        out = torch.zeros(self.form.matrix, dtype=self.dtype, device=self.device)
        if view.kind == "embedding":
            looked_up = torch.zeros(self.shape, dtype=self.dtype, device=self.device).index_add_(0, x, d[0])
            return self.form.blocks(looked_up)
        out[groups] = d.mT @ x
        return out

    def _products(self, seen: list[_Seen]) -> Tensor:
        rows = [self._rows(one) for one in seen]
        return torch.stack([self._product(view, groups, x, d) for view, groups, x, _, d in rows if d is not None]).sum(0)

    def _add_uses(self, seen: list[_Seen]) -> Tensor | None:
        """Add to the covariances; returns n_b G_b if it is needed."""
        assert self.form is not None
        total = None
        for one in seen:
            view, groups, x, live, d = self._rows(one)
            within = range(self.form.groups)[groups]
            if (inputs := self.moments.get("input_covariance")) is not None:
                if view.kind == "embedding":
                    counts = self.moments.get("counts", inputs)
                    assert isinstance(counts, DiagonalMoment)
                    counts.count(x, live[0])
                else:
                    _add_inputs(inputs, x, live, within)
            if d is None:
                continue
            if (outputs := self.moments.get("output_covariance")) is not None:
                outputs.add(d, within)
            if self.moments.keys() & {"batch_input", "batch_output"}:
                product = self._product(view, groups, x, d)
                total = product if total is None else total + product
        return total

    def _add_batch(self, product: Tensor, samples: int) -> None:
        rows = product / math.sqrt(samples)
        for part, transposed in (("batch_input", rows), ("batch_output", rows.mT)):
            if part in self.moments:
                self.moments[part].add(transposed, range(len(transposed)))

    def factor(self, part: str, samples: int) -> Factor:
        """The factor of one part, over this number of samples on all ranks."""
        form, side = self.form or Form(self.shape), PARTS[part]
        held = self.moments.get(part if self.kind not in ("vector", "fallback") else f"batch_{side}")
        if held is None or samples == 0:
            return Identity(form, side)  # type: ignore[arg-type]
        if "counts" in self.moments and part == "input_covariance":
            counts = self.moments["counts"].factor(samples)
            assert isinstance(counts, Diagonal) and isinstance(held, DenseMoment)
            return Tied(form, "input", held.whole(samples)[0], counts.values[0])
        return held.factor(samples)


def _add_inputs(moment: Moment, x: Tensor, live: Tensor, groups: Sequence[int]) -> None:
    """Add the live rows of x, `[groups or 1, positions, in]`; slices of a packed weight mostly share them."""
    if len(x) == len(live):
        moment.add(torch.where(live[..., None], x, 0), groups)
    elif live.shape[1]:  # `unique` refuses what has no position
        masks, which = live.unique(dim=0, return_inverse=True)
        for number, mask in enumerate(masks):
            moment.add(x[:, mask], [group for group, own in zip(groups, which.tolist(), strict=True) if own == number])


def _is_tensor_parallel(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == TENSOR and not isinstance(placement, Replicate)
        for name, placement in zip(names, parameter.placements, strict=False)
    )

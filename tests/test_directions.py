"""Directions against the problems that they solve."""

from __future__ import annotations

import pytest
import torch
from _callback import unlearn_callback
from torch import nn

from _tiny import loader, trained, trainer
from slug_lightning.methods.slug.directions import DIRECTIONS, KFAC, BatchCurvature, Covariance, Engram, RetainNullSpace
from slug_lightning.methods.slug.statistics import LayerStatistics
from slug_lightning.objective.curvature import NEEDS
from slug_lightning.objective.factors import Dense, Form
from slug_lightning.tensors.layers import Layer

FORM = Form((3, 4))
DOUBLE = torch.float64


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=DOUBLE)


def second_moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


def layer(**matrices: torch.Tensor) -> LayerStatistics:
    """One tensor `w`; a matrix by the need's name, with `_` in place of the colon after the kind."""
    factors = {}
    for name, matrix in matrices.items():
        side = "output" if name.endswith(("output", "output_covariance")) else "input"
        factors[name.replace("_", ":", 1)] = {"w": Dense(FORM, side, matrix[None])}
    parameter = nn.Parameter(draw(3, 4))
    return LayerStatistics(Layer("w", {"w": parameter}), 1.0, 1.0, 1.0, 0.0, factors=factors)


def damped(m: torch.Tensor, damping: float) -> torch.Tensor:
    return m + damping * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_direction_gives_a_tensor_of_the_gradients_shape_from_what_it_needs(name):
    direction = DIRECTIONS[name]
    assert direction.needs <= NEEDS
    sizes = {need: 3 if "output" in need else 4 for need in direction.needs}
    one = layer(**{need.replace(":", "_"): second_moment(draw(20, size)) for need, size in sizes.items()})
    (found,) = direction(one, {"w": draw(3, 4)}).values()
    assert found.shape == (3, 4) and found.isfinite().all() and found.norm() > 0


def test_covariance_changes_the_outputs_least_for_its_first_order_effect():
    x, g, damping = draw(9, 4), draw(3, 4), 0.1
    a = second_moment(x)
    found = Covariance(damping)(layer(retain_input_covariance=a), {"w": g})["w"].flatten()
    # KKT conditions of min Δᵀ H Δ with gᵀΔ = 1, over Δ as one vector.
    hessian = torch.kron(torch.eye(3, dtype=DOUBLE), damped(a, damping))
    system = torch.zeros(13, 13, dtype=DOUBLE)
    system[:12, :12], system[:12, 12], system[12, :12] = 2 * hessian, g.flatten(), g.flatten()
    solution = torch.linalg.solve(system, torch.eye(13, dtype=DOUBLE)[12])[:12]
    torch.testing.assert_close(found / (found @ g.flatten()), solution)


def test_kfac_is_the_natural_gradient_where_inputs_and_output_gradients_are_independent():
    x, d, g = draw(6, 4), draw(5, 3), draw(3, 4)
    fisher = torch.stack([torch.outer(torch.outer(v, u).flatten(), torch.outer(v, u).flatten()) for u in x for v in d]).mean(0)
    one = layer(retain_input_covariance=second_moment(x), retain_output_covariance=second_moment(d))
    found = KFAC(damping=1e-12)(one, {"w": g})["w"]
    torch.testing.assert_close(found.flatten(), torch.linalg.solve(fisher, g.flatten()), rtol=1e-6, atol=1e-8)


def test_batch_engram_and_null_space_are_what_they_say():
    a, b, f, g = second_moment(draw(9, 4)), second_moment(draw(8, 3)), second_moment(draw(7, 4)), draw(3, 4)
    found = BatchCurvature()(layer(retain_batch_input=a, retain_batch_output=b), {"w": g})["w"]
    torch.testing.assert_close(found, damped(b, 1.0).inverse() @ g @ damped(a, 1.0).inverse())
    one = layer(forget_input_covariance=f, retain_input_covariance=a)
    weight = one.layer.parameters["w"].detach()
    torch.testing.assert_close(Engram()(one, {"w": g})["w"], -weight @ f @ damped(a, 0.1).inverse())
    assert Engram.is_fixed
    low = draw(4, 2)
    (kept,) = RetainNullSpace(share=1 - 1e-9)(layer(retain_input_covariance=low @ low.T), {"w": g}).values()
    assert (kept @ low).abs().max() < 1e-6 and kept.norm() > 0


@pytest.mark.parametrize("name", sorted(DIRECTIONS.keys() - {"gradient"}))
@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_every_direction_runs_by_its_name(name, granularity):
    options = {"direction": name, "granularity": granularity, "forget_target": 1e6, "retain_tolerance": 1.0}
    callback = unlearn_callback(forget=loader(True), retain=loader(False), **options)
    trainer(callback).fit(trained(), loader(False), loader(False))
    assert callback.report.trace and not any("directions:" in note for note in callback.report.notes)

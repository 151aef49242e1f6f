"""Factors against plain linear algebra on dense matrices."""

from __future__ import annotations

import pytest
import torch

from slug_lightning.errors import UnlearnError
from slug_lightning.objective import moments
from slug_lightning.objective.factors import Dense, Diagonal, Form, Identity, LowRank, Tied


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def covariance(size: int, groups: int = 1, rank: int | None = None) -> torch.Tensor:
    x = draw(groups, rank or 2 * size, size)
    return x.mT @ x


def damped(m: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
    return m + damping * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype)


@pytest.mark.parametrize(
    "form", [Form((6, 4)), Form((4, 6), True), Form((6, 4), groups=3), Form((6, 2, 3), groups=2), Form((5,)), Form(())]
)
def test_blocks_and_tensor_are_inverse(form):
    tensor = torch.randn(form.shape)
    assert torch.equal(form.tensor(form.blocks(tensor)), tensor)
    assert form.blocks(tensor).shape == form.matrix


def test_dense_acts_from_the_right_on_inputs_and_from_the_left_on_outputs():
    g, a, b = draw(3, 4), covariance(4), covariance(3)
    of_input, of_output = Dense(Form((3, 4)), "input", a), Dense(Form((3, 4)), "output", b)
    torch.testing.assert_close(of_input.solve(g), g @ damped(a[0]).inverse())
    torch.testing.assert_close(of_output.solve(g, 0.5), damped(b[0], 0.5).inverse() @ g)
    torch.testing.assert_close(of_input.times(g), g @ a[0])
    transposed = Dense(Form((4, 3), transposed=True), "input", a)
    torch.testing.assert_close(transposed.solve(g.T.contiguous()), (g @ damped(a[0]).inverse()).T)


def test_each_group_has_its_own_matrix_and_a_zero_one_is_the_identity():
    g, a = draw(6, 4), covariance(4, 3)
    a[1] = 0
    found = Dense(Form((6, 4), groups=3), "input", a).solve(g)
    torch.testing.assert_close(found[:2], g[:2] @ damped(a[0]).inverse())
    torch.testing.assert_close(found[2:4], g[2:4])
    torch.testing.assert_close(found[4:], g[4:] @ damped(a[2]).inverse())


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_the_leading_eigenvectors_are_projected_out(share):
    g, a = draw(3, 6), covariance(6)
    values, vectors = torch.linalg.eigh(a[0])
    count = next(k for k in range(1, 7) if values[-k:].sum() >= share * values.sum() - 1e-9)
    u = vectors[:, -count:]
    torch.testing.assert_close(Dense(Form((3, 6)), "input", a).project_out(g, share), g - g @ u @ u.T)
    diagonal = Diagonal(Form((3, 6)), "input", torch.tensor([[5.0, 1.0, 0.0, 4.0, 0.0, 0.0]]))
    kept = {0.5: [1, 2, 3, 4, 5], 0.95: [2, 4, 5], 1.0: [2, 4, 5]}[share]
    assert diagonal.project_out(g, share).any(0).nonzero().flatten().tolist() == kept


def test_diagonal_is_a_dense_diagonal_matrix():
    g, values = draw(3, 4), torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    dense, diagonal = Dense(Form((3, 4)), "input", torch.diag_embed(values)), Diagonal(Form((3, 4)), "input", values)
    torch.testing.assert_close(diagonal.solve(g), dense.solve(g))
    torch.testing.assert_close(diagonal.times(g), dense.times(g))


def test_tied_solves_for_both_sides_at_once():
    g, a, counts = draw(5, 3), covariance(3)[0], torch.tensor([0.0, 1.0, 4.0, 0.0, 2.0], dtype=torch.float64)
    tied = Tied(Form((5, 3)), "input", a, counts)
    found = tied.solve(g)
    torch.testing.assert_close(found @ damped(a) + (counts + 0.1 * counts.mean())[:, None] * found, g)
    torch.testing.assert_close(tied.times(g), g @ a + counts[:, None] * g)


@pytest.mark.parametrize("side", ["input", "output"])
def test_low_rank_is_close_to_dense_where_the_spectrum_is(side, monkeypatch):
    monkeypatch.setattr(moments, "WIDEST", 8)
    monkeypatch.setattr(moments, "RANK", 12)
    form = Form((40, 40))
    rows = draw(1, 100, 6) @ draw(1, 6, 40)
    sketched = moments.moment(form, side, False, torch.float64, torch.device("cpu"))
    for part in rows.split(30, 1):
        sketched.add(part, range(len(part)))
    low, dense, g = sketched.factor(10), Dense(form, side, rows.mT @ rows / 10), draw(40, 40)
    assert isinstance(low, LowRank)
    torch.testing.assert_close(low.solve(g), dense.solve(g), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(low.times(g), dense.times(g), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low.project_out(g, 0.9), dense.project_out(g, 0.9), rtol=1e-5, atol=1e-6)
    nothing = moments.moment(form, side, False, torch.float32, torch.device("cpu")).factor(1)
    torch.testing.assert_close(nothing.solve(g), g)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 12])
def test_a_wide_square_is_the_same_computed_by_blocks(width, monkeypatch):
    monkeypatch.setattr(moments, "BLOCK", 3)
    made = moments.moment(Form((4, width), groups=4), "input", False, torch.float64, torch.device("cpu"))
    rows, shared, nothing = draw(2, 6, width), draw(1, 5, width), draw(1, 0, width)
    made.add(rows, [1, 2])
    made.add(shared, [0, 2, 3])
    made.add(nothing, [0, 1, 2, 3])
    own = shared.mT @ shared
    expected = torch.cat([own, rows[:1].mT @ rows[:1], rows[1:].mT @ rows[1:] + own, own]) / 7
    torch.testing.assert_close(made.factor(7).matrices, expected)


def test_results_have_the_dtype_of_the_tensor_and_a_singular_one_needs_damping():
    g = draw(3, 4).float()
    factor = Dense(Form((3, 4)), "input", covariance(4, rank=2))
    assert factor.solve(g).dtype == torch.float32 and Identity(Form((3, 4)), "output").solve(g).equal(g)
    with pytest.raises(UnlearnError, match="damping must be > 0"):
        Diagonal(Form((3, 2)), "input", torch.tensor([[0.0, 1.0]])).solve(torch.ones(3, 2), 0.0)

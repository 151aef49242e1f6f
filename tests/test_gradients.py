"""One gradient over all samples, whatever the batches, the precision and the parameters that take no part."""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from slug_lightning import gradients
from slug_lightning.cost import CostMeter
from slug_lightning.errors import UnlearnError
from slug_lightning.processes import Processes
from slug_lightning.turns import take_turns

SAMPLES = 12


def mean_gradient(loss_of, batches, *args):
    """The function under test, by one process."""
    return gradients.mean_gradient(loss_of, take_turns(batches, Processes()), *args)


def regression(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(SAMPLES, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, y, w


def mse_of(w):
    def loss_of(batch, number):
        x, y = batch
        return (x @ w - y).square().mean(), len(y)

    return loss_of


def test_of_a_linear_model_with_squared_error_it_is_the_closed_form():
    x, y, w = regression()
    gradient = mean_gradient(mse_of(w), [(x, y)], {"w": w})
    residual = x @ w.detach() - y
    torch.testing.assert_close(gradient.tensors["w"], 2 * x.T @ residual / SAMPLES)
    assert gradient.loss == pytest.approx(residual.square().mean().item())
    assert gradient.samples == SAMPLES


@settings(deadline=None, max_examples=50)
@given(cuts=st.sets(st.integers(1, SAMPLES - 1)), shuffle=st.permutations(range(SAMPLES)))
def test_the_gradient_does_not_depend_on_batching_or_order(cuts, shuffle):
    x, y, w = regression()
    edges = [0, *sorted(cuts), SAMPLES]
    parts = [shuffle[a:b] for a, b in itertools.pairwise(edges)]
    gradient = mean_gradient(mse_of(w), [(x[p], y[p]) for p in parts], {"w": w})
    whole = mean_gradient(mse_of(w), [(x, y)], {"w": w})
    torch.testing.assert_close(gradient.tensors["w"], whole.tensors["w"], rtol=1e-12, atol=1e-14)
    assert gradient.loss == pytest.approx(whole.loss, rel=1e-12)
    assert gradient.samples == SAMPLES


def test_a_step_along_it_raises_the_loss():
    x, y, w = regression()
    gradient = mean_gradient(mse_of(w), [(x, y)], {"w": w})
    moved = w.detach() + 1e-6 * gradient.tensors["w"]
    assert mse_of(moved)((x, y), 0)[0] > gradient.loss


class Failure(Exception):
    pass


def failing_at(loss_of, last):
    """A loss that works for some batches, then no more."""

    def loss_or_failure(batch, number):
        if number == last:
            raise Failure
        return loss_of(batch, number)

    return loss_or_failure


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("before", [None, 7.0])
def test_grad_is_not_touched(before, fail):
    x, y, w = regression()
    unused = torch.ones(2, requires_grad=True)
    grad = None if before is None else torch.full_like(w, before)
    w.grad = grad
    with pytest.raises(Failure) if fail else nullcontext():
        mean_gradient(failing_at(mse_of(w), 2 if fail else None), [(x, y)] * 3, {"w": w, "unused": unused})
    assert w.grad is grad and unused.grad is None
    assert grad is None or torch.equal(grad, torch.full_like(w, before))


def test_grad_that_is_there_already_does_not_count():
    x, y, w = regression()
    clean = mean_gradient(mse_of(w), [(x, y)], {"w": w}).tensors["w"]
    w.grad = torch.full_like(w, 7.0)
    assert torch.equal(mean_gradient(mse_of(w), [(x, y)], {"w": w}).tensors["w"], clean)


def test_a_reentrant_checkpoint_gives_the_same_gradient():
    x, y, w = regression()

    def loss_of(batch, number):
        predicted = checkpoint(lambda v: batch[0] @ v, w, use_reentrant=True)
        return (predicted - batch[1]).square().mean(), len(batch[0])

    found = mean_gradient(loss_of, [(x, y)], {"w": w}).tensors["w"]
    torch.testing.assert_close(found, mean_gradient(mse_of(w), [(x, y)], {"w": w}).tensors["w"])


@pytest.mark.parametrize("bad", [None, "loss", "data"])
def test_a_backward_pass_afterwards_accumulates_as_ever(bad):
    x, y, w = regression()
    failing = failing_at(mse_of(w), {"loss": 1}.get(bad))
    with pytest.raises(Failure if bad == "loss" else UnlearnError) if bad else nullcontext():
        mean_gradient(failing, [(x, y), (x * torch.nan if bad == "data" else x, y)], {"w": w})
    assert not w._post_accumulate_grad_hooks
    mse_of(w)((x, y), 0)[0].backward()
    once = w.grad.clone()
    mse_of(w)((x, y), 0)[0].backward()
    assert torch.equal(w.grad, 2 * once) and once.abs().sum() > 0


def test_a_parameter_that_the_loss_uses_twice_gets_the_gradient_of_both_uses():
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    hidden = nn.Linear(2, 2, bias=False)
    shared = nn.Sequential(hidden, hidden)
    gradient = mean_gradient(lambda x, _: ((x * w * w).sum(), 1), [torch.ones(2), torch.zeros(2)], {"w": w})
    assert gradient.tensors["w"].tolist() == [2.0, 3.0]  # 2xw, over two samples
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    found = mean_gradient(lambda x, _: (shared(x).square().mean(), len(x)), [x], {"w": hidden.weight})
    expected = torch.autograd.grad((x @ hidden.weight.T @ hidden.weight.T).square().mean(), hidden.weight)[0]
    torch.testing.assert_close(found.tensors["w"], expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), chosen=st.sets(st.integers(0, 5)))
def test_it_agrees_with_autograd_on_a_network_and_any_choice_of_its_parameters(seed, sizes, chosen):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parameters = {name: p for i, (name, p) in enumerate(net.named_parameters()) if i in chosen | {0}}
    batches = [torch.randn(count, 3, dtype=torch.float64) for count in sizes]
    found = mean_gradient(lambda x, _: (net(x).square().mean(), len(x)), batches, parameters)
    expected = torch.autograd.grad(net(torch.cat(batches)).square().mean(), list(parameters.values()))
    for ours, theirs in zip(found.tensors.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_sparse_gradient_is_summed_like_any_other():
    table = nn.Embedding(4, 2, sparse=True)
    gradient = mean_gradient(
        lambda x, _: (table(x).sum(1).mean(), len(x)), [torch.tensor([1, 1, 3]), torch.tensor([3])], {"w": table.weight}
    )
    assert gradient.tensors["w"].tolist() == [[0, 0], [0.5, 0.5], [0, 0], [0.5, 0.5]]


# ---- memory


def test_besides_the_sums_about_one_tensors_gradient_is_alive_at_a_time():
    largest = 1200
    parameters = {str(n): torch.ones(1000 + n * 10, requires_grad=True) for n in range(21)}
    sums = sum(p.nbytes for p in parameters.values())
    meter = CostMeter(torch.device("cpu"), count=True)
    with meter.phase("gradients"):
        mean_gradient(lambda factor, _: (sum((p * factor).sum() for p in parameters.values()), 1), [1.0, 2.0], parameters)
    assert sums <= meter.peak_bytes["gradients"] <= sums + 2 * 4 * largest + 100  # not twice the sums


def test_what_a_batch_keeps_for_its_backward_pass_is_gone_before_the_next_batch():
    w = torch.ones(3, requires_grad=True)
    graphs = []

    def loss_of(factor, number):
        assert all(graph() is None for graph in graphs)
        hidden = (w * factor).exp()  # exp keeps its output for the backward pass
        graphs.append(weakref.ref(hidden))
        return hidden.sum(), 1

    mean_gradient(loss_of, [1.0, 2.0, 3.0], {"w": w})
    assert len(graphs) == 3 and all(graph() is None for graph in graphs)


def test_neither_parameters_nor_the_graph_are_changed():
    x, y, w = regression()
    before = w.detach().clone()
    gradient = mean_gradient(mse_of(w), [(x, y)], {"w": w})
    assert torch.equal(w.detach(), before)
    assert not gradient.tensors["w"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(dtype):
    w = torch.ones(1, dtype=dtype, requires_grad=True)
    values = [2048.0] + [1.0] * 511  # in either half precision 2048 + 1 is 2048
    batches = [torch.tensor([v], dtype=dtype) for v in values]
    gradient = mean_gradient(lambda x, _: ((x * w).sum(), 1), batches, {"w": w}).tensors["w"]
    assert gradient.dtype == torch.float32
    assert gradient.item() == sum(values) / len(values)


def test_fp64_stays_fp64():
    x, y, w = regression()
    assert mean_gradient(mse_of(w), [(x, y)], {"w": w}).tensors["w"].dtype == torch.float64


def test_a_batch_without_loss_is_left_out_of_the_mean():
    x, y, w = regression()

    def loss_of(batch, number):
        return (None, 100) if number == 1 else mse_of(w)(batch, number)

    batches = [(x[:5], y[:5]), (x[5:9] * 1e6, y[5:9]), (x[9:], y[9:])]
    kept = torch.cat([x[:5], x[9:]]), torch.cat([y[:5], y[9:]])
    gradient = mean_gradient(loss_of, batches, {"w": w})
    torch.testing.assert_close(gradient.tensors["w"], mean_gradient(mse_of(w), [kept], {"w": w}).tensors["w"])
    assert gradient.samples == 8


def test_an_unused_parameter_has_gradient_zero():
    x, y, w = regression()
    unused = torch.ones(2, 5, requires_grad=True)
    gradient = mean_gradient(mse_of(w), [(x, y)], {"unused": unused, "w": w})
    assert torch.equal(gradient.tensors["unused"], torch.zeros(2, 5))
    assert gradient.tensors["w"].abs().sum() > 0


def test_a_parameter_used_by_one_batch_only_is_still_averaged_over_all_samples():
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    gradient = mean_gradient(lambda used, _: (3 * used.sum(), 1), [a, b, b, b], {"a": a, "b": b})
    assert (gradient.tensors["a"].item(), gradient.tensors["b"].item()) == (0.75, 2.25)


def test_batches_may_be_a_generator_and_are_numbered():
    x, y, w = regression()
    seen = []

    def loss_of(batch, number):
        seen.append(number)
        return mse_of(w)(batch, number)

    mean_gradient(loss_of, ((x, y) for _ in range(3)), {"w": w})
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_set_and_the_batch(bad):
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(UnlearnError, match=f"retain, batch 1: the loss is {bad}"):
        mean_gradient(lambda x, _: ((x * w).sum(), 1), [torch.ones(1), torch.tensor([bad])], {"w": w}, "retain")


def test_a_gradient_that_is_not_finite_names_its_layer():
    good, bad = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    with pytest.raises(UnlearnError, match=r"forget: the gradient of some\.layer holds NaN or inf"):
        mean_gradient(lambda x, _: ((good + bad.sqrt()).sum(), 1), [None], {"good": good, "some.layer": bad})


def test_an_empty_set_and_a_set_without_losses_are_told_apart():
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(UnlearnError, match="forget: the set is empty"):
        mean_gradient(lambda x, _: (w.sum(), 1), [], {"w": w})
    with pytest.raises(UnlearnError, match="retain: the step returns no loss for any batch"):
        mean_gradient(lambda x, _: (None, 1), [0, 1], {"w": w}, "retain")

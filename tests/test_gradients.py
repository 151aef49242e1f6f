"""One gradient over all samples, whatever the batches, the precision and the parameters that take no part."""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from _amounts import examples
from _processes import in_processes
from _simulated import simulate
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from slug_lightning.distributed.backward import DATA, Backward
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective import gradients
from slug_lightning.reports.cost import CostMeter
from slug_lightning.tensors.dtensor import shard, whole_like

SAMPLES = 12


def mean_gradient(loss_of, batches, *args):
    """The function under test, by one process."""
    return gradients.mean_gradient(loss_of, shard_batches(batches, Processes()), *args)


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


@examples(50)
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


@examples(20)
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


# ---- 16 bits: a batch that overflows is run again


class Half(torch.autograd.Function):
    """The identity, whose gradient goes through float16, as that of a half-precision layer does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().to(gradient.dtype)


def scaled(scale=2.0**16, processes=None, averages=1, interval=2000):
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return Backward(processes, scaler, averages)


class ThroughHalf:
    """A mean over samples x of w·x, whose gradient passes 16 bits on its way to w; remembers each run and its scale."""

    def __init__(self, w, backward):
        self.w, self.backward, self.runs = w, backward, []

    def __call__(self, x, number):
        self.runs.append((number, self.backward.scaler.get_scale()))
        return (Half.apply(self.w) * x).sum() / len(x), len(x)


def factors(*values):
    return [torch.tensor(batch).view(-1, 1) for batch in values]


def test_a_batch_that_overflows_is_run_again_with_half_the_scale():
    w = torch.ones(1, requires_grad=True)
    backward = scaled(2.0**16)
    loss_of = ThroughHalf(w, backward)
    # 65536 · 0.5 fits into 16 bits; 65536 · 1 does not, nor does 32768 · 5, 16384 · 5; 8192 · 5 does.
    batches = factors([0.5], [1.0], [5.0], [0.25, 0.75])
    found = gradients.mean_gradient(loss_of, shard_batches(batches, Processes()), {"w": w}, backward=backward)
    scales = [(0, 16), (1, 16), (1, 15), (2, 15), (2, 14), (2, 13), (3, 13)]
    assert loss_of.runs == [(number, 2.0**scale) for number, scale in scales]
    assert found.tensors["w"].item() == (0.5 + 1 + 5 + 0.25 + 0.75) / 5
    assert found.samples == 5 and found.loss == (0.5 + 1 + 5 + 2 * 0.5) / 5
    assert w.grad is None and not w._post_accumulate_grad_hooks


@examples(40)
@given(
    batches=st.lists(st.lists(st.integers(-64, 64).map(float), min_size=1, max_size=3), min_size=1, max_size=5),
    scale=st.integers(-3, 20),
)
def test_whatever_the_scale_the_gradient_is_that_without_one(batches, scale):
    w, untouched = torch.ones(1, requires_grad=True), torch.ones(2, requires_grad=True)
    backward = scaled(2.0**scale)
    loss_of = ThroughHalf(w, backward)
    parameters = {"w": w, "untouched": untouched}
    found = gradients.mean_gradient(loss_of, shard_batches(factors(*batches), Processes()), parameters, backward=backward)
    values = [value for batch in batches for value in batch]
    assert found.tensors["w"].item() == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-3 * 64)
    assert found.loss == pytest.approx(sum(values) / len(values), abs=1e-5) and found.samples == len(values)
    assert torch.equal(found.tensors["untouched"], torch.zeros(2))
    assert [number for number, _ in dict.fromkeys(loss_of.runs)] == sorted(number for number, _ in loss_of.runs)
    wanted = 2.0**scale
    for number, batch in enumerate(batches):
        own = [used for n, used in loss_of.runs if n == number]
        assert own[0] == wanted and own == [wanted / 2**i for i in range(len(own))]
        wanted = own[-1]
        largest = abs(torch.tensor(batch).sum() / len(batch)).item()
        assert largest * own[-1] < 65520 and all(largest * used > 65500 for used in own[:-1])


def test_of_an_overflowing_batch_no_tensors_gradient_is_added_not_even_those_that_are_finite():
    small, large = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    backward = scaled(2.0**16)
    runs = []

    def loss_of(x, number):
        runs.append(number)
        return (small * x + Half.apply(large) * 8 * x).sum(), 1

    batches = [torch.tensor([1.0]), torch.tensor([3.0])]
    parameters = {"small": small, "large": large}
    found = gradients.mean_gradient(loss_of, shard_batches(batches, Processes()), parameters, backward=backward)
    assert (found.tensors["small"].item(), found.tensors["large"].item()) == (2.0, 16.0)
    assert runs == [0] * 5 + [1] * 2  # 2^16 · 8 … 2^12 · 8 fits; 2^12 · 24 does not, 2^11 · 24 does
    assert found.loss == pytest.approx(18) and found.samples == 2


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_a_gradient_that_is_finite_at_no_scale_ends_with_the_remedy(scale):
    w = torch.zeros(1, requires_grad=True)
    backward = scaled(scale)
    runs = []

    def loss_of(x, number):
        runs.append(number)
        return w.sqrt().sum(), 1

    with pytest.raises(UnlearnError, match=r"retain, batch 0: the gradient is not finite in 16 bits.*bf16-mixed or 32"):
        gradients.mean_gradient(loss_of, shard_batches([None], Processes()), {"w": w}, "retain", backward)
    assert 14 <= len(runs) <= 40
    assert w.grad is None and not w._post_accumulate_grad_hooks


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale():
    w = torch.ones(1, requires_grad=True)
    backward = scaled()
    with pytest.raises(UnlearnError, match="batch 0: the loss is inf"):
        gradients.mean_gradient(
            lambda x, _: ((w * x).sum(), 1), shard_batches([torch.inf], Processes()), {"w": w}, backward=backward
        )
    assert backward.scaler.get_scale() == 2.0**16


def test_the_scale_never_grows_between_batches():
    w = torch.ones(1, requires_grad=True)
    backward = scaled(2.0**10, interval=1)
    loss_of = ThroughHalf(w, backward)
    gradients.mean_gradient(loss_of, shard_batches(factors([1.0], [1.0], [1.0]), Processes()), {"w": w}, backward=backward)
    assert {scale for _, scale in loss_of.runs} == {2.0**10}


def test_where_parts_of_a_gradient_lie_elsewhere_all_run_the_batch_again():
    """One process's part overflows; the other's would have been finite."""
    runs = {0: [], 1: []}

    def run(processes):
        w = torch.ones(1, requires_grad=True)
        runs[processes.data_rank] = []
        backward = scaled(2.0**16, processes)

        def loss_of(x, number):
            runs[processes.data_rank].append(backward.scaler.get_scale())
            return (Half.apply(w) * x * (3 if processes.data_rank else 0.5)).sum(), 1

        turns = [IndexedBatch(processes.data_rank, torch.ones(1))]
        return gradients.mean_gradient(loss_of, turns, {"w": w}, backward=backward).tensors["w"].item()

    assert simulate(2, run, in_step=True) == [1.75, 1.75]
    assert runs[0] == runs[1] == [2.0**16, 2.0**15, 2.0**14]
    assert simulate(2, run) == [1.75, 1.75]
    assert runs[0] == [2.0**16] and runs[1] == [2.0**16, 2.0**15, 2.0**14]


# ---- several processes


@examples(15)
@given(cuts=st.sets(st.integers(1, SAMPLES - 1)), shares=st.integers(1, 4), scale=st.sampled_from([None, 2.0**3]))
def test_however_many_processes_share_the_batches_it_is_one_gradient(cuts, shares, scale):
    x, y, w = regression()
    edges = [0, *sorted(cuts), SAMPLES]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]

    def run(processes):
        scaler = None if scale is None else GradScaler("cpu", init_scale=scale)
        backward = Backward(processes, scaler)
        found = gradients.mean_gradient(mse_of(w), shard_batches(batches, processes), {"w": w}, backward=backward)
        return found, processes.sums

    whole = mean_gradient(mse_of(w), [(x, y)], {"w": w})
    for found, sums in simulate(shares, run):
        torch.testing.assert_close(found.tensors["w"], whole.tensors["w"], rtol=1e-12, atol=1e-14)
        assert (found.loss, found.samples) == (pytest.approx(whole.loss, rel=1e-12), SAMPLES)
        assert sums == (shares > 1)


def test_sets_without_losses_and_without_batches_are_told_apart_by_all_processes():
    w = torch.ones(1, requires_grad=True)

    def run(batches, loss):
        def one(processes):
            backward = Backward(processes)
            return gradients.mean_gradient(lambda x, _: (loss, 1), shard_batches(batches, processes), {"w": w}, backward=backward)

        return [str(error) for error in simulate(2, one)]

    assert all("the set is empty" in message for message in run([], None))
    assert all("no loss for any batch" in message for message in run([0], None))


def test_a_loss_that_is_not_finite_in_a_stand_in_is_nobodys_concern():
    w = torch.ones(1, requires_grad=True)

    def run(processes):
        backward = Backward(processes)
        turns = [
            IndexedBatch(0, 2.0, processes.data_rank == 0),
            IndexedBatch(2, 4.0 if processes.data_rank == 0 else torch.inf, processes.data_rank == 0),
        ]
        return gradients.mean_gradient(lambda x, _: ((w * x).sum(), 1), turns, {"w": w}, backward=backward).tensors["w"].item()

    assert simulate(2, run) == [3.0, 3.0]


class Net(nn.Module):
    """fp64 and fp32 tensors, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide, self.narrow, self.unused = nn.Linear(3, 5).double(), nn.Linear(5, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)).float()).square().mean()


def data():
    return torch.randn(17, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def by_ddp(batch_size):
    dist.init_process_group("gloo")
    processes = Processes(dist.get_rank(), dist.get_world_size())
    calls = []
    all_reduce, dist.all_reduce = dist.all_reduce, lambda tensor, **how: (calls.append(tensor.dtype), all_reduce(tensor, **how))
    net = Net()
    turns = shard_batches(DataLoader(data(), batch_size=batch_size), processes)
    backward = Backward(processes)
    found = gradients.mean_gradient(lambda x, _: (net(x), len(x)), turns, dict(net.named_parameters()), backward=backward)
    return found, calls


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_three_processes_give_the_gradient_of_autograd_by_one_sum_for_each_kind_of_number(batch_size):
    net = Net()
    expected = dict(
        zip(
            dict(net.named_parameters()),
            torch.autograd.grad(net(data()), list(net.parameters()), allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )
    found = in_processes(3, by_ddp, batch_size)
    for gradient, calls in found:
        assert sorted(map(str, calls)) == ["torch.float32", "torch.float64"]
        assert gradient.samples == 17
        assert gradient.loss == pytest.approx(net(data()).item())
        for name, tensor in expected.items():
            assert gradient.tensors[name].dtype == tensor.dtype
            torch.testing.assert_close(gradient.tensors[name], tensor, rtol=1e-5, atol=1e-7)
            assert torch.equal(gradient.tensors[name], found[0][0].tensors[name])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([nn.Linear(3, 7), nn.Linear(7, 3), nn.Linear(3, 2, bias=False)])
        self.scale = nn.Parameter(torch.tensor(1.5))  # stays whole: a number cannot be sharded

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return x.square().mean()


def rows(sizes):
    return torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(6)).split(sizes)


def by_fsdp(sizes, half):
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=(DATA,))
    net = Block()
    shard(net, mesh)
    processes = Processes(dist.get_rank(), count, mesh.get_group(), in_step=True)
    scaler = GradScaler("cpu", init_scale=2.0**17) if half else None
    backward = Backward(processes, scaler, averages=count)
    parameters = dict(net.named_parameters())
    runs = []

    def loss_of(x, number):
        runs.append(number)
        loss = net(x)
        return (Half.apply(loss) if half else loss), len(x)

    turns = shard_batches(list(rows(sizes)), processes)
    found = gradients.mean_gradient(loss_of, turns, parameters, backward=backward)
    tensors = {name: whole_like(found.tensors[name], parameters[name]) for name in parameters}
    return tensors, found.loss, found.samples, processes.sums, len(runs)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("count", "sizes"), [(2, (4, 1, 3)), (2, (5,)), (3, (1, 6, 2, 2)), (2, (3, 3))])
def test_what_a_sharded_model_averages_is_the_mean_over_the_samples(count, sizes, half):
    net, everything = Block(), torch.cat(rows(sizes))
    expected = dict(zip(dict(net.named_parameters()), torch.autograd.grad(net(everything), list(net.parameters())), strict=True))
    found = in_processes(count, by_fsdp, sizes, half)
    rounds = -(-len(sizes) // count)
    for tensors, loss, samples, sums, runs in found:
        assert samples == sum(sizes) and loss == pytest.approx(net(everything).item(), rel=1e-5)
        assert sums == 1, "of what stays whole; the rest is summed by FSDP"
        assert runs == (rounds + 2 if half else rounds)  # 2^17 and 2^16 overflow; 2^15 doesn't, and stays
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=2e-3 if half else 1e-5, atol=1e-4 if half else 1e-7)
            assert torch.equal(tensors[name], found[0][0][name])


def test_a_sharded_model_refuses_a_step_without_a_loss():
    w = torch.ones(1, requires_grad=True)

    def run(processes):
        backward = Backward(processes, averages=2)
        return gradients.mean_gradient(lambda x, _: (None, 1), shard_batches([1, 2], processes), {"w": w}, backward=backward)

    assert all("a sharded model must run every batch" in str(error) for error in simulate(2, run, in_step=True))

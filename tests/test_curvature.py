"""Second moments of what layers see, against plain arithmetic, however a weight is used and whoever runs the batches."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from _processes import Ended, in_processes
from _simulated import simulate
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from _tiny import PlainRunner
from slug_lightning import RetainCache
from slug_lightning.distributed.backward import DATA, Backward
from slug_lightning.distributed.batch_sharding import IndexedBatch, shard_batches
from slug_lightning.distributed.processes import Processes
from slug_lightning.errors import UnlearnError
from slug_lightning.objective.curvature import PARTS, Curvature
from slug_lightning.objective.factors import Dense, Diagonal, Identity, Tied
from slug_lightning.objective.gradients import mean_gradient
from slug_lightning.objective.objective import Objective

DOUBLE = {"dtype": torch.float64}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **DOUBLE)


class Net(nn.Module):
    """A forward function and its parameters."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.double()

    def forward(self, x):
        return self.function(self, x)


def losses(net, x):
    return net(x).square().flatten(1).sum(1)


def collect(net, batches, needs=PARTS, backward=None, processes=None, names=None):
    parameters = {name: p for name, p in net.named_parameters() if names is None or name in names}
    watch = Curvature(net, parameters, needs, processes)
    backward = backward or Backward(processes)
    turns = shard_batches(batches, backward.processes)
    gradient = mean_gradient(lambda x, _: (losses(net, x).mean(), len(x)), turns, parameters, backward=backward, watch=watch)
    return watch.statistics, gradient.tensors


def moments_of(net, x):
    """A and B by hand, from a net whose `seen` gives the inputs and outputs of each use."""
    a = b = 0
    for one in x:
        net.seen = []
        loss = losses(net, one[None]).sum()
        for inputs, y in net.seen:
            (d,) = torch.autograd.grad(loss, y, retain_graph=True)
            live = d.flatten(0, -2).any(-1)
            rows, d = inputs.detach().flatten(0, -2)[live], d.flatten(0, -2)
            a, b = a + rows.T @ rows, b + d.T @ d
    return a / len(x), b / len(x)


def apply(net, w, x):
    y = x @ w.T
    net.seen.append((x, y))
    return y


def by_linear(net, x):
    return F.linear(x, net.w)


def by_conv1d_of_transformers(net, x):
    return torch.addmm(net.bias, x.flatten(0, -2), net.w).view(*x.shape[:-1], -1)


BATCHES = list(draw(5, 6, 3).split([2, 2, 1]))
X = torch.cat(BATCHES)
HOW = {
    "linear": (by_linear, False),
    "@": (lambda net, x: x @ net.w, True),
    "matmul": (lambda net, x: torch.matmul(x, net.w), True),
    "transposed": (lambda net, x: F.linear(x, net.w.T), True),
    "addmm": (by_conv1d_of_transformers, True),
    "left": (lambda net, x: (net.w @ x.mT).mT, False),
    "twice": (lambda net, x: F.linear(F.linear(x, net.w).tanh(), net.w), False),
    "checkpointed": (lambda net, x: checkpoint(by_linear, net, x, use_reentrant=False), False),
}


@pytest.mark.parametrize("how", HOW)
def test_covariances_are_those_of_single_samples(how):
    function, transposed = HOW[how]
    w = draw(3, 3)
    net = Net(lambda net, x: function(net, x).tanh(), w=w, bias=torch.zeros(3))
    w = w.T if transposed else w

    def seen(net, x):
        h = apply(net, net.w, x)
        return (apply(net, net.w, h.tanh()) if how == "twice" else h).tanh()

    a, b = moments_of(Net(seen, w=w), X)
    statistics, _ = collect(net, BATCHES)
    assert not statistics.fallbacks
    found = {part: statistics.factors[part]["w"] for part in PARTS}
    assert found["input_covariance"].form.transposed == transposed
    torch.testing.assert_close(found["input_covariance"].matrices[0], a)
    torch.testing.assert_close(found["output_covariance"].matrices[0], b)
    g = [torch.autograd.grad(losses(net, x).mean(), net.w)[0] for x in BATCHES]
    g = [one.T if transposed else one for one in g]
    torch.testing.assert_close(
        found["batch_input"].matrices[0], sum(len(x) * one.T @ one for x, one in zip(BATCHES, g, strict=True)) / 5
    )
    torch.testing.assert_close(
        found["batch_output"].matrices[0], sum(len(x) * one @ one.T for x, one in zip(BATCHES, g, strict=True)) / 5
    )


def test_positions_that_the_loss_does_not_depend_on_are_not_counted_unless_there_is_no_backward():
    net = Net(lambda net, x: F.linear(x, net.w)[:, :2], w=draw(4, 3))
    statistics, _ = collect(net, BATCHES)
    live = X[:, :2].flatten(0, 1)
    torch.testing.assert_close(statistics.factors["input_covariance"]["w"].matrices[0], live.T @ live / 5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid"}])
def test_a_convolution_sees_patches(groups, options):
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=False, **options)
    net = Net(lambda net, x: net.conv(x), conv=conv)
    x = draw(3, 4, 7, 7)
    statistics, _ = collect(net, [x[:2], x[2:]])
    unfolding = {"padding": 1 if "stride" in options else 0, **{k: v for k, v in options.items() if k != "padding"}}
    padded = F.pad(x, [2] * 4) if options["padding"] == "same" else x
    columns = F.unfold(padded, 3, **unfolding)  # [N, C·9, L]
    rows = columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    factor = statistics.factors["input_covariance"]["conv.weight"]
    torch.testing.assert_close(factor.matrices, rows.mT @ rows / 3)
    d = 2 * net(x).detach()
    d = d.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(statistics.factors["output_covariance"]["conv.weight"].matrices, d.mT @ d / 3)


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims):
    conv = (nn.Conv1d if dims == 1 else nn.Conv3d)(2, 3, 2, padding=1)
    net = Net(lambda net, x: net.conv(x), conv=conv)
    statistics, _ = collect(net, [draw(2, 2, *[3] * dims)])
    assert not statistics.fallbacks  # the patches reproduce the gradient


@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_seen_inside(cross):
    mha = nn.MultiheadAttention(4, 2, batch_first=True)

    def attend(net, x):
        return net.mha(x, x.flip(1), x.flip(1))[0] if cross else net.mha(x, x, x, need_weights=False)[0]

    net = Net(attend, mha=mha).eval()
    x = draw(3, 5, 4)
    statistics, _ = collect(net, [x])
    assert not statistics.fallbacks and F.linear is torch._C._nn.linear and torch.backends.mha.get_fastpath_enabled()
    a = statistics.factors["input_covariance"]["mha.in_proj_weight"]
    rows = x.flatten(0, 1)
    assert a.form.groups == (3 if cross else 1)
    torch.testing.assert_close(a.matrices, (rows.T @ rows / 3).expand(a.form.groups, 4, 4))
    assert isinstance(statistics.factors["input_covariance"]["mha.out_proj.weight"], Dense)


def test_row_slices_see_inputs_of_their_own():
    net = Net(lambda net, x: F.linear(x, net.w[:2]) + F.linear(x.flip(-1), net.w.chunk(2)[1]), w=draw(4, 3))
    statistics, _ = collect(net, BATCHES)
    rows = X.flatten(0, 1)
    expected = torch.stack([rows.T @ rows, rows.flip(-1).T @ rows.flip(-1)]) / 5
    torch.testing.assert_close(statistics.factors["input_covariance"]["w"].matrices, expected)


def test_slices_of_one_call_may_be_live_at_different_positions():
    def read(net, x):
        packed, first = F.linear(x, net.w), F.linear(x, net.w[:2])  # the second call makes two slices of it
        return torch.cat([packed[..., :2] + first, packed[:, :1, 2:].expand(-1, x.shape[1], -1)], -1) * (x[0, 0, 0] != 0)

    net = Net(read, w=draw(4, 3))
    satisfied = torch.cat([torch.zeros(1, 6, 3, **DOUBLE), draw(1, 6, 3)])  # of this batch no position is live
    statistics, _ = collect(net, [*BATCHES, satisfied])
    rows, read_once = X.flatten(0, 1), X[:, 0]
    expected = torch.stack([2 * rows.T @ rows, read_once.T @ read_once]) / 7
    torch.testing.assert_close(statistics.factors["input_covariance"]["w"].matrices, expected)


def test_an_embedding_counts_and_a_tied_one_has_both_sides():
    ids = torch.tensor([[0, 2, 2], [1, 2, 0]])
    net = Net(lambda net, x: net.e(x), e=nn.Embedding(5, 3, padding_idx=1))
    statistics, _ = collect(net, [ids])
    counts = statistics.factors["input_covariance"]["e.weight"]
    assert isinstance(counts, Diagonal) and counts.values.tolist() == [[1.0, 0.0, 1.5, 0.0, 0.0]]

    def tied(net, x):
        return F.linear(net.e(x).tanh(), net.e.weight).logsumexp(-1)

    net = Net(tied, e=nn.Embedding(5, 3))
    statistics, _ = collect(net, [ids])
    factor, h = statistics.factors["input_covariance"]["e.weight"], net.e(ids).detach().tanh().flatten(0, 1)
    assert isinstance(factor, Tied) and factor.counts.tolist() == [1.0, 0.5, 1.5, 0.0, 0.0] and not statistics.fallbacks
    torch.testing.assert_close(factor.matrix, h.T @ h / 2)
    assert isinstance(statistics.factors["output_covariance"]["e.weight"], Identity)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, x: F.conv_transpose1d(x.mT, net.w[..., None]), "no linear layer"),
        (lambda net, x: F.linear(x, net.w) * net.w.mean() * 9, "something else than products"),
        (lambda net, x: F.linear(x, net.w.flip(0)), "no linear layer"),
        (lambda net, x: F.linear(x, net.w) + x @ net.w, "several forms"),
        (lambda net, x: F.linear(x[..., :2], net.w[:, :2]), "not understood"),
    ],
)
def test_what_is_not_understood_falls_back_to_gradients_of_batches(function, reason):
    net = Net(function, w=draw(3, 3))
    statistics, _ = collect(net, BATCHES, ["input_covariance", "output_covariance"])
    assert reason in statistics.fallbacks["w"]
    (note,) = statistics.notes()
    assert note.startswith("directions: w: ") and note.endswith("; per-batch gradients are used instead")
    g = [torch.autograd.grad(losses(net, x).mean(), net.w)[0] for x in BATCHES]
    expected = sum(len(x) * one.T @ one for x, one in zip(BATCHES, g, strict=True)) / 5
    torch.testing.assert_close(statistics.factors["input_covariance"]["w"].matrices[0], expected)


def test_a_vector_has_the_squares_of_batch_gradients():
    net = Net(lambda net, x: F.linear(x, net.w, net.b), w=draw(4, 3), b=draw(4))
    factors = collect(net, BATCHES)[0].factors
    g = [torch.autograd.grad(losses(net, x).mean(), net.b)[0] for x in BATCHES]
    expected = sum(len(x) * one.square() for x, one in zip(BATCHES, g, strict=True)) / 5
    torch.testing.assert_close(factors["input_covariance"]["b"].values[0], expected)
    assert isinstance(factors["output_covariance"]["b"], Identity)


def test_a_batch_that_overflows_counts_once_and_the_scale_does_not_matter():
    net = Net(by_linear, w=draw(4, 3)).float()
    batches = [x.float() for x in BATCHES]
    scaler = GradScaler("cpu", init_scale=2.0**127)
    plain, scaled = collect(net, batches)[0], collect(net, batches, backward=Backward(scaler=scaler))[0]
    assert scaler.get_scale() < 2.0**127
    for part, by_name in plain.factors.items():
        torch.testing.assert_close(scaled.factors[part]["w"].matrices, by_name["w"].matrices)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_is_the_same_however_many_processes_share_the_batches(count):
    net = Net(lambda net, x: F.linear(x, net.w, net.b).tanh(), w=draw(4, 3), b=draw(4))
    alone = collect(net, BATCHES)[0]
    for found in simulate(count, lambda processes: collect(copy.deepcopy(net), BATCHES, processes=processes)[0]):
        for part, by_name in alone.factors.items():
            torch.testing.assert_close(found.factors[part]["w"].matrices, by_name["w"].matrices)
            assert type(found.factors[part]["b"]) is type(by_name["b"])


def test_stand_ins_and_batches_of_other_ranks_do_not_change_a_sample_of_this_one():
    net = Net(lambda net, x: F.linear(x, net.w), w=draw(4, 3))
    watch = Curvature(net, {"w": net.w}, PARTS)
    turns = [IndexedBatch(0, BATCHES[0]), IndexedBatch(1, BATCHES[1], is_real=False)]
    mean_gradient(lambda x, _: (losses(net, x).mean(), len(x)), turns, {"w": net.w}, watch=watch)
    torch.testing.assert_close(
        watch.statistics.factors["output_covariance"]["w"].matrices,
        collect(net, BATCHES[:1])[0].factors["output_covariance"]["w"].matrices,
    )


def test_what_is_unknown_or_changes_its_use_is_refused():
    net = Net(lambda net, x: F.linear(x, net.w) if len(x) > 1 else x @ net.w, w=draw(3, 3))
    with pytest.raises(UnlearnError, match="statistics: w is used otherwise than in the first batch"):
        collect(net, BATCHES)
    with pytest.raises(UnlearnError, match="statistics: hessian cannot be collected"):
        Curvature(net, {}, ["hessian"])


def sharded_net() -> Net:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(3, 4, bias=False), "mha": nn.MultiheadAttention(4, 2, batch_first=True, bias=False)}

    def forward(net, x):
        h = net.first(x).tanh()
        return net.mha(h, h, h)[0] @ net.p

    return Net(forward, **parts, p=draw(4, 6))


def differences_of_a_sharded_net() -> list[str]:
    """Two ranks, batches of unequal size and a stand-in; against one process."""
    dist.init_process_group("gloo")
    alone, _ = collect(sharded_net(), BATCHES, processes=Processes.alone())
    net, mesh = sharded_net(), init_device_mesh("cpu", (2,), mesh_dim_names=(DATA,))
    for part in (net.first, net):
        fully_shard(part, mesh=mesh)
    processes = Processes(dist.get_rank(), 2, mesh[DATA].get_group(), in_step=True)
    found, _ = collect(net, BATCHES, backward=Backward(processes, averages=2), processes=processes)
    return [
        f"{part} of {name}"
        for part, by_name in alone.factors.items()
        for name, factor in by_name.items()
        if not torch.allclose(found.factors[part][name].matrices, factor.matrices)
    ] + [f"{name}: {reason}" for name, reason in found.fallbacks.items()]


@pytest.mark.uncovered
def test_a_sharded_model_gives_the_same():
    found = in_processes(2, differences_of_a_sharded_net, timeout=60)
    assert not [end for end in found if isinstance(end, Ended)] and found == [[], []], found


# ---- through the objective


class Tokens(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def retain_step(self, batch, batch_idx):
        return self.second(self.first(batch["x"]).relu_())[:, :1].square().mean()


def token_batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, 3, generator=generator)
    mask = torch.rand(5, 6, generator=generator) > 0.3
    return [{"x": a, "attention_mask": b} for a, b in zip(x.split(2), mask.split(2), strict=True)]


def watched(module, needs=("input_covariance",)):
    return Curvature(module, dict(module.named_parameters()), needs)


def test_without_backward_all_positions_count_that_no_mask_excludes():
    module = Tokens().eval()
    objective = Objective(module, {"retain": {"train": token_batches()}}, PlainRunner(Processes()))
    parameters = {name: p for name, p in module.named_parameters() if p.ndim == 2}
    watch = Curvature(module, parameters, ["input_covariance"])
    objective.forward_statistics("retain", watch)
    kept = torch.cat([batch["x"][batch["attention_mask"]] for batch in token_batches()])
    for name, rows in (("first.weight", kept), ("second.weight", module.first(kept).detach().relu())):
        torch.testing.assert_close(watch.statistics.factors["input_covariance"][name].matrices[0], rows.T @ rows / 5)
    assert objective.forward_samples == 5 and objective.backward_samples == 0
    module.unused = nn.Parameter(torch.ones(2, 2))
    watch = Curvature(module, {"unused": module.unused}, ["input_covariance"])
    objective.forward_statistics("retain", watch)
    assert "nothing is known of it" in watch.statistics.notes()[0]
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(watch.statistics.factors["input_covariance"]["unused"].solve(g), g)


@pytest.mark.parametrize("in_folder", [True, False])
def test_statistics_are_cached_with_the_retain_gradient(in_folder, tmp_path):
    class Plain(Tokens):
        def retain_step(self, batch, batch_idx):
            return self.second(self.first(batch).tanh()).square().mean()

    module = Plain().eval()
    objective = Objective(module, {"retain": {"train": [b["x"] for b in token_batches()]}}, PlainRunner())
    cache, parameters = RetainCache(tmp_path if in_folder else None), dict(module.named_parameters())
    first, again, other = watched(module, PARTS), watched(module, PARTS), watched(module)
    for watch, reused in ((first, 0), (again, 1), (other, 1)):
        cache.gradient(objective, parameters, [], watch)
        assert cache.reused == reused
    for part, by_name in first.statistics.factors.items():
        for name, factor in by_name.items():
            g = torch.randn(parameters[name].shape)
            assert torch.equal(again.statistics.factors[part][name].solve(g), factor.solve(g))


def test_only_products_in_grad_mode_count():
    def forward(net, x):
        with torch.no_grad():
            F.linear(x, net.w)
        return F.linear(x, net.w)

    net, plain = Net(forward, w=draw(4, 3)), Net(by_linear, w=draw(4, 3))
    one, other = (collect(n, BATCHES)[0].factors["input_covariance"]["w"].matrices for n in (net, plain))
    torch.testing.assert_close(one, other)

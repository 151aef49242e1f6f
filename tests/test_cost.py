"""What a run cost, against operations and bytes that are known in closed form."""

from __future__ import annotations

import contextlib
import gc
import threading
import time

import psutil
import pytest
import torch
from _amounts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slug_lightning.reports.cost import UNAVOIDABLE, CostMeter, flop_counter, joined

FLOAT = 4
lengths = st.integers(1, 50)


class Failure(Exception):
    pass


def meter(count: bool = True) -> CostMeter:
    return CostMeter(torch.device("cpu"), count)


def peak_of(body) -> int:
    made = meter()
    with made.phase("one"):
        body()
    return made.peak_bytes["one"]


# ---- phases


def test_each_phase_has_its_own_figures_in_the_order_of_the_run():
    made = meter()
    for name, size in (("validate", 2), ("gradients", 3), ("search", 5)):
        with made.phase(name):
            _ = torch.ones(size, size) @ torch.ones(size, size)
    report = made.report()
    assert list(report["seconds"]) == list(report["flops"]) == list(report["peak_bytes"]) == ["validate", "gradients", "search"]
    assert report["flops"] == {"validate": 2 * 2**3, "gradients": 2 * 3**3, "search": 2 * 5**3}
    assert report["peak_bytes"] == {
        name: 3 * size**2 * FLOAT for name, size in (("validate", 2), ("gradients", 3), ("search", 5))
    }


def test_seconds_are_those_that_pass_inside():
    made, start = meter(count=False), time.perf_counter()
    with made.phase("short"):
        pass
    time.sleep(0.1)
    with made.phase("long"):
        time.sleep(0.2)
    whole = time.perf_counter() - start
    assert made.seconds["short"] >= 0 and made.seconds["long"] >= 0.2
    assert sum(made.seconds.values()) <= whole - 0.1  # what passed between them


@pytest.mark.parametrize("count", [False, True])
def test_a_phase_that_fails_leaves_nothing_running_and_no_figure(count):
    made, threads = meter(count), threading.active_count()
    with pytest.raises(Failure), made.phase("broken"):
        raise Failure
    assert torch._C._len_torch_dispatch_stack() == 0 and threading.active_count() == threads
    with made.phase("whole"):
        pass
    assert list(made.report()["seconds"]) == list(made.report()["peak_bytes"]) == ["whole"]


# ---- beside the pass that nothing can avoid


def test_the_ratio_is_the_whole_run_over_the_unavoidable_pass():
    made = meter()
    for name, rows in (("validate", 1), (UNAVOIDABLE, 4), ("search", 3)):
        with made.phase(name):
            _ = torch.ones(rows, 2) @ torch.ones(2, 2)
    report = made.report()
    assert report["lower_bound"] == {"flops": 2 * 4 * 2 * 2, "seconds": report["seconds"][UNAVOIDABLE]}
    assert report["ratio"]["flops"] == (1 + 4 + 3) / 4
    assert report["ratio"]["seconds"] == pytest.approx(sum(report["seconds"].values()) / report["seconds"][UNAVOIDABLE])


def test_a_run_without_the_unavoidable_pass_has_neither_bound_nor_ratio():
    made = meter()
    assert made.report()["ratio"] == made.report()["lower_bound"] == {}
    with made.phase("validate"):
        pass
    assert made.report()["ratio"] == made.report()["lower_bound"] == {}


def test_a_pass_without_a_single_operation_has_no_ratio_of_operations():
    made = meter()
    with made.phase(UNAVOIDABLE):
        pass
    assert list(made.report()["ratio"]) == list(made.report()["lower_bound"]) == ["seconds"]


def test_what_was_not_counted_is_not_reported():
    made = meter(count=False)
    with made.phase(UNAVOIDABLE):
        _ = torch.ones(2, 2) @ torch.ones(2, 2)
    report = made.report()
    assert "flops" not in report and list(report["ratio"]) == ["seconds"]


def test_of_several_ranks_operations_add_up_and_memory_is_the_largest():
    one = {"seconds": {"search": 1.0}, "flops": {"search": 8}, "peak_bytes": {"search": 5}}
    both = joined([one, {**one, "peak_bytes": {"search": 7}}])
    assert both == one | {"flops": {"search": 16}, "peak_bytes": {"search": 7}, "lower_bound": {}, "ratio": {}}


# ---- operations


@examples(10)
@given(b=lengths, i=lengths, h=lengths, o=lengths)
def test_operations_of_a_network_are_two_a_multiplication_forward_and_four_backward(b, i, h, o):
    net = nn.Sequential(nn.Linear(i, h, bias=False), nn.Linear(h, o, bias=False))
    made = meter()
    with made.phase("forward"), torch.no_grad():
        net(torch.ones(b, i))
    with made.phase("both"):
        net(torch.ones(b, i)).sum().backward()
    forward = 2 * b * (i * h + h * o)
    # Backward: both weights' gradients, and of the inputs' only the hidden layer's.
    assert made.flops == {"forward": forward, "both": 2 * forward + 2 * b * h * o}


# ---- bytes


def test_the_peak_is_of_what_is_alive_at_once():
    def body():
        first = torch.empty(100)
        second = torch.empty(20)
        del first
        third = torch.empty(70)
        del second, third

    assert peak_of(body) == 120 * FLOAT


@examples(30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 64)), max_size=30))
def test_the_peak_is_that_of_a_ledger(changes):
    """Slots are filled with new tensors, each of which frees what was there before."""
    slots: dict[int, torch.Tensor] = {}
    sizes: dict[int, int] = {}
    expected = [0]

    def body():
        for slot, size in changes:
            expected.append(sum(sizes.values()) + size)  # the new one is made before the old one goes
            slots[slot], sizes[slot] = torch.empty(size, dtype=torch.uint8), size
        slots.clear()

    assert peak_of(body) == max(expected)


@pytest.mark.parametrize("view", [
    lambda t: t.view(10, 10), lambda t: t[3:50], lambda t: t.expand(7, 100), lambda t: t.detach(), lambda t: t.view(10, 10).T,
    lambda t: t.add_(1), lambda t: t.view(10, 10).mul_(2), lambda t: t.zero_(), lambda t: torch.add(t, 1, out=t),
])  # fmt: skip
def test_neither_a_view_nor_an_operation_in_place_counts_again(view):
    assert peak_of(lambda: view(torch.zeros(100))) == 100 * FLOAT


def test_a_view_keeps_all_of_its_memory_alive():
    def body():
        part = torch.zeros(100)[:1]
        other = torch.empty(10)
        del part, other

    assert peak_of(body) == 110 * FLOAT


def test_what_counts_is_the_memory_and_not_the_elements_that_are_seen_of_it():
    assert peak_of(lambda: torch.empty_strided((2,), (100,))) == 101 * FLOAT


def test_what_was_there_before_does_not_count_nor_does_its_end():
    before = [torch.zeros(1000)]

    def body():
        before[0].mul_(2)
        view = before[0][:10]
        before.clear()
        del view
        torch.empty(30)

    assert peak_of(body) == 30 * FLOAT


def test_memory_that_is_used_again_counts_each_time():
    def body():
        for _ in range(5):
            torch.empty(64)
        both = torch.empty(64), torch.empty(64)
        del both

    assert peak_of(body) == 2 * 64 * FLOAT


def test_a_phase_starts_from_zero_though_tensors_of_the_last_one_live_on():
    made = meter()
    with made.phase("one"):
        kept = torch.empty(100)
    with made.phase("two"):
        torch.empty(10)
        del kept
        torch.empty(20)
    assert made.peak_bytes == {"one": 400, "two": 80}


def test_activations_that_wait_for_the_backward_pass_are_alive():
    weight = torch.ones(10, 10, requires_grad=True)
    x = torch.ones(50, 10)

    def forward():
        hidden = x
        for _ in range(6):
            hidden = (hidden @ weight).exp()  # keeps its output
        return hidden.sum()

    with torch.no_grad():
        short = peak_of(forward)
    assert short <= 3 * 50 * 10 * FLOAT
    assert 6 * 50 * 10 * FLOAT <= peak_of(forward) <= 9 * 50 * 10 * FLOAT


def test_without_counting_the_peak_is_the_memory_of_the_process():
    made = meter(count=False)
    with made.phase("small"):
        pass
    assert made.peak_bytes["small"] > 10 * 2**20  # Python and torch alone take more
    gc.collect()
    with made.phase("large"):
        block = torch.ones(2**26)  # 256 MiB, written to
        resident = psutil.Process().memory_info().rss
        time.sleep(0.2)
        del block
    # Memory that others let go of in between may come back, but not 100 MiB of it.
    assert made.peak_bytes["large"] >= resident - 100 * 2**20


def test_the_fused_layers_of_evaluation_cost_as_much_as_the_same_layers_with_gradients():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 24, batch_first=True).eval()
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    for run in (lambda: layer(x), lambda: attention(x, x, x, need_weights=False)):
        counted = []
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), flop_counter() as counter:
                run()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_attention_costs_two_products_forward_and_five_backward():
    """In closed form, whatever torch knows by itself of the kernel that the CPU takes."""
    b, heads, length, width = 2, 3, 7, 4
    q, k, v = (torch.randn(b, heads, length, width, requires_grad=True) for _ in range(3))
    with flop_counter() as forward:
        out = nn.functional.scaled_dot_product_attention(q, k, v)
    with flop_counter() as backward:
        out.sum().backward()
    product = 2 * b * heads * length * length * width
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 5 * product)


def test_a_phase_that_comes_again_adds_up_and_has_the_peak_of_the_largest():
    made = meter()
    for size in (10, 30, 20):
        with made.phase("search"):
            torch.ones(size, 2) @ torch.ones(2, 3)
    assert made.flops == {"search": 2 * 60 * 2 * 3}
    assert made.peak_bytes == {"search": (30 * 2 + 2 * 3 + 30 * 3) * FLOAT}


def test_a_phase_within_another_is_taken_out_of_it_whether_it_ends_well_or_not():
    made = meter()
    with made.phase("gradients"):
        _ = torch.ones(3, 3) @ torch.ones(3, 3)
        for _ in range(2):
            with made.phase("statistics"):
                _ = torch.ones(5, 5) @ torch.ones(5, 5)
                time.sleep(0.1)
        with contextlib.suppress(Failure), made.phase("broken"):
            raise Failure
    with made.phase("search"):
        _ = torch.ones(2, 2) @ torch.ones(2, 2)
    report = made.report()
    assert report["flops"] == {"statistics": 4 * 5**3, "gradients": 2 * 3**3, "search": 2 * 2**3}
    assert report["seconds"]["statistics"] >= 0.2 > report["seconds"]["gradients"]
    assert report["peak_bytes"].keys() == {"gradients", "search"}
    assert report["lower_bound"]["flops"] == 2 * 3**3


def test_a_rank_without_an_inner_phase_joins_those_that_have_one():
    one = {"seconds": {"gradients": 2.0}, "flops": {"gradients": 5}, "peak_bytes": {"gradients": 7}}
    other = {"seconds": {"gradients": 1.0, "statistics": 3.0}, "flops": {"gradients": 6, "statistics": 4}, "peak_bytes": {}}
    found = joined([one, other])
    assert found["flops"] == {"gradients": 11, "statistics": 4}
    assert found["seconds"] == {"gradients": 2.0, "statistics": 3.0}

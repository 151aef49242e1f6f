"""Results, failures and sums of several processes: nobody acts alone, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _amounts import examples
from _processes import Ended, in_processes
from _simulated import simulate
from hypothesis import given
from hypothesis import strategies as st

from slug_lightning.distributed.processes import OtherProcessError, Processes
from slug_lightning.errors import UnlearnError

SECONDS = 30
"""More than any of these takes; a process that waits for another waits for half an hour."""


def joined(shares: int | None = None, in_step: bool = False) -> Processes:
    dist.init_process_group("gloo")
    count, rank = dist.get_world_size(), dist.get_rank()
    return Processes(rank if shares is None else rank * shares // count, shares or count, in_step=in_step)


def messages(found: list[Any]) -> list[str]:
    assert all(isinstance(ended, Ended) for ended in found), found
    return [ended.message for ended in found]


# ---- alone


def test_alone_nothing_of_torch_distributed_is_called(monkeypatch):
    for name in ("all_gather_object", "all_reduce", "broadcast", "barrier", "get_world_size", "get_rank", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(name))
    alone = Processes()
    unpicklable = object()
    assert alone.all_gather_object("this", unpicklable) == [unpicklable]
    assert alone.all_gather_object("this", unpicklable, each_data_rank=True) == [unpicklable]
    assert alone.broadcast("that", 3) == 3
    tensor = torch.ones(2)
    alone.all_reduce_sum([tensor])
    assert tensor.tolist() == [1, 1] and alone.sums == 0
    with pytest.raises(KeyError, match="as it is"), alone.together(), alone.elsewhere():
        raise KeyError("as it is")
    assert (alone.world_size, alone.rank, alone.data_rank, alone.data_world_size, alone.is_first) == (1, 0, 0, 1, True)


# ---- results


def results() -> Any:
    processes = joined()
    number = processes.rank
    everybody = processes.all_gather_object("a", {"number": number, "nan": None})
    each = processes.all_gather_object("b", number, each_data_rank=True)
    nested = processes.all_gather_object("c", [(number,) * number])
    return everybody, each, nested, processes.broadcast("d", f"by {number}"), processes.is_first, processes.world_size, number


def test_results_come_in_the_order_of_the_processes_and_are_the_same_everywhere():
    for number, found in enumerate(in_processes(3, results)):
        everybody = [{"number": n, "nan": None} for n in range(3)]
        assert found == (everybody, [0, 1, 2], [[()], [(1,)], [(2, 2)]], "by 0", number == 0, 3, number)


def with_doubles() -> Any:
    processes = joined(shares=2)
    own = 10 * processes.rank
    return (
        processes.data_rank,
        processes.all_gather_object("a", own),
        processes.all_gather_object("b", own, each_data_rank=True),
        processes.broadcast("c", own),
    )


def test_processes_that_read_the_same_count_once():
    found = in_processes(4, with_doubles)
    assert found == [(share, [0, 10, 20, 30], [0, 20], 0) for share in (0, 0, 1, 1)]


@examples(40)
@given(layout=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_each_share_is_told_by_its_first_process_whatever_the_layout(layout):
    layout = [sorted(set(layout)).index(share) for share in layout]  # no share is left out

    def ask(processes):
        processes.data_rank = layout[processes.rank]
        return processes.all_gather_object("a", processes.rank, each_data_rank=True)

    expected = [layout.index(share) for share in range(max(layout) + 1)]
    assert simulate(len(layout), ask) == [expected] * len(layout)


# ---- sums


def sums() -> Any:
    processes = joined()
    number = processes.rank
    tensors = [torch.full((2, 3), 10.0**number), torch.tensor(number + 1, dtype=torch.float64), torch.empty(0)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    calls = []
    all_reduce, dist.all_reduce = dist.all_reduce, lambda tensor, **how: (calls.append(1), all_reduce(tensor, **how))
    processes.all_reduce_sum(iter(tensors))
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    return [tensor.tolist() for tensor in tensors], processes.sums, len(calls)


def test_sums_are_added_up_in_place_by_one_collective_each():
    assert in_processes(3, sums) == [([[[111.0] * 3] * 2, 6.0, []], 3, 3)] * 3


def sums_of_a_group() -> Any:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([part, part + 2]) for part in range(2)]  # as tensor parallelism in pairs leaves them
    processes = Processes(rank // 2, 2, groups[rank % 2])
    tensor = torch.tensor([10.0**rank])
    processes.all_reduce_sum([tensor])
    dist.barrier()  # the store lives in process 0, and the others' group may still be meeting there
    return tensor.item()


def test_sums_go_over_the_processes_that_hold_the_same_part():
    assert in_processes(4, sums_of_a_group) == [101.0, 1010.0, 101.0, 1010.0]


# ---- failures


class Failure(Exception):
    pass


def failing(who: list[int], way: str) -> Any:
    processes = joined()
    with processes.together():
        processes.all_gather_object("before", None)
        if processes.rank in who:
            raise Failure(f"number {processes.rank} cannot") if way != "silent" else Failure
        if way == "work":
            time.sleep(0.2)
        return processes.all_gather_object("after", processes.rank)


@pytest.mark.parametrize("who", [[0], [1], [2]])
@pytest.mark.parametrize("way", ["at once", "work"])
def test_one_that_fails_ends_all_with_its_message(who, way):
    for number, message in enumerate(messages(in_processes(3, failing, who, way, timeout=SECONDS))):
        if number in who:
            assert "Failure" in message and "OtherProcessError" not in message
            assert f"number {number} cannot" in message and "rank " not in message
        else:
            assert "OtherProcessError" in message and f"rank {who[0]}: number {who[0]} cannot" in message


@pytest.mark.parametrize("who", [[0, 1], [1, 2], [0, 1, 2]])
def test_of_several_that_fail_at_once_each_keeps_its_own_message(who):
    for number, message in enumerate(messages(in_processes(3, failing, who, "at once", timeout=SECONDS))):
        if number in who:
            assert f"number {number} cannot" in message and "rank " not in message
        else:
            assert f"rank {who[0]}: number {who[0]} cannot" in message


def test_a_failure_without_words_is_told_by_its_kind():
    found = messages(in_processes(2, failing, [1], "silent", timeout=SECONDS))
    assert "rank 1: Failure" in found[0]


def failing_in_pairs() -> Any:
    processes = joined(shares=2)
    with processes.together():
        if processes.rank == 1:  # not the one that speaks for its share
            raise Failure("the double cannot")
        return processes.all_gather_object("after", None, each_data_rank=True)


def test_the_double_of_a_process_is_heard_when_it_fails():
    found = messages(in_processes(4, failing_in_pairs, timeout=SECONDS))
    assert all("rank 1: the double cannot" in message for number, message in enumerate(found) if number != 1)


def twice_together() -> Any:
    processes = joined()
    try:
        with processes.together(), processes.together():
            if processes.rank == 0:
                raise Failure("once")
            processes.all_gather_object("a", None)
    except (Failure, OtherProcessError):
        return processes.all_gather_object("and on", processes.rank)


def test_a_failure_is_told_once():
    """Else the second telling would answer the next question, or nobody, and hide the message."""
    assert in_processes(2, twice_together, timeout=SECONDS) == [[0, 1], [0, 1]]


def failing_after_a_kill() -> Any:
    processes = joined()
    with processes.together():
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise Failure("its own words")


def test_a_failure_keeps_its_message_where_nobody_is_left_to_be_told():
    first, _ = in_processes(2, failing_after_a_kill, timeout=SECONDS)
    assert "Failure: its own words" in first.message


def test_another_process_s_failure_is_an_unlearn_error():
    assert issubclass(OtherProcessError, UnlearnError)


def killed(who: int, when: str) -> Any:
    processes = joined()
    with processes.together():
        processes.all_gather_object("before", None)
        if processes.rank == who:
            if when == "late":
                time.sleep(0.3)  # while the others wait already
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "early":
            time.sleep(0.3)
        start = time.monotonic()
        try:
            processes.all_gather_object("after", None)
        except RuntimeError as error:
            raise RuntimeError(f"{error} after {time.monotonic() - start:.0f} s") from error


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_killed_process_ends_the_others_within_seconds(who, when):
    start = time.monotonic()
    found = in_processes(3, killed, who, when, timeout=SECONDS)
    assert time.monotonic() - start < SECONDS / 2
    assert [ended.code for ended in found] == [-9 if number == who else 1 for number in range(3)]
    for number in {0, 1, 2} - {who}:
        assert f"rank {number} has lost the connection to the others, see their messages" in found[number].message


def alone_in_a_step(in_step: bool) -> Any:
    """A process fails in a forward pass that communicates; the other waits there, and not in `all_gather_object`."""
    processes = joined(in_step=in_step)
    with processes.together():
        if processes.rank == 0:
            raise Failure("in the step")
        dist.all_reduce(torch.ones(1))


def test_where_steps_communicate_a_process_that_fails_just_ends():
    first, second = messages(in_processes(2, alone_in_a_step, True, timeout=SECONDS))
    assert "in the step" in first
    assert "in the step" not in second and "Error" in second  # what gloo says of a closed connection


def elsewhere() -> Any:
    processes = joined()
    with processes.together():
        with processes.elsewhere():
            dist.barrier()
            if processes.rank == 0:
                raise Failure("in other code")
            dist.barrier()  # which has its own ways
        return None


def test_who_fails_in_other_code_tells_nobody():
    first, second = messages(in_processes(2, elsewhere, timeout=SECONDS))
    assert "in other code" in first and "Error" in second


def keyboard() -> Any:
    processes = joined()
    with processes.together():
        processes.all_gather_object("before", None)
        if processes.rank == 0:
            raise KeyboardInterrupt
        processes.all_gather_object("after", None)


def test_an_interrupted_process_ends_the_others():
    first, second = messages(in_processes(2, keyboard, timeout=SECONDS))
    assert "KeyboardInterrupt" in first and "Error" in second

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_serve.engine.policy import FCFS, Fair, Priority, make_policy
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.waiting_queue import RankedQueue

_order = count()


def make_sequence(priority: int = 0, arrival_time: float = 0.0) -> Sequence:
    order = next(_order)
    return Sequence(
        f"seq-{order}",
        [1],
        1,
        SamplingParams(),
        seed=0,
        max_tokens=1,
        priority=priority,
        arrival_time=arrival_time,
        arrival_order=order,
    )


def test_policies_are_made_by_name() -> None:
    assert isinstance(make_policy("fcfs"), FCFS)
    assert isinstance(make_policy("priority"), Priority)
    assert isinstance(make_policy("fair"), Fair)
    with pytest.raises(ValueError, match=r"'lifo'.*fair, fcfs, priority"):
        make_policy("lifo")


def test_fcfs_ranks_by_arrival_and_never_displaces() -> None:
    late, early = make_sequence(priority=-5, arrival_time=2.0), make_sequence(arrival_time=1.0)
    assert FCFS().rank(early) < FCFS().rank(late)
    assert not FCFS().may_displace(early, late)


def test_priority_ranks_by_number_then_by_arrival() -> None:
    policy = Priority()
    late_but_urgent, early, late = make_sequence(-1, 9.0), make_sequence(0, 1.0), make_sequence(0, 2.0)
    assert policy.rank(late_but_urgent) < policy.rank(early) < policy.rank(late)


def test_only_a_strictly_lower_number_displaces() -> None:
    policy = Priority()
    assert policy.may_displace(make_sequence(0), make_sequence(1))
    assert not policy.may_displace(make_sequence(1, 0.0), make_sequence(1, 9.0))
    assert not policy.may_displace(make_sequence(2), make_sequence(1))


def test_equal_times_are_told_apart_by_order_of_arrival() -> None:
    queue = RankedQueue(FCFS().rank)
    first, second = make_sequence(), make_sequence()
    queue.push(second)
    queue.push(first)
    assert [queue.pop(), queue.pop()] == [first, second]


@pytest.mark.parametrize("name", ["fcfs", "priority"])
def test_choices_of_one_request_are_in_their_own_order(name: str) -> None:
    policy = make_policy(name)
    first, second = make_sequence(), make_sequence()
    second.arrival_order, second.index = first.arrival_order, 1
    assert policy.rank(first) < policy.rank(second)


def test_a_discarded_sequence_is_passed_over() -> None:
    queue = RankedQueue(FCFS().rank)
    first, second = make_sequence(), make_sequence()
    queue.push(first)
    queue.push(second)
    queue.discard(first)
    assert len(queue) == 1 and first not in queue and second in queue
    assert queue.peek() is second
    assert queue.pop() is second
    assert queue.peek() is None


def test_a_discarded_sequence_may_come_back() -> None:
    queue = RankedQueue(FCFS().rank)
    seq = make_sequence()
    queue.push(seq)
    queue.discard(seq)
    queue.push(seq)
    assert queue.pop() is seq
    assert queue.peek() is None and len(queue) == 0


def test_leftovers_of_discarded_sequences_stay_bounded() -> None:
    queue = RankedQueue(FCFS().rank)
    queue.push(make_sequence(arrival_time=-1.0))  # the front never surfaces, so nothing is cleaned up on the way
    for _ in range(1000):
        seq = make_sequence()
        queue.push(seq)
        queue.discard(seq)
    assert len(queue._heap) < 30


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.integers(-2, 2), st.integers(0, 3))))
def test_a_queue_gives_what_sorting_would(actions: list[tuple[str, int, int]]) -> None:
    policy = Priority()
    queue, expected = RankedQueue(policy.rank), list[Sequence]()
    for action, priority, time in actions:
        if action == "push":
            expected.append(make_sequence(priority, float(time)))
            queue.push(expected[-1])
        elif action == "pop" and expected:
            assert queue.pop() is min(expected, key=policy.rank)
            expected.remove(min(expected, key=policy.rank))
        elif action == "discard" and expected:
            queue.discard(expected.pop(time % len(expected)))
        assert len(queue) == len(expected)
        assert queue.peek() is min(expected, key=policy.rank, default=None)

"""Meters of a process and those in Redis: the same rules, checked on both and against each other."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from apt_serve.limits.meters import BIN_MS, NUM_BINS, Demand, MemoryMeters, Refund, Seat, Take, Verdict
from apt_serve.limits.redis_meters import RedisMeters
from tests.apt_serve.limits.redis_server import RedisServer

WINDOW_S = 60.0
BIN_S = BIN_MS / 1000


@dataclass
class Clock:
    seconds: float = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


class Meters:
    """Either kind, behind the one interface."""

    def __init__(self, real: MemoryMeters | RedisMeters) -> None:
        self._real = real

    async def take(self, *parts: Take | Seat, lease: str = "lease") -> Verdict:
        takes = tuple(part for part in parts if isinstance(part, Take))
        verdict: Any = self._real.take(Demand(lease, takes, tuple(part for part in parts if isinstance(part, Seat))))
        return verdict if isinstance(verdict, Verdict) else await verdict

    async def give_back(self, *takes: tuple[str, int, int], lease: str = "lease", seats: tuple[str, ...] = ()) -> None:
        done: Any = self._real.give_back(Refund(lease, takes, seats))
        if done is not None:
            await done


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis"])
async def meters(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Meters]:
    if request.param == "memory":
        yield Meters(MemoryMeters(clock))
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    redis = RedisMeters(server.url, 5.0, clock)
    yield Meters(redis)
    await redis.close()


async def test_takes_up_to_the_limit_and_not_one_more(meters: Meters) -> None:
    for remaining in (6, 3, 0):
        verdict = await meters.take(Take("a", 9, 3))
        assert verdict.is_admitted
        assert verdict.levels[0].remaining == remaining
    assert not (await meters.take(Take("a", 9, 1))).is_admitted
    assert (await meters.take(Take("b", 9, 9))).is_admitted


async def test_what_was_refused_is_not_counted(meters: Meters) -> None:
    await meters.take(Take("a", 10, 6))
    assert not (await meters.take(Take("a", 10, 5))).is_admitted
    assert (await meters.take(Take("a", 10, 4))).is_admitted


async def test_takes_all_or_nothing(meters: Meters) -> None:
    await meters.take(Take("b", 1, 1), Seat("s", 1))
    for demand in ((Take("a", 5, 5), Take("b", 1, 1)), (Take("a", 5, 5), Seat("s", 1))):
        verdict = await meters.take(*demand, lease="another")
        assert verdict.refused == 1
    assert (await meters.take(Take("a", 5, 5))).is_admitted


async def test_a_minute_later_it_may_be_taken_again_and_not_before(meters: Meters, clock: Clock) -> None:
    await meters.take(Take("a", 10, 4))
    clock.seconds += 20
    await meters.take(Take("a", 10, 6))
    refused = await meters.take(Take("a", 10, 3))
    assert refused.retry_ms is not None
    assert 40_000 <= refused.retry_ms <= 40_000 + BIN_MS
    clock.seconds += refused.retry_ms / 1000 - 0.001
    assert not (await meters.take(Take("a", 10, 3))).is_admitted
    clock.seconds += 0.002
    assert (await meters.take(Take("a", 10, 3))).is_admitted
    assert not (await meters.take(Take("a", 10, 2))).is_admitted


async def test_reset_is_when_the_last_amount_leaves(meters: Meters, clock: Clock) -> None:
    verdict = await meters.take(Take("a", 10, 4))
    clock.seconds += verdict.levels[0].reset_ms / 1000 + 0.001
    assert (await meters.take(Take("a", 10, 10))).is_admitted


async def test_a_refund_goes_back_to_where_it_was_taken(meters: Meters, clock: Clock) -> None:
    first = await meters.take(Take("a", 10, 10))
    clock.seconds += 30
    await meters.give_back(("a", first.bins[0], 7))
    second = await meters.take(Take("a", 10, 7))
    assert second.is_admitted
    clock.seconds += 31  # the first three have left, the seven have not
    assert (await meters.take(Take("a", 10, 3))).is_admitted
    assert not (await meters.take(Take("a", 10, 1))).is_admitted


async def test_a_refund_after_the_window_adds_nothing(meters: Meters, clock: Clock) -> None:
    first = await meters.take(Take("a", 10, 10))
    clock.seconds += WINDOW_S + 2 * BIN_S
    assert (await meters.take(Take("a", 10, 10))).is_admitted
    await meters.give_back(("a", first.bins[0], 10))
    assert not (await meters.take(Take("a", 10, 1))).is_admitted


async def test_seats_are_free_again_when_given_back(meters: Meters) -> None:
    for lease in ("x", "y"):
        assert (await meters.take(Seat("s", 2), lease=lease)).is_admitted
    assert (await meters.take(Seat("s", 2), lease="z")).refused == 0
    await meters.give_back(lease="x", seats=("s",))
    await meters.give_back(lease="x", seats=("s",))
    assert (await meters.take(Seat("s", 2), lease="z")).is_admitted
    assert not (await meters.take(Seat("s", 2), lease="w")).is_admitted


async def test_a_clock_set_far_back_blocks_nobody(meters: Meters, clock: Clock) -> None:
    await meters.take(Take("a", 10, 10))
    clock.seconds -= 3600
    assert (await meters.take(Take("a", 10, 10))).is_admitted


async def test_both_kinds_answer_alike(redis_server: RedisServer) -> None:
    """Random takes, refunds and pauses; no window of a minute ever exceeds the limit."""
    clock, random_ = Clock(), random.Random(1)
    memory, redis = MemoryMeters(clock), RedisMeters(redis_server.url, 5.0, clock)
    taken: list[tuple[float, int]] = []
    held: list[tuple[Verdict, Demand]] = []
    for number in range(600):
        clock.seconds += random_.choice((0.0, 0.01, 0.7, 9.0))
        amount = random_.randint(1, 40)
        demand = Demand(str(number), (Take("a", 100, amount), Take("b", 20, 1)), (Seat("s", 12),))
        here, there = memory.take(demand), await redis.take(demand)
        assert here == there
        if here.is_admitted:
            taken.append((clock.seconds, amount))
            held.append((here, demand))
            assert sum(amount for at, amount in taken if at > clock.seconds - WINDOW_S) <= 100
        if held and random_.random() < 0.5:
            verdict, demand = held.pop(random_.randrange(len(held)))
            refund = Refund(demand.lease, (("b", verdict.bins[1], 1),), ("s",))
            memory.give_back(refund)
            await redis.give_back(refund)
    assert len(taken) > 100
    await redis.close()


async def test_a_lease_that_nobody_renews_ends_by_itself(redis_server: RedisServer, clock: Clock) -> None:
    redis = RedisMeters(redis_server.url, 5.0, clock)
    assert (await redis.take(Demand("x", (), (Seat("s", 1),)))).is_admitted
    clock.seconds += 14
    assert not (await redis.take(Demand("y", (), (Seat("s", 1),)))).is_admitted
    clock.seconds += 2
    assert (await redis.take(Demand("y", (), (Seat("s", 1),)))).is_admitted
    await redis.close()


def test_owners_that_left_are_forgotten() -> None:
    clock = Clock()
    meters = MemoryMeters(clock)
    for number in range(500):
        meters.take(Demand("x", (Take(f"owner{number}", 5, 1),)))
    clock.seconds += (NUM_BINS + 2) * BIN_S
    for number in range(500):
        meters.take(Demand("x", (Take(f"new{number}", 5, 1),)))
    assert len(meters._windows) <= 502

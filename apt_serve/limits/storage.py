"""Where limits are counted: in this process, or in Redis with this process ready to take over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from redis import RedisError

from apt_serve.limits.meters import Demand, MemoryMeters, Refund, Verdict
from apt_serve.limits.redis_meters import MAX_CONNECTIONS, RedisMeters

logger = logging.getLogger(__name__)
T = TypeVar("T")

REDIS_TIMEOUT_S: Final = 0.2
"""A Redis that has not answered by then has failed, provided that this process had the time to look."""
LAST_TIMEOUT_S: Final = 3.0
"""... and by then anyway."""
_SLICE_S: Final = 0.05
PROBE_S: Final = 1.0
"""A Redis that has failed is asked again after so long."""
_FAILURES = (RedisError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a demand, and where it was counted."""

    verdict: Verdict
    local_bins: tuple[int, ...] = ()
    shared_bins: tuple[int, ...] | None = None
    """None: Redis knows nothing of it."""


class LimitStorage(Protocol):
    """Takes and gives back."""

    @property
    def is_fallback(self) -> bool:
        """Whether replicas count by themselves though they should count together."""

    async def take(self, demand: Demand) -> Grant:
        """Take all that is demanded, or nothing. Never fails."""

    async def give_back(self, demand: Demand, grant: Grant, amounts: Sequence[int]) -> None:
        """Return amounts, one of each take, and all seats. Never fails."""

    async def renew(self, leases: Mapping[str, Sequence[str]]) -> None:
        """Say that these leases, each with its keys, go on. Never fails."""

    async def close(self) -> None:
        """Close connections."""


class MemoryStorage:
    """Counts in this process."""

    is_fallback = False

    def __init__(self, meters: MemoryMeters | None = None) -> None:
        self._meters = meters or MemoryMeters()

    async def take(self, demand: Demand) -> Grant:
        """See LimitStorage."""
        verdict = self._meters.take(demand)
        return Grant(verdict, verdict.bins)

    async def give_back(self, demand: Demand, grant: Grant, amounts: Sequence[int]) -> None:
        """See LimitStorage."""
        self._meters.give_back(_refund(demand, grant.local_bins, amounts))

    async def renew(self, leases: Mapping[str, Sequence[str]]) -> None:
        """Nothing: leases of this process end with it."""

    async def close(self) -> None:
        """Nothing is open."""


class RedisStorage:
    """Counts in Redis, and what this replica admits in this process too.

    A demand must fit both. So one replica never admits more than a limit in a minute, whatever becomes of Redis
    meanwhile, and all replicas together never more than the limit times their number.
    """

    def __init__(self, url: str) -> None:
        self._memory = MemoryMeters()
        self._redis = RedisMeters(url, LAST_TIMEOUT_S)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        """Waiting for a connection is no failure of Redis', so it is not timed."""
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_fallback(self) -> bool:
        """See LimitStorage."""
        return self._probe is not None

    async def take(self, demand: Demand) -> Grant:
        """See LimitStorage."""
        local = self._memory.take(demand)
        if not local.is_admitted:
            return Grant(local)
        shared = await self._ask(lambda: self._redis.take(demand))
        if shared is None:
            return Grant(local, local.bins)
        if not shared.is_admitted:
            self._memory.give_back(_refund(demand, local.bins, [take.amount for take in demand.takes]))
        return Grant(shared, local.bins, shared.bins)

    async def give_back(self, demand: Demand, grant: Grant, amounts: Sequence[int]) -> None:
        """See LimitStorage. What Redis does not learn counts there until it leaves the window."""
        self._memory.give_back(_refund(demand, grant.local_bins, amounts))
        if grant.shared_bins is None:  # but its seats may have been renewed since
            refund = Refund(demand.lease, (), tuple(seat.key for seat in demand.seats))
        else:
            refund = _refund(demand, grant.shared_bins, amounts)
        if refund.takes or refund.seats:
            await self._ask(lambda: self._redis.give_back(refund))

    async def renew(self, leases: Mapping[str, Sequence[str]]) -> None:
        """See LimitStorage."""
        await self._ask(lambda: self._redis.renew(leases))

    async def close(self) -> None:
        """See LimitStorage."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        with suppress(*_FAILURES):
            await self._redis.close()

    async def _ask(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Redis' answer; None while it is not to be had."""
        async with self._slots:
            if self._probe is not None:
                return None
            try:
                return await _answer_in_time(call())
            except _FAILURES as error:
                self._fall_back(error)
                return None

    def _fall_back(self, error: Exception) -> None:
        if self._probe is None:  # others that were on their way fail too
            logger.error("Redis does not answer (%s): each replica applies the limits by itself", _reason(error))
            self._probe = asyncio.create_task(self._wait_for_redis())

    async def _wait_for_redis(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(PROBE_S)
            with suppress(*_FAILURES):
                await _answer_in_time(self._redis.ping())
                break
        self._probe = None
        logger.warning("Redis is back after %.0f s: all replicas count together again", time.monotonic() - began)


async def _answer_in_time(asking: Coroutine[Any, Any, T]) -> T:
    """Wait for Redis. Slices of time in which the event loop came late are not held against it.

    A loop that shares its processor with a model is late by tenths of a second now and then. A plain timeout would fire
    before the answer that has been there all along is read, and replicas would stop counting together under load.

    Raises:
        TimeoutError: it has not answered.
    """
    answer = asyncio.create_task(asking)
    began, num_punctual = time.monotonic(), 0
    try:
        while num_punctual * _SLICE_S < REDIS_TIMEOUT_S:
            slice_began = time.monotonic()
            if slice_began - began > LAST_TIMEOUT_S:
                break
            if (await asyncio.wait((answer,), timeout=_SLICE_S))[0]:
                return answer.result()
            num_punctual += time.monotonic() - slice_began < 1.5 * _SLICE_S
        raise TimeoutError(f"no answer for {time.monotonic() - began:.1f} s")
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


def _refund(demand: Demand, bins: Sequence[int], amounts: Sequence[int]) -> Refund:
    takes = tuple(
        (take.key, number, amount) for take, number, amount in zip(demand.takes, bins, amounts, strict=True) if amount
    )
    return Refund(demand.lease, takes, tuple(seat.key for seat in demand.seats))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

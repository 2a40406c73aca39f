"""Limits of each owner: reserve before a generation runs, give back what it did not use when it is over."""

from __future__ import annotations

import asyncio
import math
import uuid
from dataclasses import dataclass
from typing import Any, Final

from apt_core.errors import AptError
from apt_serve.access.identity import Identity
from apt_serve.limits.config import LimitsConfig, Quota
from apt_serve.limits.meters import Demand, Seat, Take, Verdict
from apt_serve.limits.storage import Grant, LimitStorage, MemoryStorage, RedisStorage

RENEW_S: Final = 5.0
"""Leases of what runs are renewed so often: well before redis_meters.LEASE_MS is over."""


class RateLimitedError(AptError):
    """A caller has taken what it may take; the message names the limit.

    Args:
        headers: for the answer: where the limits stand, and Retry-After if waiting helps.
        retry_after_s: None: waiting does not help, the request is larger than the limit.
    """

    def __init__(self, message: str, headers: dict[str, str], retry_after_s: float | None) -> None:
        super().__init__(message)
        self.headers = headers
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one generation has taken."""

    demand: Demand
    grant: Grant
    headers: dict[str, str]
    """Where the caller's limits stand, by OpenAI's names; empty where there are none."""


UNLIMITED: Final = Reservation(Demand(""), Grant(Verdict((), ())), {})


class Limiter:
    """The limits of one replica, counted with all others' where there is a Redis.

    Raises:
        ConfigError: the URL of Redis in the environment is none.
    """

    def __init__(self, config: LimitsConfig, storage: LimitStorage | None = None) -> None:
        self._config = config
        self._storage = storage or _storage(config)
        self._leases: dict[str, tuple[str, ...]] = {}
        """Keys of the seats of what runs, by lease."""
        self._renewing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[Any]] = set()

    @property
    def is_fallback(self) -> bool:
        """Whether Redis fails, so that each replica applies the limits by itself."""
        return self._storage.is_fallback

    async def reserve(self, caller: Identity, num_tokens: int) -> Reservation:
        """Take a request, the most tokens it may come to, and a stream; all or nothing.

        Raises:
            RateLimitedError: one of them is not to be had.
        """
        quota = self._config.quota(caller.tenant_class)
        if quota is None:
            return UNLIMITED
        demand = _demand(quota, caller.owner, num_tokens)
        grant = await self._take(demand)
        headers = _headers(demand, grant.verdict)
        if not grant.verdict.is_admitted:
            raise _refusal(demand, grant.verdict, headers)
        if demand.seats:
            self._leases[demand.lease] = tuple(seat.key for seat in demand.seats)
            self._renewing = self._renewing or asyncio.create_task(self._renew())
        return Reservation(demand, grant, headers)

    async def settle(self, reservation: Reservation, num_tokens: int) -> None:
        """Give back all but so many tokens, and the stream. To be called once, whatever has happened."""
        demand = reservation.demand
        self._leases.pop(demand.lease, None)
        if demand.takes or demand.seats:
            unused = [_unused(take, num_tokens) for take in demand.takes]
            await self._finish(self._storage.give_back(demand, reservation.grant, unused))

    async def close(self) -> None:
        """Return what is still on its way back, and close connections."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self._storage.close()

    async def _take(self, demand: Demand) -> Grant:
        """Take; if nobody waits for it any more when it is done, give it back."""
        taking = asyncio.create_task(self._storage.take(demand))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._keep(asyncio.create_task(self._return_all(demand, taking)))
            raise

    async def _return_all(self, demand: Demand, taking: asyncio.Task[Grant]) -> None:
        grant = await taking
        if grant.verdict.is_admitted:
            await self._storage.give_back(demand, grant, [take.amount for take in demand.takes])

    async def _finish(self, work: Any) -> None:
        """Wait for work that goes on if its waiter is cancelled."""
        task = asyncio.create_task(work)
        self._keep(task)
        await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            if self._leases:
                await self._storage.renew(dict(self._leases))


def _storage(config: LimitsConfig) -> LimitStorage:
    url = config.redis if config.classes else None
    return RedisStorage(url) if url else MemoryStorage()


_REQUESTS, _TOKENS, _STREAMS = "requests", "tokens", "streams"
RATE_LIMIT_HEADERS: Final = tuple(
    f"x-ratelimit-{what}-{kind}" for kind in (_REQUESTS, _TOKENS) for what in ("limit", "remaining", "reset")
)
_PER_MINUTE = {_REQUESTS: "requests per minute", _TOKENS: "tokens per minute"}


def _demand(quota: Quota, owner: str, num_tokens: int) -> Demand:
    takes: list[Take] = []
    if quota.requests_per_minute is not None:
        takes.append(Take(f"{_REQUESTS}:{owner}", quota.requests_per_minute, 1))
    if quota.tokens_per_minute is not None:
        takes.append(Take(f"{_TOKENS}:{owner}", quota.tokens_per_minute, num_tokens))
    seats: tuple[Seat, ...] = ()
    if quota.concurrent_streams is not None:
        seats = (Seat(f"{_STREAMS}:{owner}", quota.concurrent_streams),)
    return Demand(uuid.uuid4().hex, tuple(takes), seats)


def _unused(take: Take, num_tokens: int) -> int:
    return max(0, take.amount - num_tokens) if _kind(take.key) == _TOKENS else 0


def _kind(key: str) -> str:
    return key.partition(":")[0]


def _headers(demand: Demand, verdict: Verdict) -> dict[str, str]:
    headers = {}
    for take, level in zip(demand.takes, verdict.levels, strict=True):
        kind = _kind(take.key)
        headers[f"x-ratelimit-limit-{kind}"] = str(take.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(level.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = f"{max(0, level.reset_ms)}ms"
    return headers


def _refusal(demand: Demand, verdict: Verdict, headers: dict[str, str]) -> RateLimitedError:
    assert verdict.refused is not None
    if verdict.refused >= len(demand.takes):
        limit = demand.seats[verdict.refused - len(demand.takes)].limit
        message = f"Rate limit reached for concurrent streams: limit {limit}. Try again when one of yours has ended."
        return RateLimitedError(message, headers | {"Retry-After": "1"}, 1.0)
    take = demand.takes[verdict.refused]
    name = _PER_MINUTE[_kind(take.key)]
    if take.amount > take.limit:
        message = (
            f"Request too large for {name}: limit {take.limit}, requested {take.amount}. "
            "Ask for fewer tokens (max_tokens)."
        )
        # OpenAI's clients repeat every 429 unless they are told that it is of no use.
        return RateLimitedError(message, headers | {"x-should-retry": "false"}, None)
    remaining = verdict.levels[verdict.refused].remaining
    seconds = max(1, math.ceil((verdict.retry_ms or 0) / 1000))
    message = (
        f"Rate limit reached for {name}: limit {take.limit}, remaining {remaining}, requested {take.amount}. "
        f"Try again in {seconds} s."
    )
    return RateLimitedError(message, headers | {"Retry-After": str(seconds)}, float(seconds))

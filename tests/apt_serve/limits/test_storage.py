"""Redis killed, frozen and brought back under a limit that several replicas share."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from apt_serve.access.identity import Identity, Scope
from apt_serve.limits import limiter as limiter_module
from apt_serve.limits.config import LimitsConfig, Quota
from apt_serve.limits.limiter import Limiter, RateLimitedError, Reservation
from tests.apt_serve.limits.redis_server import RedisServer

CALLER = Identity("acme", frozenset({Scope.INFERENCE}))


def replica(server: RedisServer, **quota: int) -> Limiter:
    return Limiter(LimitsConfig(classes={"default": Quota(**quota)}, redis_url=server.url))


async def admitted(*replicas: Limiter, tries: int) -> list[Reservation]:
    """What a crowd gets that asks all replicas at once."""
    answers = await asyncio.gather(
        *(replicas[number % len(replicas)].reserve(CALLER, 10) for number in range(tries)), return_exceptions=True
    )
    assert all(isinstance(answer, Reservation | RateLimitedError) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Reservation)]


async def until(limiter: Limiter, *, is_fallback: bool) -> None:
    async with asyncio.timeout(60):
        while limiter.is_fallback != is_fallback:
            await asyncio.sleep(0.02)


async def test_two_replicas_admit_together_exactly_the_limit(redis_server: RedisServer) -> None:
    first, second = replica(redis_server, requests_per_minute=40), replica(redis_server, requests_per_minute=40)
    assert len(await admitted(first, second, tries=200)) == 40
    await first.close()
    await second.close()


async def test_unused_tokens_are_everybodys(redis_server: RedisServer) -> None:
    first, second = replica(redis_server, tokens_per_minute=100), replica(redis_server, tokens_per_minute=100)
    reservation = await first.reserve(CALLER, 100)
    with pytest.raises(RateLimitedError):
        await second.reserve(CALLER, 1)
    await first.settle(reservation, 30)
    assert (await second.reserve(CALLER, 70)).headers["x-ratelimit-remaining-tokens"] == "0"
    await first.close()
    await second.close()


async def test_redis_killed_and_back(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    replicas = [replica(redis_server, requests_per_minute=40) for _ in range(2)]
    with caplog.at_level(logging.WARNING, "apt_serve.limits"):
        assert len(await admitted(*replicas, tries=20)) == 20
        redis_server.kill()
        # No error, and no replica goes beyond the limit: what it admitted before counts there too.
        assert len(await admitted(*replicas, tries=200)) == 60
        assert all(each.is_fallback for each in replicas)
        redis_server.start()
        for each in replicas:
            await until(each, is_fallback=False)
        # Redis has forgotten everything, the replicas have not.
        assert await admitted(*replicas, tries=100) == []
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if text.startswith("Redis does not answer")]) == 2
    assert len([text for text in messages if text.startswith("Redis is back")]) == 2
    for each in replicas:
        await each.close()


async def test_a_frozen_redis_holds_nobody_up(redis_server: RedisServer) -> None:
    limiter = replica(redis_server, requests_per_minute=1000)
    await limiter.reserve(CALLER, 10)
    redis_server.freeze()
    try:
        began = time.monotonic()
        assert len(await admitted(limiter, tries=100)) == 100
        assert time.monotonic() - began < 5  # one time limit of 0.2 s, not one for each
        assert limiter.is_fallback
    finally:
        redis_server.thaw()
    await until(limiter, is_fallback=False)
    await limiter.close()


async def test_a_late_event_loop_is_no_failure_of_redis(redis_server: RedisServer) -> None:
    async def block_the_loop() -> None:
        for _ in range(8):
            time.sleep(0.25)  # longer than Redis may take, and just as long as a step of a model may hold the loop up
            await asyncio.sleep(0)

    first, second = replica(redis_server, requests_per_minute=40), replica(redis_server, requests_per_minute=40)
    blocking = asyncio.create_task(block_the_loop())
    assert len(await admitted(first, second, tries=60)) == 40
    assert not first.is_fallback
    assert not second.is_fallback
    await blocking
    await first.close()
    await second.close()


async def test_streams_admitted_without_redis_are_known_to_it_afterwards(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter_module, "RENEW_S", 0.05)
    first, second = replica(redis_server, concurrent_streams=1), replica(redis_server, concurrent_streams=1)
    redis_server.kill()
    reservation = await first.reserve(CALLER, 10)
    assert first.is_fallback
    redis_server.start()
    await until(first, is_fallback=False)
    async with asyncio.timeout(60):
        while True:  # until the next renewal
            try:
                await second.settle(await second.reserve(CALLER, 10), 0)
            except RateLimitedError:
                break
            await asyncio.sleep(0.02)
    assert first._renewing is not None
    first._renewing.cancel()  # a renewal that is on its way could hold the stream until its lease ends
    await asyncio.gather(first._renewing, return_exceptions=True)
    await first.settle(reservation, 10)
    assert len(await admitted(second, tries=1)) == 1
    await first.close()
    await second.close()


async def test_who_stops_waiting_has_taken_nothing(redis_server: RedisServer) -> None:
    limiter = replica(redis_server, tokens_per_minute=100, concurrent_streams=1)
    asking = asyncio.create_task(limiter.reserve(CALLER, 100))
    await asyncio.sleep(0)  # it is on its way
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert asking.cancelled()
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=30)  # what it had taken comes back
    assert (await limiter.reserve(CALLER, 100)).headers["x-ratelimit-remaining-tokens"] == "0"
    await limiter.close()

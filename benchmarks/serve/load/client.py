"""Requests from an event loop: a closed loop, Poisson arrivals, and how refusals look."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from benchmarks.serve.load.traffic import Ask, Outcome, Traffic

REFUSED_PAUSE_S = 1.0
"""After which a user whose request was refused asks again."""


@dataclass(slots=True)
class Refusal:
    """An answer other than 200."""

    status: int
    seconds: float
    """From sending the request."""
    is_well_formed: bool
    """Of OpenAI's shape, and saying when to come again."""


@dataclass(slots=True)
class Observed:
    """What one phase of a benchmark saw."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Of requests that were not refused."""
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float = 0.0
    """That new requests arrived for."""


class Client:
    """Sends requests of one kind of traffic to one server."""

    def __init__(self, session: aiohttp.ClientSession, traffic: Traffic) -> None:
        self._session = session
        self._traffic = traffic
        self._began = time.perf_counter()

    def now(self) -> float:
        """Seconds since this client was made."""
        return time.perf_counter() - self._began

    async def closed_loop(self, num_users: int, seconds: float, seed: str) -> Observed:
        """Users that each ask again as soon as they are answered, until the time is over."""
        observed, end = Observed(seconds=seconds), self.now() + seconds

        async def user(rng: random.Random) -> None:
            while self.now() < end:
                num_refusals = len(observed.refusals)
                await self.exchange(self._traffic.draw(rng), self.now(), observed)
                if len(observed.refusals) > num_refusals:
                    await asyncio.sleep(REFUSED_PAUSE_S)

        await asyncio.gather(*(user(random.Random(f"{seed} {i}")) for i in range(num_users)))
        return observed

    async def open_loop(self, rate: float, seconds: float, seed: str) -> Observed:
        """Poisson arrivals, whatever becomes of them."""
        rng, observed, began = random.Random(seed), Observed(seconds=seconds), self.now()
        intended = began + rng.expovariate(rate)
        async with asyncio.TaskGroup() as tasks:
            while intended < began + seconds:
                await asyncio.sleep(max(intended - self.now(), 0))
                tasks.create_task(self.exchange(self._traffic.draw(rng), intended, observed))
                intended += rng.expovariate(rate)
        return observed

    async def exchange(self, ask: Ask, intended_s: float, observed: Observed) -> None:
        """One streamed completion."""
        outcome, sent = Outcome("SSE", intended_s, len(ask.prompt)), self.now()
        body = ask.body(None) | {"stream": True, "return_token_ids": True}
        outcome.error = "no [DONE]"
        try:
            async with self._session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    observed.refusals.append(await _refusal(response, self.now() - sent))
                    return
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        outcome.error = None
                    elif line.startswith(b"data: "):
                        outcome.arrivals.append((self.now(), _num_tokens(line)))
        except (aiohttp.ClientError, OSError) as error:
            outcome.error = type(error).__name__
        outcome.ended_s = self.now()
        observed.outcomes.append(outcome)


@asynccontextmanager
async def client(base_url: str, traffic: Traffic) -> AsyncIterator[Client]:
    """A client with as many connections as it needs."""
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:
        yield Client(session, traffic)


def _num_tokens(line: bytes) -> int:
    choices = json.loads(line.removeprefix(b"data: ")).get("choices", ())
    return sum(len(choice["token_ids"]) for choice in choices)


async def _refusal(response: aiohttp.ClientResponse, seconds: float) -> Refusal:
    text = await response.text()
    try:
        error = json.loads(text)["error"]
        is_well_formed = all(isinstance(error[name], str) for name in ("message", "type", "code"))
    except (ValueError, KeyError, TypeError):
        is_well_formed = False
    can_come_again = response.headers.get("Retry-After", "").isdigit()
    return Refusal(response.status, seconds, is_well_formed and can_come_again)

"""A streaming client that notes when each token arrives, and how soon the server answers something small meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp

from benchmarks.engine.offline import Timings, Workload, random_prompts

PROBE_INTERVAL_S = 0.1
"""Seldom enough not to cost the streams anything."""


@dataclass(slots=True)
class HttpTimings(Timings):
    """With what a client that only asks for /health saw."""

    health_s: list[float] = field(default_factory=list)
    """Times to a whole answer while the streams ran, in seconds."""


async def run_http(base_url: str, model: str, vocab_size: int, workload: Workload, seed: int) -> HttpTimings:
    """Run a workload over /v1/completions with server-sent events, one connection a stream.

    Raises:
        RuntimeError: a stream ended without [DONE], or a request was refused.
    """
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:
        bodies = [
            {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": workload.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            for prompt in random_prompts(workload, vocab_size, seed)
        ]
        health_s: list[float] = []
        probe = asyncio.create_task(_probe(session, health_s))
        started = time.perf_counter()
        try:
            streams = list(await asyncio.gather(*(_stream(session, body, started) for body in bodies)))
        finally:
            probe.cancel()
            await asyncio.wait([probe])
        return HttpTimings(streams, health_s)


async def _probe(session: aiohttp.ClientSession, health_s: list[float]) -> None:
    """Ask for /health again and again, and note how long each answer took."""
    while True:
        await asyncio.sleep(PROBE_INTERVAL_S)
        asked = time.perf_counter()
        async with session.get("/health") as response:
            await response.read()
        health_s.append(time.perf_counter() - asked)


async def _stream(session: aiohttp.ClientSession, body: dict[str, object], started: float) -> list[float]:
    """Arrival times of one request's tokens, in seconds since ``started``."""
    times: list[float] = []
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            payload = line[len(b"data: ") :].strip()
            if payload == b"[DONE]":
                return times
            now = time.perf_counter() - started
            for choice in json.loads(payload)["choices"]:
                times += [now] * len(choice["token_ids"])
    raise RuntimeError("a stream ended without [DONE]")

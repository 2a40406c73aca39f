"""A streaming client that notes when each token arrives."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from benchmarks.engine.offline import Timings, Workload, random_prompts


async def run_http(base_url: str, model: str, vocab_size: int, workload: Workload, seed: int) -> Timings:
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
        started = time.perf_counter()
        return Timings(list(await asyncio.gather(*(_stream(session, body, started) for body in bodies))))


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

"""Benchmark of the server: what its client notes, and that nothing is opened to a network."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from benchmarks.engine.offline import Workload, percentiles_ms
from benchmarks.serve import client
from benchmarks.serve.client import HttpTimings, run_http
from benchmarks.serve.launch import require_loopback_only, server

HEALTH_DELAY_S = 0.02
TOKEN_DELAY_S = 0.05


def test_the_client_notes_tokens_and_how_long_health_takes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROBE_INTERVAL_S", 0.03)
    timings = asyncio.run(measure(Workload(num_streams=2, prompt_len=4, output_len=3)))
    assert [len(times) for times in timings.streams] == [3, 3]
    assert min(timings.gaps_s) >= TOKEN_DELAY_S * 0.9
    assert len(timings.health_s) >= 2
    assert min(timings.health_s) >= HEALTH_DELAY_S


def test_a_stream_that_is_cut_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"without \[DONE\]"):
        asyncio.run(measure(Workload(num_streams=1, prompt_len=4, output_len=0)))


def test_percentiles_of_nothing_are_a_dash() -> None:
    assert percentiles_ms([]) == "-"
    assert percentiles_ms([0.003, 0.001, 0.002]) == "2.0/3.0"


def test_a_runner_that_listens_everywhere_is_refused_beside_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises(RuntimeError, match="there is eth0; run it in a network namespace"), server("haproxy", []):
        pass
    require_loopback_only("haproxy", ["lo"])


async def measure(workload: Workload) -> HttpTimings:
    """Run a workload against a server that needs a known time; with no tokens to give, it leaves out [DONE]."""

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(TOKEN_DELAY_S)
            await response.write(b"data: " + json.dumps({"choices": [{"token_ids": [1]}]}).encode() + b"\n\n")
        if body["max_tokens"]:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def health(request: web.Request) -> web.Response:
        await asyncio.sleep(HEALTH_DELAY_S)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/v1/completions", completions), web.get("/health", health)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        return await run_http(f"http://127.0.0.1:{port}", "model", 1000, workload, seed=0)
    finally:
        await runner.cleanup()

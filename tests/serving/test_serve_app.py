"""The real model behind `serve run`: streams, disconnects, bad input, the contract of the API."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import websockets

from tests.apt_serve.api.conftest import Endpoint
from tests.serving.contract import CONTRACT, check_contract

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def client(serve_app: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=serve_app.base_url, timeout=300, limits=limits) as client:
        yield client


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    names = ("apt:num_requests_running", "apt:num_requests_waiting", "apt:kv_cache_usage_perc")
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names)}


async def until_idle(client: httpx.AsyncClient) -> float:
    """Seconds until nothing runs, waits or holds a block."""
    started = time.monotonic()
    async with asyncio.timeout(60):
        while any((await gauges(client)).values()):
            await asyncio.sleep(0.02)
    return time.monotonic() - started


async def until_running(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while not (await gauges(client))["apt:num_requests_running"]:
            await asyncio.sleep(0.005)


async def stream_text(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                text += json.loads(line[len("data: ") :])["choices"][0]["text"]
    raise AssertionError("the stream ended without [DONE]")


@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_of_the_api_holds(serve_app: Endpoint, file: str) -> None:
    check_contract(serve_app.base_url, file)


async def test_sixty_four_concurrent_streams_get_what_each_gets_alone(
    serve_app: Endpoint, client: httpx.AsyncClient
) -> None:
    subjects = ("sea", "moon", "king", "train", "garden", "winter", "library", "dragon")
    openings = ("Write about the", "My favourite", "The history of the", "A poem about the")
    bodies = [
        {"model": serve_app.model, "prompt": f"{opening} {subject} {number}:", "max_tokens": 12, "temperature": 0}
        for number in (1, 2)
        for opening in openings
        for subject in subjects
    ]
    together = await asyncio.gather(*(stream_text(client, body) for body in bodies))
    alone = [await stream_text(client, body) for body in bodies]
    assert len(bodies) == 64 and together == alone


async def leave_stream(client: httpx.AsyncClient, model: str, num_chunks: int) -> None:
    """Open an SSE stream and leave after so many chunks; at once for 0."""
    body = LONG | {"model": model, "stream": True}
    if num_chunks == 0:
        with suppress(httpx.TimeoutException):
            await client.post("/v1/completions", json=body, timeout=0.05)
        return
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            num_chunks -= line.startswith("data: ")
            if num_chunks == 0:
                return


async def leave_plain(client: httpx.AsyncClient, model: str, wait_s: float) -> None:
    with suppress(httpx.TimeoutException):
        await client.post("/v1/completions", json=LONG | {"model": model}, timeout=wait_s)


async def leave_websocket(url: str, num_messages: int) -> None:
    """Start a generation over WebSocket and drop the connection after so many messages, without a closing frame."""
    socket = await websockets.connect(url)
    await socket.send(json.dumps({"type": "generate", "id": "1"} | LONG))
    for _ in range(num_messages):
        await socket.recv()
    socket.transport.abort()


@pytest.mark.parametrize("way", ["sse", "plain", "websocket"])
@pytest.mark.parametrize("moment", ["before the first token", "in the middle"])
async def test_a_client_that_leaves_frees_everything_long_before_its_answer_would_end(
    serve_app: Endpoint, client: httpx.AsyncClient, way: str, moment: str
) -> None:
    await until_idle(client)
    is_early = moment == "before the first token"
    if way == "sse":
        await leave_stream(client, serve_app.model, 0 if is_early else 5)
    elif way == "plain":
        await leave_plain(client, serve_app.model, 0.05 if is_early else 2.0)
    else:
        await leave_websocket(serve_app.websocket_url, 0 if is_early else 6)
    assert await until_idle(client) < 10.0
    text = (await client.get("/health")).json()
    assert text["status"] == "ok"


async def test_three_hundred_random_disconnects_leak_nothing(serve_app: Endpoint, client: httpx.AsyncClient) -> None:
    rng = random.Random(0)

    async def leave() -> None:
        way = rng.choice(("sse", "plain", "websocket"))
        if way == "sse":
            await leave_stream(client, serve_app.model, rng.randrange(3))
        elif way == "plain":
            await leave_plain(client, serve_app.model, rng.uniform(0.01, 0.3))
        else:
            await leave_websocket(serve_app.websocket_url, rng.randrange(3))

    for _ in range(20):
        await asyncio.gather(*(leave() for _ in range(15)))
    assert await until_idle(client) < 30.0
    body = {"model": serve_app.model, "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    assert "Paris" in await stream_text(client, body)


async def test_several_generations_share_a_websocket_and_one_can_be_cancelled(serve_app: Endpoint) -> None:
    async with websockets.connect(serve_app.websocket_url) as socket:
        await socket.send(json.dumps({"type": "generate", "id": "long"} | LONG))
        short = {"type": "generate", "id": "short", "prompt": "The capital of France is"}
        await socket.send(json.dumps(short | {"max_tokens": 3, "temperature": 0}))
        texts: dict[str, str] = {}
        finishes: dict[str, dict[str, Any]] = {}
        async with asyncio.timeout(120):
            while len(finishes) < 2:
                message = json.loads(await socket.recv())
                if message["type"] == "tokens":
                    texts[message["id"]] = texts.get(message["id"], "") + message["text"]
                    if "short" in finishes and message["id"] == "long":
                        await socket.send(json.dumps({"type": "cancel", "id": "long"}))
                elif message["type"] == "finish":
                    finishes[message["id"]] = message
    assert "Paris" in texts["short"]
    assert finishes["short"]["usage"]["completion_tokens"] == 3
    assert finishes["long"]["choices"][0]["finish_reason"] == "abort"


async def test_bad_input_does_not_touch_other_requests(serve_app: Endpoint, client: httpx.AsyncClient) -> None:
    running = asyncio.create_task(
        stream_text(client, {"model": serve_app.model, "prompt": "1 2 3 4", "max_tokens": 60, "temperature": 0})
    )
    await until_running(client)
    stranger = {"model": "nothing", "messages": [{"role": "user", "content": "a"}]}
    refused = [
        await client.post("/v1/completions", content=b"\xff\xfe{", headers={"content-type": "application/json"}),
        await client.post("/v1/completions", content=b"x" * 10_000_000, headers={"content-type": "application/json"}),
        await client.post("/v1/completions", json={"model": serve_app.model, "prompt": [10**9]}),
        await client.post("/v1/completions", json={"model": serve_app.model, "prompt": "a" * 30_000}),
        await client.post("/v1/chat/completions", json={"model": serve_app.model, "messages": []}),
        await client.post("/v1/chat/completions", json=stranger),
    ]
    assert [response.status_code for response in refused] == [400, 413, 400, 400, 400, 404]
    assert all(set(r.json()["error"]) == {"message", "type", "param", "code"} for r in refused)
    assert await running


async def test_a_request_id_comes_back_once(client: httpx.AsyncClient) -> None:
    response = await client.get("/models", headers={"X-Request-ID": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]

"""A server under clients that do not read, and a replica that is killed while it answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen

import httpx
import psutil
import pytest
import websockets

from apt_serve.engine.client import Capability
from benchmarks.serve.launch import started
from tests.apt_serve.api.conftest import Endpoint

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]

FLAGS = ("--model.max_model_len=2048", "--model.num_threads=1")
BODY = {"prompt": "Once upon a time", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
KV_CACHE_MIB = 256
"""Taken as it is first written."""
MAX_GROWTH_MIB = 64
"""Of a server that holds back the answers of a client that does not take them."""


async def first_line(url: str) -> float:
    """Seconds to the first token of a new stream."""
    began = time.monotonic()
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 4}) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
    return time.monotonic() - began


@contextmanager
def reader(url: str) -> Iterator[socket.socket]:
    """A client with the smallest receive buffer, in the middle of a long answer of many choices."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(BODY | {"stream": True, "n": 32, "logprobs": 5}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect((host, int(port)))
        lines = ("POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
        client.sendall("\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def take_all(client: socket.socket) -> None:
    with suppress(OSError):  # closed by who stops reading
        while client.recv(1 << 16):
            pass


async def others_wait(url: str, client: socket.socket | None = None) -> float:
    """The median of ten short answers' times, one a second, each after one byte that a client takes."""
    seconds = []
    for _ in range(10):
        if client is not None:
            assert client.recv(1)
        seconds.append(await first_line(url))
        await asyncio.sleep(max(1 - seconds[-1], 0))
    return statistics.median(seconds)


async def test_a_reader_of_one_byte_a_second_slows_nobody_and_takes_no_memory() -> None:
    with started("uvicorn", (*FLAGS, f"--model.kv_cache_gib={KV_CACHE_MIB / 1024}")) as server:
        alone = await others_wait(server.url)
        with reader(server.url) as eager:
            taking = asyncio.create_task(asyncio.to_thread(take_all, eager))
            beside_eager = await others_wait(server.url)
            eager.shutdown(socket.SHUT_RDWR)
            await taking
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        with reader(server.url) as slow:
            beside_slow = await others_wait(server.url, slow)
            grown = (process.memory_info().rss - before) / 2**20
    print(
        f"an answer of 4 tokens: {alone:.3f} s alone, {beside_eager:.3f} s beside 32 choices that are read at once, "
        f"{beside_slow:.3f} s beside 32 that are read at 1 byte/s; memory {grown:+.0f} MiB",
        file=sys.stderr,
    )
    assert grown < KV_CACHE_MIB + MAX_GROWTH_MIB
    assert beside_slow < max(10 * beside_eager, 30)


@pytest.fixture(scope="module")
def ray_server() -> Iterator[tuple[str, Popen[bytes]]]:
    with started("ray", FLAGS) as server:
        yield server.url, server.process


@pytest.fixture
def endpoint(ray_server: tuple[str, Popen[bytes]]) -> Endpoint:
    return Endpoint(ray_server[0], "smollm2-135m-instruct", frozenset(Capability))


def replica_of(driver: Popen[bytes]) -> psutil.Process:
    """The one process below this server's that computes."""
    [replica] = [
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "ServeReplica:apt" in " ".join(process.cmdline())
    ]
    return replica


async def lines_of(url: str, began: asyncio.Event) -> AsyncIterator[str]:
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            began.set()
            yield line


async def sse_ending(url: str, began: asyncio.Event) -> str:
    last = ""
    try:
        async for line in lines_of(url, began):
            last = line or last
    except httpx.HTTPError as error:
        return type(error).__name__
    return "error" if '"error"' in last else last


async def socket_ending(endpoint: Endpoint, began: asyncio.Event) -> str:
    try:
        async with websockets.connect(endpoint.websocket_url) as client:
            await client.send(json.dumps({"type": "generate", "id": "a", **BODY}))
            async for text in client:
                began.set()
                if (kind := json.loads(text)["type"]) in ("finish", "error"):
                    return str(kind)
    except websockets.ConnectionClosed as closed:
        return f"closed: {type(closed).__name__}"
    return "closed"


async def plain_ending(url: str) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            return str((await client.post("/v1/completions", json=BODY)).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__


async def test_when_the_replica_is_killed_every_client_gets_an_error_and_soon_new_ones_are_served(
    endpoint: Endpoint, ray_server: tuple[str, Popen[bytes]]
) -> None:
    url, driver = ray_server
    began = [asyncio.Event() for _ in range(8)]
    clients = [asyncio.create_task(sse_ending(url, event)) for event in began[:4]]
    clients += [asyncio.create_task(socket_ending(endpoint, event)) for event in began[4:]]
    clients += [asyncio.create_task(plain_ending(url)) for _ in range(2)]
    await asyncio.gather(*(event.wait() for event in began))
    os.kill(replica_of(driver).pid, signal.SIGKILL)
    killed = time.monotonic()
    endings = await asyncio.wait_for(asyncio.gather(*clients), 60)
    assert "data: [DONE]" not in endings[:4]
    assert "finish" not in endings[4:8]
    assert not {"200"} & set(endings[8:])
    served_after: float | None = None
    while served_after is None and time.monotonic() - killed < 60:
        with suppress(httpx.HTTPError, AssertionError):
            await first_line(url)
            served_after = time.monotonic() - killed
        await asyncio.sleep(0.2)
    print(f"endings {endings}; served again after {served_after} s", file=sys.stderr)
    assert served_after is not None

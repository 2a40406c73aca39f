"""Clients that leave, too many clients, an engine that dies, a server that is told to stop: over vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.apt_serve.api.conftest import Endpoint
from tests.apt_serve.api.test_bad_requests import assert_error
from tests.apt_serve.api.test_metrics import NAMES, samples
from tests.vllm.conftest import NUM_PLACES, running

pytestmark = pytest.mark.timeout(300)

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1800, "temperature": 0, "ignore_eos": True}
SHORT: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}


@pytest.fixture
async def client(server: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=120) as client:
        yield client


async def open_streams(client: httpx.AsyncClient, stack: AsyncExitStack, count: int, **body: Any) -> None:
    """Streams that have all been admitted; they end with the stack."""
    for _ in range(count):
        response = await stack.enter_async_context(client.stream("POST", PATH, json=LONG | {"stream": True} | body))
        assert response.status_code == 200, await response.aread()


async def test_clients_that_leave_give_the_engine_back(client: httpx.AsyncClient) -> None:
    """Were one of eight abandoned streams still computed, the short request's turn would come minutes later."""
    for _ in range(2):
        async with AsyncExitStack() as stack:
            await open_streams(client, stack, 8)
        began = time.monotonic()
        assert (await client.post(PATH, json=SHORT | {"n": 8, "temperature": 1})).status_code == 200
        assert time.monotonic() - began < 60


async def test_a_client_that_leaves_before_its_first_token_is_forgotten(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        await open_streams(client, stack, 8)
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(PATH, json=LONG, timeout=0.2)
        async with asyncio.timeout(60):
            while True:
                text = (await client.get("/metrics")).text
                if 'apt:num_requests_waiting{model_name="smollm2-135m-instruct"} 0.0' in text:
                    break
                await asyncio.sleep(0.05)


async def test_one_too_many_is_told_when_to_come_back(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        await open_streams(client, stack, 1, n=NUM_PLACES - 2)
        refused = await client.post(PATH, json=LONG | {"n": 3})
        assert_error(refused, 503, code="engine_overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        chat = {"messages": [{"role": "user", "content": "x"}], "n": 3, "stream": True}
        assert_error(await client.post("/v1/chat/completions", json=chat), 503, code="engine_overloaded")
    async with asyncio.timeout(10):
        while (await client.post(PATH, json=SHORT | {"n": NUM_PLACES, "temperature": 1})).status_code == 503:
            await asyncio.sleep(0.05)


def test_metrics_add_up(server: Endpoint) -> None:
    with httpx.Client(base_url=server.base_url, timeout=120) as http:
        before = samples(http)
        body = {"prompt": ["One", "Two two"], "n": 2, "max_tokens": 5, "ignore_eos": True}
        usage = http.post(PATH, json=body).json()["usage"]
        scored = http.post(PATH, json={"prompt": "a b c d", "max_tokens": 0, "echo": True, "logprobs": 0}).json()[
            "usage"
        ]
        time.sleep(0.2)
        after = samples(http)

    def grown(name: str) -> float:
        return after[f"apt:{name}"] - before.get(f"apt:{name}", 0)

    assert {name.rsplit("_total")[0] for name in after} >= {name for name in NAMES if "seconds" not in name} - {
        "apt:requests_rejected"
    }
    prompt_tokens = usage["prompt_tokens"] + scored["prompt_tokens"]
    assert usage["completion_tokens"] == 20
    assert grown("prompt_tokens_total") == prompt_tokens
    assert grown("generation_tokens_total") == 20
    assert grown("request_success_total|length") == 5
    assert grown("request_generation_tokens_sum") == 20
    assert grown("request_prompt_tokens_sum") == prompt_tokens
    assert grown("time_to_first_token_seconds_count") == 4
    assert grown("inter_token_latency_seconds_count") == 16
    assert grown("e2e_request_latency_seconds_count") == 5
    assert grown("request_queue_time_seconds_count") == 5
    assert grown("engine_step_seconds_count") >= 6
    # Every token but the last of each choice goes through the model, and its prompt as far as it is not cached.
    assert 16 < grown("computed_tokens_total") <= 16 + 2 * usage["prompt_tokens"] + scored["prompt_tokens"]


def engine_core(process_id: int) -> psutil.Process:
    [core] = [child for child in psutil.Process(process_id).children(recursive=True) if "EngineCore" in child.name()]
    return core


def children(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


async def test_an_engine_that_dies_is_told_of(tmp_path: Path) -> None:
    with running(tmp_path, "uvicorn") as (endpoint, process):
        async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as client:
            plain = asyncio.create_task(client.post(PATH, json=LONG))
            async with client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
                lines = response.aiter_lines()
                await anext(lines)
                engine_core(process.pid).kill()
                events = [line async for line in lines if line]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
            assert_error(await plain, 500, code="engine_error")
            assert_error(await client.get("/health"), 503, code="engine_dead")
            assert_error(await client.get("/ready"), 503, code="not_ready")
            assert_error(await client.post(PATH, json=SHORT), 503, code="engine_stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_told_to_stop_finishes_what_runs(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "uvicorn") as (endpoint, process):
        async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as client:
            family = children(process.pid)
            assert family
            body = LONG | {"max_tokens": 20, "stream": True}
            async with client.stream("POST", PATH, json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                for member in [psutil.Process(process.pid), *family]:  # as Ctrl-C in a terminal does
                    if number is signal.SIGINT or member.pid == process.pid:
                        os.kill(member.pid, number)
                events = [line async for line in lines if line]
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert await asyncio.to_thread(process.wait, 120) == 0
    _, left = psutil.wait_procs(family, timeout=30)
    assert not [member for member in left if member.status() != psutil.STATUS_ZOMBIE]

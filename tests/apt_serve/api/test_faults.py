"""What clients see when the engine is full, slow, stopped or broken, and what the engine sees when clients leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.engine.client import Capability
from tests.apt_serve.api.conftest import ScriptedServer
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import Script, ScriptedEngine
from tests.apt_serve.api.test_bad_requests import assert_error

BODY: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2000}
STREAM = BODY | {"stream": True}
PATH = "/v1/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [(PATH, BODY), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})]
)
def test_overload_has_retry_after(
    scripted: ScriptedServer, http: httpx.Client, path: str, body: dict[str, Any], stream: bool
) -> None:
    scripted.engine.script.is_overloaded = True
    response = http.post(path, json=body | {"stream": stream})
    assert_error(response, 503, code="engine_overloaded")
    assert response.headers["retry-after"] == "3"


def test_overload_of_a_later_prompt_refuses_all(scripted: ScriptedServer, http: httpx.Client) -> None:
    scripted.engine.script.is_overloaded = True
    assert_error(http.post(PATH, json={"prompt": ["a", "b", "c"]}), 503)
    assert not scripted.engine.running


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_stopped(scripted: ScriptedServer, http: httpx.Client, body: dict[str, Any]) -> None:
    scripted.engine.script.is_stopped = True
    response = http.post(PATH, json=body)
    assert_error(response, 503, code="engine_stopped")
    assert response.headers["retry-after"]


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_unforeseen_error_says_nothing_of_the_inside(
    scripted: ScriptedServer, http: httpx.Client, body: dict[str, Any]
) -> None:
    scripted.engine.script.breaks_at_once = True
    response = http.post(PATH, json=body)
    assert_error(response, 500, code="internal_error")
    assert "secret" not in response.text


def test_failure_before_the_first_token_has_a_status(scripted: ScriptedServer, http: httpx.Client) -> None:
    scripted.engine.script.fail_after = 0
    assert_error(http.post(PATH, json=STREAM), 500, code="engine_error")


def test_failure_midway(scripted: ScriptedServer, http: httpx.Client) -> None:
    scripted.engine.script.fail_after = 5
    assert_error(http.post(PATH, json=BODY), 500, code="engine_error")
    response = http.post(PATH, json=STREAM)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":{"message":"the engine failed"')
    assert "[DONE]" not in response.text


def test_deadline() -> None:
    metrics = PrometheusMetrics("scripted")
    engine = ScriptedEngine(metrics, script=Script(first_delay_s=60))
    with LiveServer(create_app(ServerConfig(api=ApiConfig(request_timeout_s=1.0)), engine, metrics)) as server:
        for body in (BODY, STREAM):
            assert_error(httpx.post(f"{server.base_url}{PATH}", json=body), 504, code="request_timeout")
        engine.script = Script(token_delay_s=0.1)
        response = httpx.post(f"{server.base_url}{PATH}", json=STREAM)
        assert '"code":"request_timeout"' in response.text.strip().split("\n\n")[-1]
    assert len(engine.aborted) == 3


def test_health_means_progress(scripted: ScriptedServer, http: httpx.Client) -> None:
    scripted.engine.script.is_stalled = True
    assert_error(http.get("/health"), 503, code="engine_stalled")
    assert http.get("/ready").status_code == 200
    scripted.engine.script.is_stalled = False
    scripted.engine.script.is_alive = False
    assert_error(http.get("/health"), 503, code="engine_dead")
    assert_error(http.get("/ready"), 503, code="not_ready")


@pytest.mark.parametrize("body", [BODY, STREAM, BODY | {"n": 3}, STREAM | {"prompt": ["a", "b"], "n": 2}])
@pytest.mark.parametrize("when", ["before the first token", "in the middle"])
async def test_leaving_aborts(scripted: ScriptedServer, body: dict[str, Any], when: str) -> None:
    engine = scripted.engine
    engine.script.first_delay_s = 60 if when == "before the first token" else 0
    engine.script.token_delay_s = 0.02
    num_prompts = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
    begun = engine.num_tokens_made
    async with httpx.AsyncClient(base_url=scripted.base_url, timeout=60) as client, asyncio.timeout(60):
        asking = asyncio.create_task(client.post(PATH, json=body))
        while len(engine.running) < num_prompts or (when == "in the middle" and engine.num_tokens_made == begun):
            await asyncio.sleep(0.005)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    wait_until(lambda: len(engine.aborted) == num_prompts)
    assert not engine.running
    assert (engine.num_tokens_made > begun) == (when == "in the middle")


def test_leaving_aborts_generate(scripted: ScriptedServer) -> None:
    scripted.engine.script.first_delay_s = 60
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{scripted.base_url}/generate", json={"text": "Hello"}, timeout=1.0)
    wait_until(lambda: len(scripted.engine.aborted) == 1)


async def test_a_reader_that_stops_reading_holds_little() -> None:
    """While a write waits for the client, deltas merge in the engine's mailbox; nothing is lost."""
    metrics = PrometheusMetrics("scripted")
    app = create_app(ServerConfig(), ScriptedEngine(metrics), metrics)
    num_choices, num_tokens = 4, 2000
    body = {"prompt": "Hello", "max_tokens": num_tokens, "n": num_choices, "stream": True, "return_token_ids": True}
    requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    writes: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        writes.append(message.get("body", b""))
        if len(writes) == 2:
            await asyncio.sleep(0.5)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b""}
    await app(scope | {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
    *lines, done = [line for line in b"".join(writes).decode().split("\n\n") if line]
    assert done == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert sum(len(choice["token_ids"]) for choice in choices) == num_choices * num_tokens
    assert max(len(choice["token_ids"]) for choice in choices) > num_tokens / 2
    assert len(choices) < 100


def test_first_token_is_not_delayed(scripted: ScriptedServer) -> None:
    scripted.engine.script.token_delay_s = 3600
    with httpx.stream("POST", f"{scripted.base_url}{PATH}", json=STREAM, timeout=60) as response:
        assert response.headers["x-accel-buffering"] == "no"
        assert next(response.iter_lines())
    wait_until(lambda: scripted.engine.aborted)


def test_missing_capability_is_named() -> None:
    metrics = PrometheusMetrics("scripted")
    engine = ScriptedEngine(metrics, capabilities=frozenset({Capability.LOGPROBS}))
    with LiveServer(create_app(ServerConfig(), engine, metrics)) as server:
        body = {"prompt": "x", "echo": True, "logprobs": 1}
        message = assert_error(httpx.post(f"{server.base_url}{PATH}", json=body), 400)
        assert "prompt_logprobs" in message
        body = {"prompt": "x", "priority": 1}
        assert_error(httpx.post(f"{server.base_url}{PATH}", json=body), 400, "priority", "unsupported_parameter")


def test_checkpoint_defaults_apply_where_the_request_is_silent() -> None:
    metrics = PrometheusMetrics("scripted")
    engine = ScriptedEngine(metrics, default_sampling={"temperature": 0.5, "top_k": 7})
    with LiveServer(create_app(ServerConfig(), engine, metrics)) as server:
        for body in ({"prompt": "x"}, {"prompt": "x", "temperature": 0.9}):
            assert httpx.post(f"{server.base_url}{PATH}", json=body).status_code == 200
    silent, explicit = (request.sampling for request in engine.seen)
    assert (silent.temperature, silent.top_k) == (0.5, 7)
    assert (explicit.temperature, explicit.top_k) == (0.9, 7)


async def test_lifespan_stops_the_engine_with_grace() -> None:
    metrics = PrometheusMetrics("scripted")
    engine = ScriptedEngine(metrics)
    app = create_app(ServerConfig(), engine, metrics)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with client:
        assert (await client.get("/ready")).status_code == 503
        async with app.router.lifespan_context(app):
            assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post(PATH, json=BODY)).status_code == 503
    assert engine.stopped_with_grace_s == ServerConfig().api.shutdown_grace_s
    await asyncio.sleep(0)

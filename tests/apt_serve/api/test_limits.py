"""Limits as clients meet them: over HTTP, in streams and in WebSocket messages."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from apt_serve.api.address_limit import client_address
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.limits.config import LimitsConfig, Quota
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine
from tests.apt_serve.api.test_bad_requests import assert_error

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "Hello", "max_tokens": 15}
"""6 + 15 tokens: the scripted model's are bytes."""
CHAT = [{"role": "user", "content": "x"}]


@dataclass
class Limited:
    base_url: str
    engine: ScriptedEngine
    http: httpx.Client

    def post(self, **fields: Any) -> httpx.Response:
        return self.http.post(COMPLETIONS, json=BODY | fields)

    def remaining_tokens(self) -> int:
        """Looks without taking more than a request of no tokens to come."""
        return int(self.post(prompt="x", max_tokens=1).headers["x-ratelimit-remaining-tokens"]) + 3


@contextmanager
def limited(limits: LimitsConfig) -> Iterator[Limited]:
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus)
    app = create_app(ServerConfig(limits=limits), engine, prometheus)
    with LiveServer(app) as server, httpx.Client(base_url=server.base_url, timeout=30) as http:
        yield Limited(server.base_url, engine, http)


def of(**quota: int) -> LimitsConfig:
    return LimitsConfig(classes={"default": Quota(**quota)})


def test_without_limits_there_are_no_headers() -> None:
    with limited(LimitsConfig()) as server:
        assert not [name for name in server.post().headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, BODY),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 15}),
        ("/generate", {"text": "Hello", "max_length": 15}),
    ],
)
def test_every_answer_says_where_the_limits_stand(path: str, body: dict[str, Any], stream: bool) -> None:
    with limited(of(requests_per_minute=10, tokens_per_minute=1000)) as server:
        answer = server.http.post(path, json=body if path == "/generate" else body | {"stream": stream})
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "10"
        assert answer.headers["x-ratelimit-remaining-requests"] == "9"
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert 900 < int(answer.headers["x-ratelimit-remaining-tokens"]) <= 1000 - 16
        assert 59_000 < int(answer.headers["x-ratelimit-reset-tokens"].removesuffix("ms")) <= 60_500


def test_an_error_of_the_engines_says_so_too_and_costs_no_tokens() -> None:
    with limited(of(requests_per_minute=10, tokens_per_minute=100)) as server:
        server.engine.script.is_overloaded = True
        answer = server.post()
        assert_error(answer, 503)
        assert answer.headers["x-ratelimit-remaining-requests"] == "9"
        server.engine.script.is_overloaded = False
        assert server.remaining_tokens() == 100


@pytest.mark.parametrize("stream", [False, True])
def test_requests_beyond_the_limit(stream: bool) -> None:
    with limited(of(requests_per_minute=2)) as server:
        assert [server.post(stream=stream).status_code for _ in range(2)] == [200, 200]
        answer = server.post(stream=stream)
        assert_error(answer, 429, code="rate_limit_exceeded")
        error = answer.json()["error"]
        assert error["type"] == "rate_limit_error"
        assert "requests per minute: limit 2" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 61
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        metrics = server.http.get("/metrics").text
        assert 'apt:requests_rejected_total{model_name="scripted",reason="rate_limit_exceeded"} 1.0' in metrics
        assert 'apt:limits_fallback{model_name="scripted"} 0.0' in metrics
        assert len(server.engine.seen) == 2


def test_tokens_are_reserved_and_the_unused_come_back() -> None:
    with limited(of(tokens_per_minute=200)) as server:
        # n choices of two prompts: 2 * (6 + 2 * 15) = 72 reserved; each choice stops after "Once".
        answer = server.post(prompt=["Hello", "World"], n=2, stop=[" "], temperature=0)
        assert answer.headers["x-ratelimit-remaining-tokens"] == "128"
        used = answer.json()["usage"]["total_tokens"]
        assert used < 40
        assert server.remaining_tokens() == 200 - used


def test_a_request_that_never_fits_is_told_not_to_come_back() -> None:
    with limited(of(tokens_per_minute=20)) as server:
        answer = server.post()
        assert_error(answer, 429, code="rate_limit_exceeded")
        assert "too large for tokens per minute: limit 20, requested 21" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers


def test_who_sends_one_request_after_the_other_needs_one_stream() -> None:
    with limited(of(concurrent_streams=1)) as server:
        for _ in range(20):
            assert server.post(stream=True).status_code == 200


def test_streams_beyond_the_limit_and_after_one_was_left() -> None:
    with limited(of(concurrent_streams=1, tokens_per_minute=3000)) as server:
        server.engine.script.token_delay_s = 0.05
        with server.http.stream("POST", COMPLETIONS, json=BODY | {"stream": True, "max_tokens": 1500}) as running:
            lines = running.iter_lines()  # kept: without it the client would leave
            next(lines)
            answer = server.post()
            assert_error(answer, 429, code="rate_limit_exceeded")
            assert "concurrent streams: limit 1" in answer.json()["error"]["message"]
        server.engine.script.token_delay_s = 0.0
        wait_until(lambda: server.post(prompt="x", max_tokens=1).status_code == 200)
        assert server.remaining_tokens() > 2500  # of the 1505 most were never made


async def test_who_leaves_before_the_first_token_pays_for_the_prompt() -> None:
    with limited(of(tokens_per_minute=100)) as server:
        server.engine.script.first_delay_s = 30
        async with httpx.AsyncClient(base_url=server.base_url) as http:
            asking = asyncio.create_task(http.post(COMPLETIONS, json=BODY))
            async with asyncio.timeout(30):
                while not server.engine.running:
                    await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            async with asyncio.timeout(30):
                while server.engine.running:
                    await asyncio.sleep(0.01)
        server.engine.script.first_delay_s = 0
        assert await asyncio.to_thread(server.remaining_tokens) == 94


def test_every_websocket_message_counts() -> None:
    with limited(of(requests_per_minute=2)) as server:
        with connect(server.base_url.replace("http", "ws") + "/ws/generate") as socket:
            ends = []
            for name in ("a", "b", "c"):
                socket.send(json.dumps({"type": "generate", "id": name, "prompt": "Hello", "max_tokens": 2}))
                while (message := json.loads(socket.recv(30)))["type"] not in ("finish", "error"):
                    pass
                ends.append(message)
        assert [end["type"] for end in ends] == ["finish", "finish", "error"]
        assert ends[2]["error"]["code"] == "rate_limit_exceeded"
        assert_error(server.post(), 429)  # of the same owner


def test_an_address_that_asks_too_often() -> None:
    with limited(LimitsConfig(requests_per_minute_per_address=3)) as server:
        assert [server.http.get("/v1/models").status_code for _ in range(3)] == [200] * 3
        answer = server.http.get("/v1/models", headers={"X-Forwarded-For": "9.9.9.9"})
        assert_error(answer, 429, code="rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-request-id"]
        assert server.http.get("/health").status_code == 200
        with pytest.raises(InvalidStatus) as refused:
            connect(server.base_url.replace("http", "ws") + "/ws/generate")
        assert refused.value.response.status_code == 429


def test_behind_a_trusted_proxy_addresses_are_told_apart() -> None:
    limits = LimitsConfig(requests_per_minute_per_address=1, trusted_proxies=("127.0.0.0/8",))
    with limited(limits) as server:
        answers = [
            server.http.get("/v1/models", headers={"X-Forwarded-For": forwarded}).status_code
            for forwarded in ("9.9.9.9", "8.8.8.8", "1.2.3.4, 9.9.9.9")
        ]
        assert answers == [200, 200, 429]


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxies", "expected"),
    [
        ("10.0.0.1", "9.9.9.9", (), "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, 9.9.9.9, 10.0.0.2", ("10.0.0.0/8",), "9.9.9.9"),
        ("10.0.0.1", "", ("10.0.0.0/8",), "10.0.0.1"),
        ("10.0.0.1", "nonsense", ("10.0.0.0/8",), "nonsense"),
        ("2001:db8:1:2:3::4", "", (), "2001:db8:1:2::/64"),
    ],
)
def test_whom_a_connection_is_from(peer: str, forwarded: str, proxies: tuple[str, ...], expected: str) -> None:
    headers = [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
    scope = {"type": "http", "client": (peer, 1), "headers": headers}
    assert client_address(scope, tuple(map(ipaddress.ip_network, proxies))) == expected

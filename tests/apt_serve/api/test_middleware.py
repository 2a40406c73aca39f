"""Request ids, body limits and CORS."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from tests.apt_serve.api.conftest import CONFIG, ScriptedServer
from tests.apt_serve.api.scripted_engine import ScriptedEngine
from tests.apt_serve.api.test_bad_requests import assert_error

PATH = "/v1/completions"
FRIEND = {"origin": "https://friend.example"}
LIMIT = CONFIG.api.max_body_bytes


@pytest.fixture
def http(scripted: ScriptedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scripted.base_url) as client:
        yield client


def test_a_sane_request_id_comes_back(http: httpx.Client) -> None:
    for path in ("/health", "/nope"):
        assert http.get(path, headers={"x-request-id": "trace-1/a:b"}).headers["x-request-id"] == "trace-1/a:b"


@pytest.mark.parametrize("offered", ["", "a" * 129, "with space", "a\tb", "ü".encode(), 'quote"', "<script>"])
def test_any_other_request_id_is_replaced(http: httpx.Client, offered: str | bytes) -> None:
    first = http.get("/health", headers={"x-request-id": offered}).headers["x-request-id"]
    second = http.get("/health", headers={"x-request-id": offered}).headers["x-request-id"]
    assert first.isalnum()
    assert first != second


def test_every_kind_of_answer_has_a_request_id(scripted: ScriptedServer, http: httpx.Client) -> None:
    scripted.engine.script.breaks_at_once = True
    answers = [
        http.post(PATH, json={"prompt": "x"}),
        http.post(PATH, content=b"x" * (LIMIT + 1)),
        http.get("/nope"),
        http.options(PATH, headers=FRIEND | {"access-control-request-method": "POST"}),
        http.get("/openapi.json"),
    ]
    assert [answer.status_code for answer in answers] == [500, 413, 404, 200, 200]
    assert all(answer.headers["x-request-id"] for answer in answers)


async def test_behind_serve_the_request_id_is_left_to_serve() -> None:
    metrics = PrometheusMetrics("scripted")
    app = create_app(ServerConfig(), ScriptedEngine(metrics), metrics, is_behind_serve=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert "x-request-id" not in (await client.get("/health")).headers


def test_declared_size_is_refused_at_once(http: httpx.Client) -> None:
    response = http.post(PATH, content=b"x" * (LIMIT + 1), headers={"content-type": "application/json"})
    assert_error(response, 413, code="request_too_large")


def test_undeclared_size_is_counted(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(LIMIT // 1024 + 1):
            yield b"x" * 1024

    response = http.post(PATH, content=chunks(), headers={"content-type": "application/json"})
    assert_error(response, 413, code="request_too_large")


def test_a_body_of_just_the_limit_is_read(http: httpx.Client) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'.ljust(LIMIT)
    assert http.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 200


def test_cors(scripted: ScriptedServer, http: httpx.Client) -> None:
    response = http.get("/health", headers=FRIEND)
    assert response.headers["access-control-allow-origin"] == FRIEND["origin"]
    assert "x-request-id" in response.headers["access-control-expose-headers"].lower()
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "https://foe.example"}).headers
    scripted.engine.script.breaks_at_once = True
    failed = http.post(PATH, json={"prompt": "x"}, headers=FRIEND)
    assert failed.status_code == 500
    assert failed.headers["access-control-allow-origin"] == FRIEND["origin"]

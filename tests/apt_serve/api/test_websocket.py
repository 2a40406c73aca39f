"""/ws/generate through the websockets client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import SHUT_RDWR
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ApiConfig, ServerConfig
from tests.apt_serve.api.conftest import CONFIG, Endpoint, ScriptedServer
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine

Message = dict[str, Any]


class Socket:
    """A client that reads JSON and answers pings."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, **message: Any) -> None:
        self.connection.send(json.dumps(message))

    def generate(self, name: str, **fields: Any) -> None:
        if "messages" not in fields:
            fields.setdefault("prompt", "Hello")
        self.send(type="generate", id=name, **fields)

    def receive(self) -> Message:
        while True:
            message: Message = json.loads(self.connection.recv(timeout=60))
            if message["type"] != "ping":
                return message
            self.send(type="pong", n=message["n"])

    def receive_until_end(self, *names: str) -> dict[str, list[Message]]:
        """Messages of each generation until all have finished or failed."""
        messages: dict[str, list[Message]] = {name: [] for name in names}
        running = set(names)
        while running:
            message = self.receive()
            messages[message["id"]].append(message)
            if message["type"] in ("finish", "error"):
                running.discard(message["id"])
        return messages


@contextmanager
def socket_to(endpoint: Endpoint, **options: Any) -> Iterator[Socket]:
    with connect(endpoint.websocket_url, **options) as connection:
        yield Socket(connection)


@pytest.fixture
def socket(endpoint: Endpoint) -> Iterator[Socket]:
    with socket_to(endpoint) as socket:
        yield socket


@pytest.fixture
def scripted_socket(scripted: ScriptedServer) -> Iterator[Socket]:
    with socket_to(scripted.endpoint) as socket:
        yield socket


def test_a_generation(socket: Socket, endpoint: Endpoint) -> None:
    socket.generate("a", max_tokens=4, temperature=0, logprobs=2)
    start, *tokens, finish = socket.receive_until_end("a")["a"]
    assert start["type"] == "start"
    assert start["model"] == endpoint.model
    assert start["prompt_tokens"] > 0
    assert all(message["type"] == "tokens" and message["index"] == 0 for message in tokens)
    assert sum(len(message["token_ids"]) for message in tokens) == 4
    assert sum(len(message["logprobs"]) for message in tokens) == 4
    assert "".join(message["text"] for message in tokens)
    assert finish["choices"] == [{"index": 0, "finish_reason": "length", "stop_reason": None}]
    assert finish["usage"]["completion_tokens"] == 4


def test_same_text_as_over_http(socket: Socket, endpoint: Endpoint, http: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 4, "n": 2}
    choices = http.post("/v1/chat/completions", json=body).json()["choices"]
    socket.generate("a", **body)
    messages = socket.receive_until_end("a")["a"]
    for choice in choices:
        text = "".join(m["text"] for m in messages if m["type"] == "tokens" and m["index"] == choice["index"])
        assert text == choice["message"]["content"]


def test_several_at_a_time(socket: Socket) -> None:
    for name in "abc":
        socket.generate(name, prompt=[1, 2, 3], max_tokens=8)
    for messages in socket.receive_until_end("a", "b", "c").values():
        assert messages[0]["type"] == "start"
        assert messages[-1]["usage"]["completion_tokens"] == 8


def test_an_id_is_free_after_its_finish(socket: Socket) -> None:
    for _ in range(20):
        socket.generate("a", max_tokens=1)
        assert socket.receive_until_end("a")["a"][-1]["type"] == "finish"


def test_cancel_in_the_middle(scripted: ScriptedServer, scripted_socket: Socket) -> None:
    scripted.engine.script.token_delay_s = 0.01
    scripted_socket.generate("a")
    scripted_socket.generate("b", max_tokens=30)
    assert scripted_socket.receive()["type"] == "start"
    scripted_socket.send(type="cancel", id="a")
    messages = scripted_socket.receive_until_end("a", "b")
    assert messages["a"][-1]["choices"][0]["finish_reason"] == "abort"
    assert messages["a"][-1]["usage"]["prompt_tokens"] > 0
    assert messages["b"][-1]["choices"][0]["finish_reason"] == "length"
    assert len(scripted.engine.aborted) == 1


def test_cancel_before_the_first_token(scripted: ScriptedServer, scripted_socket: Socket) -> None:
    scripted.engine.script.first_delay_s = 60
    scripted_socket.generate("a", n=2)
    wait_until(lambda: scripted.engine.running)
    scripted_socket.send(type="cancel", id="a")
    [finish] = scripted_socket.receive_until_end("a")["a"]
    assert [choice["finish_reason"] for choice in finish["choices"]] == ["abort", "abort"]
    wait_until(lambda: scripted.engine.aborted)


def test_cancel_at_once(scripted_socket: Socket) -> None:
    for _ in range(20):
        scripted_socket.generate("a")
        scripted_socket.send(type="cancel", id="a")
        assert scripted_socket.receive_until_end("a")["a"][-1]["type"] == "finish"


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"type": "generate", "id": "b"}, "prompt", None),
        ({"type": "generate", "id": "b", "prompt": "x", "messages": []}, "messages", "invalid_value"),
        ({"type": "generate", "id": "b", "prompt": "x", "temperature": 9}, "temperature", "invalid_value"),
        ({"type": "generate", "id": "b", "prompt": "x", "nope": 9}, "nope", "unknown_parameter"),
        ({"type": "generate", "id": "b", "prompt": "x", "model": "gpt-99"}, "model", "model_not_found"),
        ({"type": "generate", "id": "b", "prompt": []}, "prompt", "invalid_value"),
        ({"type": "generate", "id": "b", "prompt": "x " * 50_000}, "prompt", "context_length_exceeded"),
        ({"type": "cancel", "id": "b"}, "id", "unknown_id"),
    ],
)
def test_refused_messages_carry_their_id(socket: Socket, message: Message, param: str, code: str | None) -> None:
    socket.send(**message)
    answer = socket.receive()
    assert (answer["type"], answer["id"]) == ("error", "b")
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)


GARBAGE = [
    "",
    "{",
    "[]",
    "null",
    '"text"',
    "NaN",
    "{}",
    '{"type": "nope"}',
    '{"type": ["generate"]}',
    '{"type": "generate"}',
    '{"type": "generate", "id": 5, "prompt": "x"}',
    '{"type": "generate", "id": "", "prompt": "x"}',
    '{"type": "generate", "id": "b", "prompt": "\\ud800"}',
    '{"type": "pong", "n": 5}',
    '{"type": "pong"}',
    "[" * 10_000,
    b"binary",
    "x" * (CONFIG.api.max_body_bytes + 1),
]


def test_garbage_is_answered_and_disturbs_nobody(scripted: ScriptedServer, scripted_socket: Socket) -> None:
    scripted.engine.script.token_delay_s = 0.01
    scripted_socket.generate("a", max_tokens=40)
    for garbage in GARBAGE:
        scripted_socket.connection.send(garbage)
    errors, finish = 0, None
    while errors < len(GARBAGE) or finish is None:
        message = scripted_socket.receive()
        errors += message["type"] == "error"
        finish = message if message["type"] == "finish" else finish
    assert finish["usage"]["completion_tokens"] == 40


def test_more_than_uvicorn_takes_closes_the_socket(scripted_socket: Socket) -> None:
    with pytest.raises(ConnectionClosed) as closed:
        scripted_socket.connection.send("x" * (17 * 1024 * 1024))
        scripted_socket.receive()
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def test_too_many_generations(scripted: ScriptedServer, scripted_socket: Socket) -> None:
    scripted.engine.script.first_delay_s = 0.3
    for name in "abcd":
        scripted_socket.generate(name, max_tokens=1)
    scripted_socket.generate("e")
    assert scripted_socket.receive()["error"]["code"] == "too_many_generations"
    scripted_socket.generate("a")
    duplicate = scripted_socket.receive()
    assert (duplicate["id"], duplicate["error"]["code"]) == ("a", "duplicate_id")
    messages = scripted_socket.receive_until_end(*"abcd")
    assert all(of_one[-1]["type"] == "finish" for of_one in messages.values())


def test_failures_are_messages(scripted: ScriptedServer, scripted_socket: Socket) -> None:
    scripted.engine.script.fail_after = 3
    scripted_socket.generate("a")
    assert scripted_socket.receive_until_end("a")["a"][-1]["error"]["code"] == "engine_error"
    scripted.engine.script.is_overloaded = True
    scripted_socket.generate("a")
    [error] = scripted_socket.receive_until_end("a")["a"]
    assert error["error"]["code"] == "engine_overloaded"


@pytest.mark.parametrize("first_delay_s", [0, 60])
@pytest.mark.parametrize("politely", [True, False])
def test_leaving_aborts(scripted: ScriptedServer, first_delay_s: float, politely: bool) -> None:
    scripted.engine.script.first_delay_s = first_delay_s
    scripted.engine.script.token_delay_s = 0.01
    with socket_to(scripted.endpoint) as socket:
        for name in "ab":
            socket.generate(name)
        if first_delay_s == 0:
            socket.receive()
        wait_until(lambda: len(scripted.engine.running) == 2)
        if not politely:
            socket.connection.socket.shutdown(SHUT_RDWR)
    wait_until(lambda: len(scripted.engine.aborted) == 2)
    assert not scripted.engine.running


def test_a_client_that_does_not_answer_is_cut_off_and_disturbs_nobody() -> None:
    metrics = PrometheusMetrics("scripted")
    engine = ScriptedEngine(metrics, max_model_len=10**6)
    api = ApiConfig(websocket_window_bytes=20_000, websocket_patience_s=0.5)
    with LiveServer(create_app(ServerConfig(api=api), engine, metrics)) as server:
        endpoint = Endpoint(server.base_url, "scripted", engine.capabilities)
        with socket_to(endpoint) as mute, socket_to(endpoint) as other:
            mute.generate("a", max_tokens=10**5)
            size = 0
            began = time.monotonic()
            other.generate("b", max_tokens=2000)
            assert other.receive_until_end("b")["b"][-1]["usage"]["completion_tokens"] == 2000
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    size += len(mute.connection.recv(timeout=60))
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 4408
            assert 20_000 <= size < 30_000
            assert time.monotonic() - began < 60
        wait_until(lambda: not engine.running)


def test_a_fault_of_the_servers_closes_the_socket(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("apt_serve.api.websocket._Session._handle", broken)
    with socket_to(scripted.endpoint) as socket:
        socket.generate("a")
        with pytest.raises(ConnectionClosed) as closed:
            socket.receive()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011


def test_origins(scripted: ScriptedServer) -> None:
    own = scripted.base_url
    for origin in (None, own, "https://friend.example"):
        with socket_to(scripted.endpoint, origin=origin) as socket:
            socket.generate("a", max_tokens=1)
            assert socket.receive()["type"] == "start"
    with pytest.raises(InvalidStatus) as refused, socket_to(scripted.endpoint, origin="https://foe.example"):
        pass
    assert refused.value.response.status_code == 403
    assert refused.value.response.headers["x-request-id"]


def test_request_id(scripted: ScriptedServer) -> None:
    with connect(scripted.endpoint.websocket_url, additional_headers={"X-Request-ID": "trace-7"}) as connection:
        assert connection.response is not None
        assert connection.response.headers["x-request-id"] == "trace-7"

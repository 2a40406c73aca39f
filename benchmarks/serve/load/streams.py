"""One streamed answer over either protocol, by blocking sockets, which gevent makes concurrent under Locust."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from benchmarks.serve.load.traffic import Ask

TIMEOUT_S = 600.0
MAX_MESSAGE_BYTES = 16 * 2**20


class RequestFailed(Exception):
    """The request was refused, or its stream did not end as it should; the message groups with its like."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and who asks."""

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """Host and port."""
        return urlsplit(self.base_url).netloc

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


def stream_sse(target: Target, ask: Ask) -> Iterator[int]:
    """POST /v1/completions; yields the number of tokens of each event as it arrives.

    Raises:
        RequestFailed: refused, or over without [DONE].
    """
    body = ask.body(target.model) | {"stream": True, "return_token_ids": True}
    connection = HTTPConnection(target.address, timeout=TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json", **target.headers}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RequestFailed(f"refused: {response.status} {_code(response.read())}")
        for line in response:
            if not line.startswith(b"data: "):
                continue
            payload = line.removeprefix(b"data: ").strip()
            if payload == b"[DONE]":
                return
            yield _num_tokens(json.loads(payload))
    except (OSError, HTTPException) as error:
        raise RequestFailed(f"cut: {type(error).__name__}") from error
    finally:
        connection.close()
    raise RequestFailed("cut: no [DONE]")


def stream_socket(target: Target, ask: Ask) -> Iterator[int]:
    """/ws/generate, on a socket of its own; yields the number of tokens of each message as it arrives.

    Raises:
        RequestFailed: refused, or closed before its finish.
    """
    try:
        with connect(
            f"ws://{target.address}/ws/generate",
            additional_headers=target.headers,
            max_size=MAX_MESSAGE_BYTES,
            open_timeout=TIMEOUT_S,
            proxy=None,
        ) as socket:
            socket.send(json.dumps({"type": "generate", "id": "0", **ask.body(target.model)}))
            for text in socket:
                message = json.loads(text)
                match message["type"]:
                    case "tokens":
                        yield len(message["token_ids"])
                    case "ping":
                        socket.send(json.dumps({"type": "pong", "n": message["n"]}))
                    case "finish":
                        return
                    case "error":
                        raise RequestFailed(f"refused: {message['error']['code']}")
    except (OSError, WebSocketException) as error:
        raise RequestFailed(f"cut: {type(error).__name__}") from error
    raise RequestFailed("cut: no finish")


STREAMS: dict[str, Callable[[Target, Ask], Iterator[int]]] = {"SSE": stream_sse, "WS": stream_socket}
"""By the name under which Locust lists them."""


def _num_tokens(event: dict[str, object]) -> int:
    """Of an event; servers that give no token ids send one token at a time, as far as one can know."""
    choices = event.get("choices")
    if not isinstance(choices, list):
        raise RequestFailed(f"error event: {_code(json.dumps(event).encode())}")
    return sum(len(choice.get("token_ids") or ()) or bool(choice.get("text")) for choice in choices)


def _code(body: bytes) -> str:
    """Of an error in OpenAI's shape; anything else is told as it is."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:80].decode(errors="replace")

"""How one line is answered: by the application in this process, or by a server over HTTP."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final, Protocol

import httpx
from pydantic_core import from_json, to_json

from apt_serve.jobs.lines import Line
from apt_serve.jobs.records import JobRecord, Kind, LineResult

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
AsgiApp = Callable[..., Awaitable[None]]
Headers = Callable[[JobRecord], Mapping[str, str]]

_BROKEN: Final = frozenset({500, 502, 504})
_MODEL_FAILED: Final = b'"model_load_failed"'
_MAX_BROKEN = 3
"""Tries of a line whose answer is that the server failed."""
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0


class LineRunner(Protocol):
    """Whoever answers lines."""

    async def run(self, job: JobRecord, line: Line) -> LineResult:
        """The answer to a line, whatever it is; waits while the server has no room."""

    async def close(self) -> None:
        """Give connections back."""


class HttpRunner:
    """Lines as HTTP requests."""

    def __init__(self, client: httpx.AsyncClient, headers: Headers, priority: int | None) -> None:
        self._client = client
        self._headers = headers
        self._priority = priority

    async def run(self, job: JobRecord, line: Line) -> LineResult:
        """See LineRunner."""
        if line.body.get("stream"):
            return _refusal(line, "stream: a batch or job cannot stream; leave it out", "stream")
        body = line.body if self._priority is None else {"priority": self._priority} | line.body
        content, num_broken, pause_s = to_json(body), 0, _FIRST_PAUSE_S
        while True:
            response = await self._post(job, content)
            if response is not None and response.status_code == HTTPStatus.UNAUTHORIZED:
                logger.error("%s waits: the server does not know this worker; both need the same pepper", job.id)
            num_broken += response is not None and _is_broken(response)
            if response is not None and not _may_pass(response, num_broken):
                return _result(line, response)
            wait_s = pause_s if response is None else max(pause_s, _retry_after_s(response))
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
            pause_s *= 2

    async def close(self) -> None:
        """See LineRunner."""
        await self._client.aclose()

    async def _post(self, job: JobRecord, content: bytes) -> httpx.Response | None:
        """The answer; None if the server cannot be reached or went away."""
        # The thousands of lines of a batch have traces of their own.
        trace = job.trace_headers if job.kind is Kind.JOB else {}
        headers = {"Content-Type": "application/json", **trace, **self._headers(job)}
        try:
            return await self._client.post(job.endpoint, content=content, headers=headers)
        except httpx.TransportError:
            return None


class InProcessRunner:
    """Lines as requests to the application in this process, made in the name of the job's owner."""

    def __init__(self, app: AsgiApp, priority: int | None) -> None:
        self._app = app
        self._priority = priority

    async def run(self, job: JobRecord, line: Line) -> LineResult:
        """See LineRunner."""

        async def app(scope: Scope, receive: Any, send: Any) -> None:
            await self._app({**scope, "state": {"identity": job.caller}}, receive, send)

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://jobs.internal", timeout=None) as client:
            return await HttpRunner(client, lambda job: {}, self._priority).run(job, line)

    async def close(self) -> None:
        """See LineRunner."""


def remote_runner(server_url: str, headers: Headers, priority: int | None, concurrency: int) -> HttpRunner:
    """Over HTTP. The server limits how long a request may take, so nothing is waited for but the connection."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(None, connect=5.0)
    return HttpRunner(httpx.AsyncClient(base_url=server_url, limits=limits, timeout=timeout), headers, priority)


def _is_broken(response: httpx.Response) -> bool:
    """Whether the answer is that the server failed, which it may do again."""
    # A model that did not load will rarely do so later; all other 503 ask for patience.
    return response.status_code in _BROKEN or (response.status_code == 503 and _MODEL_FAILED in response.content)


def _may_pass(response: httpx.Response, num_broken: int) -> bool:
    """Whether another try may get another answer: a server that has no room now has some later."""
    if _is_broken(response):
        return num_broken < _MAX_BROKEN
    # Whom the server does not know is this worker, not the owner: its settings can be mended.
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        return True
    # A limit that a request exceeds by itself is refused without a time at which to come again.
    return response.status_code == 503 or (response.status_code == 429 and "Retry-After" in response.headers)


def _result(line: Line, response: httpx.Response) -> LineResult:
    request_id = response.headers.get("X-Request-ID") or f"batch_req_{uuid.uuid4().hex}"
    return LineResult(line.number, line.custom_id, request_id, response.status_code, _json_text(response))


def _json_text(response: httpx.Response) -> str:
    """The body; as an error of ours if something between us and the server answered in another language."""
    try:
        from_json(response.content)
        return response.text
    except ValueError:
        return _error(f"The server answered {response.status_code} without JSON.", "server_error", None)


def _refusal(line: Line, message: str, param: str) -> LineResult:
    body = _error(message, "invalid_request_error", param)
    return LineResult(line.number, line.custom_id, f"batch_req_{uuid.uuid4().hex}", 400, body)


def _error(message: str, kind: str, param: str | None) -> str:
    return to_json({"error": {"message": message, "type": kind, "param": param, "code": None}}).decode()


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0

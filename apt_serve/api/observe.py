"""Follows each request from its arrival to its end, for metrics, access log and traces."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_serve.access.identity import Identity
from apt_serve.api.errors import CLIENT_CLOSED_REQUEST, as_api_error
from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.access_log import AccessLog
from apt_serve.telemetry.config import TelemetryConfig
from apt_serve.telemetry.error_log import ErrorLog
from apt_serve.telemetry.exchange import CURRENT, Exchange

if TYPE_CHECKING:
    from apt_serve.telemetry.tracing import Tracing


class Observer:
    """Where the ends of exchanges are reported, and faults on their way. One per app."""

    def __init__(self, config: TelemetryConfig, metrics: PrometheusMetrics, records: RecordsConfig) -> None:
        self._metrics = metrics
        self._access_log = AccessLog() if config.access_log else None
        self._error_log = ErrorLog(records.path) if config.error_log else None
        self._tracing = _tracing(config)

    def start(self) -> None:
        """Begin to keep faults."""
        if self._error_log is not None:
            self._error_log.start()

    @contextmanager
    def follow(self, exchange: Exchange, headers: Mapping[str, str]) -> Iterator[None]:
        """Follow an exchange until the block ends, then report it.

        Args:
            exchange: has just arrived.
            headers: with the caller's traceparent, if there is one.
        """
        span = None
        if self._tracing is not None:
            span = self._tracing.start(exchange, headers)
            exchange.traceparent = self._tracing.traceparent(span)
        token = CURRENT.set(exchange)
        try:
            yield
        finally:
            CURRENT.reset(token)
            exchange.ended_at = time.monotonic()
            self._metrics.exchanged(exchange)
            if self._access_log is not None:
                self._access_log.write(exchange)
            if self._tracing is not None and span is not None:
                self._tracing.end(span, exchange)

    @contextmanager
    def follow_message(self, caller: Identity) -> Iterator[None]:
        """The same for a message on a WebSocket, whose own exchange is the current one."""
        socket = CURRENT.get()
        request_id = socket.request_id if socket else uuid.uuid4().hex
        client = socket.client if socket else None
        exchange = Exchange(request_id, "MESSAGE", client, route="/ws/generate", caller=caller)
        above = {"traceparent": socket.traceparent} if socket and socket.traceparent else {}
        with self.follow(exchange, above):
            try:
                yield
            except (asyncio.CancelledError, GeneratorExit):
                exchange.status = CLIENT_CLOSED_REQUEST
                raise
            except Exception as error:
                answer = as_api_error(error)
                exchange.status = answer.status_code
                raise answer from error
            else:
                exchange.status = 200

    async def close(self) -> None:
        """Send the traces that have not been sent, and keep no more faults."""
        if self._error_log is not None:
            self._error_log.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _tracing(config: TelemetryConfig) -> Tracing | None:
    if config.traces_endpoint is None:
        return None
    from apt_serve.telemetry.tracing import Tracing

    return Tracing(config)


class ObserveMiddleware:
    """Makes an Exchange of each HTTP request. That of a WebSocket is its life; its messages have their own."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        exchange = Exchange(
            request_id=scope["state"]["request_id"],
            method=scope.get("method", "WEBSOCKET"),
            client=client[0] if client else None,
        )

        async def watched_send(message: Message) -> None:
            kind = message["type"]
            if kind in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                exchange.status = message.get("status", 101)
                content_type = dict(message.get("headers", ())).get(b"content-type", b"")
                exchange.is_streamed = content_type.startswith(b"text/event-stream")
                if exchange.traceparent is not None:
                    MutableHeaders(scope=message)["traceparent"] = exchange.traceparent
            elif exchange.first_byte_at is None and message.get("body"):
                exchange.first_byte_at = time.monotonic()
            await send(message)

        with self._observer.follow(exchange, Headers(scope=scope)):
            try:
                await self._app(scope, receive, watched_send)
            finally:
                exchange.route = getattr(scope.get("route"), "path", exchange.route)
                exchange.caller = scope["state"].get("identity")


async def routed(connection: HTTPConnection) -> None:
    """A dependency of every route: a fault on the way knows which one it was."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.route = connection.scope["route"].path
        exchange.caller = connection.scope["state"].get("identity")


def addressed(model: str) -> None:
    """Note which of the served models a request is for, before it is known whether that can be had."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.model = model


def addressed_model() -> str | None:
    """What was noted; None where nobody follows the request, or it has not come so far."""
    exchange = CURRENT.get()
    return None if exchange is None else exchange.model


def submitted(caller: Identity, job: Job) -> Exchange | None:
    """Note that a job goes to the engine now. None where nobody follows it."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.caller, exchange.model = caller, job.model
        exchange.submitted_at = time.monotonic()
        exchange.num_prompt_tokens = job.num_prompt_tokens
    return exchange


def advanced(exchange: Exchange, batch: list[ChoiceDelta]) -> None:
    """Note what has come of a job."""
    exchange.last_token_at = time.monotonic()
    if exchange.first_token_at is None:
        exchange.first_token_at = exchange.last_token_at
        if exchange.submitted_at is not None:
            exchange.scheduled_at = exchange.submitted_at + min(delta.output.queue_s for delta in batch)
    for delta in batch:
        exchange.num_generated_tokens += len(delta.output.token_ids)
        if delta.output.finish_reason is not None:
            exchange.finish_reasons[delta.output.finish_reason] += 1


def ended(exchange: Exchange, job: Job) -> None:
    """Note that a job is over; choices that have not ended were aborted."""
    num_missing = len(job.requests) * job.n - exchange.finish_reasons.total()
    if num_missing > 0:
        exchange.finish_reasons["abort"] += num_missing

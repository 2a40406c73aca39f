"""Plain ASGI middleware: request ids, last-resort errors, body limit. None of it buffers a response."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_serve.api.errors import ApiError, as_api_error

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-ID"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestIdMiddleware:
    """Gives every request an id, the client's own if it is sane, and returns it with every response.

    Ray Serve adds the header to every HTTP response by itself, with the id it hands to the application: behind it
    (``is_behind_serve``) the header is left to Serve, or the client would get it twice.
    """

    def __init__(self, app: ASGIApp, is_behind_serve: bool = False) -> None:
        self._app = app
        self._answered = ["websocket.accept", "websocket.http.response.start"]
        if not is_behind_serve:
            self._answered.append("http.response.start")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        offered = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = offered if _SANE_REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] in self._answered:
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class LastResortMiddleware:
    """Answers 500 in OpenAI's shape to what nobody caught. Starlette's own would answer outside of CORS and ids."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if has_started:  # the status is gone: all that is left is to cut the connection
                logger.exception("the answer to request %s broke off", scope["state"]["request_id"])
                raise
            await as_api_error(error).response()(scope, receive, send)


DISCARD_FACTOR = 16
"""How much more than the largest body is read before a client is cut off."""


class BodyLimitMiddleware:
    """Refuses bodies above a size: by what the client declares, else as soon as it has sent too much.

    Paths among ``exceptions`` have a size of their own.

    The rest of the body is read and thrown away, up to DISCARD_FACTOR times the size: a client that still sends when
    its connection is closed sees a reset instead of the answer. One that waits for "100 Continue" sends nothing.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, exceptions: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._exceptions = exceptions or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._exceptions.get(scope["path"], self._max_bytes)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > max_bytes:
            if headers.get("expect", "").lower() != "100-continue":
                await _discard(receive, max_bytes)
            await _refusal(max_bytes).response()(scope, receive, send)
            return
        num_received = 0

        async def counting_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > max_bytes:
                if message.get("more_body", False):
                    await _discard(receive, max_bytes)
                raise _refusal(max_bytes)
            return message

        await self._app(scope, counting_receive, send)


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Read what else the client sends."""
    num_bytes, message = 0, await receive()
    while message["type"] == "http.request" and message.get("more_body", False):
        num_bytes += len(message.get("body", b""))
        if num_bytes > DISCARD_FACTOR * max_bytes:
            return
        message = await receive()


def _refusal(max_bytes: int) -> ApiError:
    message = f"The request body is larger than {max_bytes} bytes."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

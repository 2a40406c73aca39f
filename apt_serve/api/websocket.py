"""GET /ws/generate: several generations at a time on one WebSocket, with cancel and back-pressure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

from fastapi import APIRouter
from pydantic import TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from apt_serve.access.authenticator import require_scope
from apt_serve.access.errors import AuthenticationError, PermissionDeniedError
from apt_serve.access.identity import Identity, Scope
from apt_serve.api.errors import ApiError, as_api_error
from apt_serve.api.json_route import parse_json
from apt_serve.api.outbox import Outbox, SocketClosed, Window
from apt_serve.api.schemas.websocket import (
    AuthenticateMessage,
    CancelMessage,
    ClientMessage,
    ErrorMessage,
    GenerateMessage,
    PongMessage,
)
from apt_serve.api.socket_generation import SocketGeneration
from apt_serve.api.state import ApiState, State

logger = logging.getLogger(__name__)
router = APIRouter()

_CLOSE_TIMEOUT_S = 2.0
_AUTHENTICATE_TIMEOUT_S = 10.0
"""A client that shows nothing in its header says who it is within this time."""

_Message = GenerateMessage | CancelMessage | PongMessage | AuthenticateMessage
_CLIENT_MESSAGE: Final = TypeAdapter[_Message](ClientMessage)
_AUTHENTICATE: Final = TypeAdapter(AuthenticateMessage)


@router.websocket("/ws/generate")
async def generate(websocket: WebSocket, state: State) -> None:
    """Serve one socket until either side closes it; whatever still runs then is aborted."""
    if not _is_allowed_origin(websocket, state.config.api.cors_allow_origins):
        await websocket.send_denial_response(ApiError(403, "This origin is not allowed.", code="origin").response())
        return
    await websocket.accept()
    try:
        caller = await _caller(websocket, state)
        async with state.access.while_valid(caller, until_expiry=True):
            await _Session(websocket, state, caller).run()
    except WebSocketDisconnect:
        pass
    except AuthenticationError as error:
        await _close(websocket, 4401, str(error))
    except PermissionDeniedError as error:
        await _close(websocket, 4403, str(error))
    except SocketClosed as closed:
        await _close(websocket, closed.code, closed.reason)
    except Exception:
        logger.exception("a WebSocket failed by a fault of the server's")
        await _close(websocket, 1011, "a fault of the server's")


async def _caller(websocket: WebSocket, state: ApiState) -> Identity:
    """Whom a socket is for, by its header or else its first message.

    Raises:
        AuthenticationError: that is no valid one, or did not come in time.
        PermissionDeniedError: it may not generate.
    """
    caller: Identity | None = websocket.scope["state"].get("identity")
    if caller is None:
        try:
            async with asyncio.timeout(_AUTHENTICATE_TIMEOUT_S):
                message = _AUTHENTICATE.validate_python(parse_json(await websocket.receive_text()))
        except (TimeoutError, ApiError, ValidationError, KeyError):
            raise AuthenticationError("The first message must be authenticate, with an API key or token.") from None
        caller = await state.access.of_bearer(message.token)
    require_scope(caller, Scope.INFERENCE)
    return caller


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    # A client that does not read cannot be told either.
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await websocket.close(code, reason)


def _is_allowed_origin(websocket: WebSocket, allowed: tuple[str, ...]) -> bool:
    """CORS does not cover WebSockets: without this any web page could use a server its reader can reach."""
    origin = websocket.headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return True
    return urlsplit(origin).netloc == websocket.headers.get("host")


class _Session:
    """One socket: a receiver, a writer, and a task per generation."""

    def __init__(self, websocket: WebSocket, state: ApiState, caller: Identity) -> None:
        self._websocket = websocket
        self._caller = caller
        self._state = state
        api = state.config.api
        self._window = Window(api.websocket_window_bytes)
        self._outbox = Outbox(websocket.send_text, self._window, api.websocket_patience_s)
        self._running: dict[str, asyncio.Task[None]] = {}
        """The streaming part of each generation, by the client's id; cancelling it is the client's cancel."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> NoReturn:
        """Work until one side ends it.

        Raises:
            WebSocketDisconnect: the client did.
            SocketClosed: the server does.
        """
        # The receiver must run beside the writer: behind Ray Serve's proxy only it learns that the client has left.
        ends = [self._spawn(self._receive()), self._spawn(self._outbox.write())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()
            raise AssertionError("both sides of a socket run for ever")
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _receive(self) -> NoReturn:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            data: Any = None
            try:
                data = self._parse(message.get("text"))
                self._handle(_CLIENT_MESSAGE.validate_python(data))
            except (ApiError, ValidationError) as error:
                self._outbox.reply(self._error(_id_of(data), error))

    def _parse(self, text: str | None) -> Any:
        if text is None:
            raise ApiError(400, "Messages are text, not binary.", code="binary_message")
        if len(text) > self._state.config.api.max_body_bytes:
            limit = self._state.config.api.max_body_bytes
            raise ApiError(413, f"The message is larger than {limit} bytes.", code="request_too_large")
        return parse_json(text)

    def _handle(self, message: _Message) -> None:
        match message:
            case GenerateMessage():
                self._start(message)
            case CancelMessage():
                if message.id not in self._running:
                    raise ApiError(404, f"No generation {message.id!r} runs.", param="id", code="unknown_id")
                self._running[message.id].cancel()
            case PongMessage():
                if not self._window.answered(message.n):
                    raise ApiError(400, f"There was no ping {message.n}.", param="n", code="unknown_ping")
            case AuthenticateMessage():
                if self._state.access.is_enabled:  # else there is nothing to prove, as with a header
                    raise ApiError(400, "It is known already who this socket is for.", code="already_authenticated")

    def _start(self, message: GenerateMessage) -> None:
        if message.id in self._running:
            raise ApiError(400, f"A generation {message.id!r} runs already.", param="id", code="duplicate_id")
        limit = self._state.config.api.max_generations_per_websocket
        if len(self._running) >= limit:
            raise ApiError(429, f"{limit} generations run on this socket already.", code="too_many_generations")
        generation = SocketGeneration(self._state, self._caller, message)
        streaming = self._spawn(self._stream(generation))
        self._running[message.id] = streaming
        self._spawn(self._conclude(message.id, generation, streaming))

    async def _stream(self, generation: SocketGeneration) -> None:
        async with aclosing(generation.messages()) as messages:
            async for message in messages:
                await self._outbox.put(message)

    async def _conclude(self, generation_id: str, generation: SocketGeneration, streaming: asyncio.Task[None]) -> None:
        """Say how a generation ended. Its id is free again once that is on its way, not before: this bounds them."""
        await asyncio.wait((streaming,))
        error = None if streaming.cancelled() else streaming.exception()
        end = generation.finish() if error is None else self._error(generation_id, error, generation.model)
        await self._outbox.put(end)
        del self._running[generation_id]

    def _error(self, generation_id: str | None, error: BaseException, model: str | None = None) -> ErrorMessage:
        answer = as_api_error(error)
        self._state.metrics.rejected(answer.reason, model)
        return ErrorMessage(type="error", id=generation_id, error=answer.body().error)


def _id_of(data: Any) -> str | None:
    """The id a faulty message carries, if it carries one."""
    name = data.get("id") if isinstance(data, dict) else None
    return name if isinstance(name, str) and len(name) <= 128 else None

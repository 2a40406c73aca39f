"""Handlers that write their messages, as the async generators that Ray Serve wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from apt_serve.rpc.call import Context, WritingContext
from apt_serve.rpc.errors import Metadata
from apt_serve.rpc.inference_pb2 import ChatRequest, GenerateRequest, Generation
from apt_serve.rpc.services import Services

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)


async def messages(
    handler: Callable[[Request, WritingContext], Awaitable[None]],
    request: Request,
    context: Context,
    empty: Answer,
) -> AsyncGenerator[Answer, None]:
    """What a handler writes. Closing it cancels the handler, which runs in a task of its own.

    Args:
        handler: of a method that answers with many messages.
        request: its message.
        context: Ray Serve's.
        empty: yielded last if the handler fails: Serve sends a status together with a message or not at all.
    """
    outbox = _Outbox(context)

    async def run() -> None:
        try:
            await handler(request, outbox)
        finally:
            outbox.end()

    task = asyncio.create_task(run())
    try:
        while (message := await outbox.take()) is not None:
            yield message
        await task
        if outbox.has_status:
            yield empty
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Outbox:
    """A context whose messages wait, one at a time, until somebody takes them."""

    def __init__(self, context: Context) -> None:
        self.has_status = False
        self._context = context
        self._written: asyncio.Queue[Any] = asyncio.Queue()
        self._is_taken = asyncio.Event()

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def peer(self) -> str:
        return self._context.peer()

    def set_code(self, code: StatusCode) -> None:
        self.has_status = True
        self._context.set_code(code)

    def set_details(self, details: str) -> None:
        self._context.set_details(details)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._context.set_trailing_metadata(trailing_metadata)

    async def write(self, message: Any) -> None:
        """Returns when the message before was sent on: a slow client makes the engine merge its deltas."""
        self._is_taken.clear()
        self._written.put_nowait(message)
        await self._is_taken.wait()

    async def take(self) -> Any:
        """The next message; None at the end."""
        self._is_taken.set()
        return await self._written.get()

    def end(self) -> None:
        self._written.put_nowait(None)


class ServeServices:
    """The methods of all services as Ray Serve calls them: those with many messages are async generators."""

    def __init__(self, services: Services) -> None:
        self.Generate = services.Generate
        self.ListModels = services.ListModels
        self.Cancel = services.Cancel
        self.Check = services.Check
        self.List = services.List
        self._services = services

    def GenerateStream(self, request: GenerateRequest, context: Context) -> AsyncGenerator[Generation, None]:
        """See inference.proto."""
        return messages(self._services.GenerateStream, request, context, Generation())

    def Chat(self, request: ChatRequest, context: Context) -> AsyncGenerator[Generation, None]:
        """See inference.proto."""
        return messages(self._services.Chat, request, context, Generation())

    def Watch(self, request: HealthCheckRequest, context: Context) -> AsyncGenerator[HealthCheckResponse, None]:
        """See HealthService."""
        return messages(self._services.Watch, request, context, HealthCheckResponse())

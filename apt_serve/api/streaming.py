"""Answers over HTTP, whole or as server-sent events. Either way a client that leaves ends the generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apt_serve.api.errors import as_api_error
from apt_serve.api.formatting import Formatter
from apt_serve.api.generation import Batches, ChoiceDelta, Job
from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.api.schemas.common import StreamOptions, Usage
from apt_serve.api.transcript import Tally, Transcript

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"
WEIGHT_VERSION_HEADER = "X-Weight-Version"
_HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would otherwise collect tokens before it passes them on
}


@dataclass(frozen=True, slots=True)
class StreamUsage:
    """Where in a stream the usage is wanted."""

    at_end: bool
    in_every_chunk: bool

    @classmethod
    def of(cls, options: StreamOptions | None) -> StreamUsage:
        """As the client's stream_options say."""
        if options is None:
            return cls(at_end=False, in_every_chunk=False)
        return cls(bool(options.include_usage), bool(options.continuous_usage_stats))


async def collected(receive: Receive, job: Job, batches: Batches) -> tuple[list[ChoiceDelta], Usage]:
    """Wait for all choices: each of them whole, and the usage."""
    return await while_connected(receive, collect(job, batches))


async def collect(job: Job, batches: Batches) -> tuple[list[ChoiceDelta], Usage]:
    """The same, for a caller that is cancelled when its client leaves."""
    tally, transcript = Tally(job), Transcript()
    async with aclosing(batches):
        async for batch in batches:
            tally.add(batch)
            transcript.add(batch)
    return transcript.choices(), tally.usage()


async def streamed_answer(
    receive: Receive, job: Job, batches: Batches, formatter: Formatter, usage: StreamUsage
) -> Response:
    """Wait for the first tokens, so that an error before them still has its own status; then stream."""
    try:
        first = await while_connected(receive, anext(batches))
    except BaseException:
        await batches.aclose()
        raise
    weight_version = first[0].output.weight_version
    formatter.start(weight_version)
    return EventStream(weight_version, _events(first, batches, Tally(job), formatter, usage), batches)


async def _events(
    first: list[ChoiceDelta], batches: Batches, tally: Tally, formatter: Formatter, usage: StreamUsage
) -> AsyncGenerator[bytes, None]:
    """One item per write. A failure midway is an event of its own, and then there is no [DONE]."""

    def write(batch: list[ChoiceDelta]) -> bytes:
        tally.add(batch)
        so_far = tally.usage() if usage.in_every_chunk else None
        data = b"".join(_event(chunk) for delta in batch for chunk in formatter.chunks(delta, so_far))
        return data + end() if tally.is_complete else data

    def end() -> bytes:
        return (_event(formatter.usage_chunk(tally.usage())) if usage.at_end else b"") + _DONE

    try:
        yield write(first)
        async for batch in batches:
            yield write(batch)
    except Exception as error:
        yield _event(as_api_error(error).body())


def _event(body: ResponseSchema) -> bytes:
    return b"data: " + body.to_json() + b"\n\n"


class EventStream(Response):
    """Server-sent events, written as fast as the client reads; closes the job when either side is done."""

    media_type = "text/event-stream"

    def __init__(self, weight_version: str, writes: AsyncGenerator[bytes, None], batches: Batches) -> None:
        self.status_code = 200
        self.background = None
        self._writes = writes
        self._batches = batches
        self.init_headers(_HEADERS | {WEIGHT_VERSION_HEADER: weight_version})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write all events, or as many as the client waits for."""
        try:
            async with aclosing(self._batches), aclosing(self._writes):
                await while_connected(receive, self._write(send))
        except (ClientDisconnect, OSError):
            pass  # nobody is left to tell; closing the job has aborted it

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._writes:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Do some work, unless the client leaves first; starlette alone would let it go on for nobody.

    Raises:
        ClientDisconnect: the client left; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel((task, watcher))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

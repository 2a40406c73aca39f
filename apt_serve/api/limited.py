"""A job within its caller's limits: HTTP, WebSocket messages and gRPC calls all run theirs by this one function."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_serve.access.identity import Identity
from apt_serve.api import observe
from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.state import ApiState
from apt_serve.api.transcript import Tally
from apt_serve.engine.client import EngineClient

_STATE_KEY = "limit_headers"


async def run_limited(
    state: ApiState, caller: Identity, engine: EngineClient, job: Job, headers: MutableMapping[str, str] | None = None
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """As ``ApiState.run``, once the caller's limits allow it. What was reserved and not used goes back in any case.

    Nothing is reserved before the first item is asked for.

    Args:
        state: of the server.
        caller: whose limits.
        engine: who will serve it.
        job: from ``make_job``.
        headers: told where the limits stand, with the first item or the error in its place.

    Raises:
        RateLimitedError: at the first item: a limit is reached.
        RequestTimeoutError, AptError: as ``ApiState.run``.
    """
    limiter = state.limiter
    reservation = await limiter.reserve(caller, _most_tokens(engine, job))
    tally, num_used, is_settled = Tally(job), 0, False
    exchange = None
    try:
        if headers is not None:
            headers.update(reservation.headers)
        exchange = observe.submitted(caller, job)
        async with aclosing(state.run(engine, job, caller)) as batches:
            async for batch in batches:
                if exchange is not None:
                    observe.advanced(exchange, batch)
                tally.add(batch)
                num_used = tally.num_tokens
                if tally.is_complete:  # before the client sees the end, so that it may ask again at once
                    is_settled = True
                    await limiter.settle(reservation, num_used)
                yield batch
    except (GeneratorExit, asyncio.CancelledError):
        num_used = max(num_used, job.num_prompt_tokens)  # who leaves before the first token pays for the prompt
        raise
    finally:
        if exchange is not None:
            observe.ended(exchange, job)
        if num_used:
            state.usage.note(caller, job.model, tally.used())
        if not is_settled:
            await limiter.settle(reservation, num_used)


def _most_tokens(engine: EngineClient, job: Job) -> int:
    """What a job comes to if every choice runs to its end."""
    total = job.num_prompt_tokens
    for request in job.requests:
        room = engine.model.max_model_len - len(request.prompt_token_ids)
        wanted = request.sampling.max_tokens
        total += job.n * (room if wanted is None else min(room, wanted))
    return total


def limit_headers(connection: HTTPConnection) -> MutableMapping[str, str]:
    """Headers that the answer to a request will carry, whatever it is."""
    headers: MutableMapping[str, str] = connection.scope.setdefault("state", {}).setdefault(_STATE_KEY, {})
    return headers


class LimitHeadersMiddleware:
    """Puts where the caller's limits stand on the answer, also on an error after they were reserved."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits: dict[str, str] = {}
        scope.setdefault("state", {})[_STATE_KEY] = limits

        async def send_with_limits(message: Message) -> None:
            if limits and message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits)
            await send(message)

        await self._app(scope, receive, send_with_limits)

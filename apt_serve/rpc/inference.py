"""The service apt.v1.Inference, for any transport: a call goes the way of an HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final

from apt_serve.api.chat import chat_job
from apt_serve.api.completions import completion_job
from apt_serve.api.errors import ApiError
from apt_serve.api.generation import Batches, Job
from apt_serve.api.limited import run_limited
from apt_serve.api.models import engines
from apt_serve.api.state import ApiState
from apt_serve.api.streaming import collect
from apt_serve.api.transcript import Tally, Transcript
from apt_serve.engine.client import EngineClient
from apt_serve.rpc.answers import Answer
from apt_serve.rpc.call import Call, Calls, Context, WritingContext
from apt_serve.rpc.inference_pb2 import (
    DESCRIPTOR,
    CancelRequest,
    CancelResponse,
    ChatRequest,
    GenerateRequest,
    Generation,
    ListModelsRequest,
    ListModelsResponse,
    Model,
)
from apt_serve.rpc.requests import NAMES, chat_body, completion_body
from apt_serve.rpc.running import Running

SERVICE: Final = DESCRIPTOR.services_by_name["Inference"].full_name
Cancel = Callable[[str, str], Awaitable[bool]]
"""Ends an owner's generation by its request id, wherever it runs; whether there was one."""


class InferenceService:
    """The methods of inference.proto, by their names there.

    Each takes its message and the transport's context; one that answers with many messages writes them to the context.
    A failed call returns an empty message, and the context has its status.

    Args:
        state: of the application that HTTP requests come to.
        cancel: for all replicas; None: there is this one alone.
    """

    def __init__(self, state: ApiState, cancel: Cancel | None = None) -> None:
        self.running = Running()
        self._state = state
        self._calls = Calls(state)
        self._cancel = cancel or self._cancel_here

    async def Generate(self, request: GenerateRequest, context: Context) -> Generation:
        """See inference.proto."""

        async def handle(call: Call) -> Generation:
            return await self._whole(call, request)

        answer = await self._calls.run(f"/{SERVICE}/Generate", request, context, handle, NAMES)
        return answer or Generation()

    async def GenerateStream(self, request: GenerateRequest, context: WritingContext) -> None:
        """See inference.proto."""

        async def handle(call: Call) -> None:
            await self._stream(call, request, context)

        await self._calls.run(f"/{SERVICE}/GenerateStream", request, context, handle, NAMES)

    async def Chat(self, request: ChatRequest, context: WritingContext) -> None:
        """See inference.proto."""

        async def handle(call: Call) -> None:
            if request.stream:
                await self._stream(call, request, context)
            else:
                await self._write(call, context, await self._whole(call, request))

        await self._calls.run(f"/{SERVICE}/Chat", request, context, handle, NAMES)

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        """See inference.proto."""

        async def handle(call: Call) -> ListModelsResponse:
            call.send_trailers()
            models = [
                _model(name, engine) for name, engine in engines(self._state).items() if call.caller.may_use(name)
            ]
            return ListModelsResponse(models=models)

        answer = await self._calls.run(f"/{SERVICE}/ListModels", request, context, handle)
        return answer or ListModelsResponse()

    async def Cancel(self, request: CancelRequest, context: Context) -> CancelResponse:
        """See inference.proto."""

        async def handle(call: Call) -> CancelResponse:
            if not await self._cancel(call.caller.owner, request.request_id):
                message = f"No generation of yours with the request_id {request.request_id[:128]!r} runs."
                raise ApiError(404, message, param="request_id", code="generation_not_found")
            call.send_trailers()
            return CancelResponse()

        answer = await self._calls.run(f"/{SERVICE}/Cancel", request, context, handle)
        return answer or CancelResponse()

    async def _cancel_here(self, owner: str, request_id: str) -> bool:
        return self.running.cancel(owner, request_id)

    async def _whole(self, call: Call, request: GenerateRequest | ChatRequest) -> Generation:
        async with self._begun(call, request) as (answer, job, batches):
            choices, usage = await collect(job, batches)
        call.send_trailers()
        return answer.message(choices, usage)

    async def _stream(self, call: Call, request: GenerateRequest | ChatRequest, context: WritingContext) -> None:
        call.exchange.is_streamed = True
        async with self._begun(call, request) as (answer, job, batches):
            tally = Tally(job)
            async with aclosing(batches):
                async for batch in batches:
                    tally.add(batch)
                    new = Transcript()  # one delta per choice
                    new.add(batch)
                    usage = tally.usage() if tally.is_complete else None
                    call.send_trailers()
                    await self._write(call, context, answer.message(new.choices(), usage))

    @asynccontextmanager
    async def _begun(
        self, call: Call, request: GenerateRequest | ChatRequest
    ) -> AsyncIterator[tuple[Answer, Job, Batches]]:
        """What a call asks for, while it may be cancelled by its id and its model stays loaded."""
        state, caller, model = self._state, call.caller, request.model or None
        async with self.running.generation(caller, call.request_id), state.using(caller, model) as engine:
            origin = state.origin(caller, request.cache_salt or None, model=model)
            if isinstance(request, ChatRequest):
                job = await chat_job(engine, chat_body(request), origin)
            else:
                job = await completion_job(engine, completion_body(request), origin)
            answer = Answer(call.request_id, job, engine.model.tokenizer, shows_prompt=request.return_prompt_token_ids)
            yield answer, job, run_limited(state, caller, engine, job, call.limits)

    async def _write(self, call: Call, context: WritingContext, message: Generation) -> None:
        """Send a message, if the client reads.

        Raises:
            ApiError: it has read nothing for too long.
        """
        patience_s = self._state.config.api.websocket_patience_s
        try:
            async with asyncio.timeout(patience_s):
                await context.write(message)
        except TimeoutError:
            text = f"The client has read nothing for {patience_s:g} seconds."
            raise ApiError(504, text, type="timeout_error", code="client_too_slow") from None
        call.wrote()


def _model(name: str, engine: EngineClient | None) -> Model:
    if engine is None:
        return Model(name=name)
    model = engine.model
    return Model(
        name=name,
        created=model.created,
        max_model_len=model.max_model_len,
        weight_version=model.weight_version,
        has_chat_template=model.tokenizer.has_chat_template,
        loaded=True,
    )

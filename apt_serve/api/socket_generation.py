"""One generation on a WebSocket: from a client's message to the messages that answer it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from apt_core.errors import InvalidRequestError
from apt_serve.access.identity import Identity
from apt_serve.api.errors import wire_names
from apt_serve.api.generation import ChoiceDelta, Job, Prompt, make_job
from apt_serve.api.limited import run_limited
from apt_serve.api.logprobs import chat_logprobs
from apt_serve.api.prompts import chat_prompt, sampling_params, text_prompts
from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.api.schemas.common import PromptTokensDetails, Usage
from apt_serve.api.schemas.websocket import FinishedChoice, FinishMessage, GenerateMessage, StartMessage, TokensMessage
from apt_serve.api.state import ApiState
from apt_serve.api.transcript import Tally
from apt_serve.engine.client import EngineClient, GenerationOutput


class SocketGeneration:
    """Runs one generate message: ``messages`` while it lasts, ``finish`` when it is over or was cancelled."""

    def __init__(self, state: ApiState, caller: Identity, message: GenerateMessage) -> None:
        self._state = state
        self._caller = caller
        self._message = message
        self._tally: Tally | None = None
        self._ends: dict[int, GenerationOutput] = {}

    async def messages(self) -> AsyncGenerator[ResponseSchema, None]:
        """Start and tokens. Closing it aborts the generation.

        Raises:
            AptError: as ``EngineClient.generate``.
            ApiError, RequestTimeoutError, RateLimitedError: the request cannot be served, or not in time.
        """
        with self._state.observer.follow_message(self._caller):
            async with aclosing(self._run()) as messages:
                async for message in messages:
                    yield message

    async def _run(self) -> AsyncGenerator[ResponseSchema, None]:
        async with self._state.using(self._caller, self._message.model) as engine:
            job = await self._make_job(engine)
            self._tally = Tally(job)
            async with aclosing(run_limited(self._state, self._caller, engine, job)) as batches:
                has_started = False
                async for batch in batches:
                    if not has_started:
                        has_started = True
                        yield self._start(job, batch[0].output.weight_version)
                    for delta in batch:
                        yield self._tokens_of(engine, delta)

    @property
    def model(self) -> str | None:
        """The further model that it is for; None: the default one, or one that is not served."""
        name = self._message.model
        return name if name in self._state.models.others else None

    def finish(self) -> FinishMessage:
        """How the choices ended; one that did not end by itself was cancelled."""
        return FinishMessage(
            type="finish",
            id=self._message.id,
            choices=[self._end(index) for index in range(self._message.n or 1)],
            usage=_NO_USAGE if self._tally is None else self._tally.usage(),
        )

    async def _make_job(self, engine: EngineClient) -> Job:
        message = self._message
        prompt = await self._prompt(engine)
        names = {"prompt_token_ids": "prompt"}
        if message.messages is not None:
            names = {"prompt": "messages", "prompt_token_ids": "messages"}
        with wire_names(names):
            sampling = sampling_params(
                engine.model, message.given(), max_tokens=message.max_tokens, logprobs=message.logprobs
            )
        origin = self._state.origin(self._caller, message.cache_salt, model=message.model)
        return make_job(engine, "ws", [prompt], sampling, origin=origin, priority=message.priority, names=names)

    async def _prompt(self, engine: EngineClient) -> Prompt:
        message = self._message
        if message.messages is not None and message.prompt is None:
            return await chat_prompt(engine.model, message.messages)
        if message.prompt is None or message.messages is not None:
            raise InvalidRequestError("give exactly one of prompt and messages", param="prompt")
        add_special_tokens = True if message.add_special_tokens is None else message.add_special_tokens
        [prompt] = await text_prompts(engine.model, message.prompt, add_special_tokens=add_special_tokens)
        return prompt

    def _start(self, job: Job, weight_version: str) -> StartMessage:
        return StartMessage(
            type="start",
            id=self._message.id,
            model=job.model,
            created=job.created,
            prompt_tokens=job.num_prompt_tokens,
            weight_version=weight_version,
        )

    def _tokens_of(self, engine: EngineClient, delta: ChoiceDelta) -> TokensMessage:
        assert self._tally is not None
        self._tally.add([delta])
        output, num_top = delta.output, self._message.logprobs
        if output.finish_reason is not None:
            self._ends[output.index] = output
        message = TokensMessage(
            type="tokens",
            id=self._message.id,
            index=output.index,
            text=output.text,
            token_ids=list(output.token_ids),
        )
        if num_top is not None:
            message.logprobs = chat_logprobs(engine.model.tokenizer, output.logprobs or (), num_top).content
        return message

    def _end(self, index: int) -> FinishedChoice:
        end = self._ends.get(index)
        if end is None or end.finish_reason is None:
            return FinishedChoice(index=index, finish_reason="abort", stop_reason=None)
        return FinishedChoice(index=index, finish_reason=end.finish_reason, stop_reason=end.stop_reason)


_NO_USAGE = Usage(
    prompt_tokens=0,
    completion_tokens=0,
    total_tokens=0,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
)

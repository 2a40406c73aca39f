"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from apt_core.errors import InvalidRequestError
from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.chat_format import ChatFormatter, ChatOptions
from apt_serve.api.errors import wire_names
from apt_serve.api.generation import Job, Origin, make_job
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import GENERATION_ERRORS
from apt_serve.api.prompts import chat_prompt, sampling_params
from apt_serve.api.schemas.chat import ChatCompletion, ChatCompletionRequest
from apt_serve.api.serving import answer
from apt_serve.api.state import State
from apt_serve.engine.client import EngineClient

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], dependencies=[needs(Scope.INFERENCE)])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATION_ERRORS)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State, caller: Caller
) -> Response:
    """Answer a conversation. With `stream` the answer is server-sent events, the last of them `data: [DONE]`."""
    engine = await state.engine_of(request, caller, body.model)
    job = await chat_job(engine, body, state.origin(caller, body.cache_salt, model=body.model))
    num_logprobs = job.requests[0].sampling.logprobs
    formatter = ChatFormatter(
        state.envelope(job), engine.model.tokenizer, ChatOptions(num_logprobs, bool(body.return_token_ids))
    )
    return await answer(request, state, engine, job, formatter, body)


async def chat_job(engine: EngineClient, body: ChatCompletionRequest, origin: Origin) -> Job:
    """What a body asks of the engine.

    Raises:
        InvalidRequestError: it could never be served.
    """
    num_logprobs = _num_logprobs(body)
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    names = {"prompt": "messages", "prompt_token_ids": "messages", "max_tokens": limit_name}
    if body.max_tokens is not None and body.max_tokens != body.token_limit:
        raise InvalidRequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    with wire_names(names):
        sampling = sampling_params(engine.model, body.given(), max_tokens=body.token_limit, logprobs=num_logprobs)
    prompt = await chat_prompt(engine.model, body.messages)
    return make_job(engine, "chatcmpl", [prompt], sampling, origin=origin, priority=body.priority, names=names)


def _num_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None

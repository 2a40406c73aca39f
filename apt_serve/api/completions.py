"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from apt_core.errors import InvalidRequestError
from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.completion_format import CompletionFormatter, CompletionOptions
from apt_serve.api.errors import wire_names
from apt_serve.api.generation import Job, Origin, make_job
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import GENERATION_ERRORS
from apt_serve.api.prompts import sampling_params, text_prompts
from apt_serve.api.schemas.completions import Completion, CompletionRequest
from apt_serve.api.serving import answer
from apt_serve.api.state import State
from apt_serve.engine.client import EngineClient
from apt_serve.engine.sampling_params import SamplingParams

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], dependencies=[needs(Scope.INFERENCE)])

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_NAMES = {"prompt_logprobs": "logprobs", "prompt_token_ids": "prompt"}


@router.post("/v1/completions", response_model=Completion, responses=GENERATION_ERRORS)
async def create_completion(body: CompletionRequest, request: Request, state: State, caller: Caller) -> Response:
    """Continue a text. With `stream` the answer is server-sent events, the last of them `data: [DONE]`."""
    engine = await state.engine_of(request, caller, body.model)
    job = await completion_job(engine, body, state.origin(caller, body.cache_salt, model=body.model))
    skip_special_tokens = job.requests[0].sampling.skip_special_tokens
    options = CompletionOptions(bool(body.echo), body.logprobs, skip_special_tokens, bool(body.return_token_ids))
    formatter = CompletionFormatter(state.envelope(job), engine.model.tokenizer, options)
    return await answer(request, state, engine, job, formatter, body)


async def completion_job(engine: EngineClient, body: CompletionRequest, origin: Origin) -> Job:
    """What a body asks of the engine.

    Raises:
        InvalidRequestError: it could never be served.
    """
    with wire_names(_NAMES):
        sampling = _sampling(engine, body)
    add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
    prompts = await text_prompts(engine.model, body.prompt, add_special_tokens=add_special_tokens)
    most = engine.model.max_num_choices
    if len(prompts) * sampling.n > most:
        raise InvalidRequestError(f"prompts times n must be at most {most} on this server", param="prompt")
    return make_job(engine, "cmpl", prompts, sampling, origin=origin, priority=body.priority, names=_NAMES)


def _sampling(engine: EngineClient, body: CompletionRequest) -> SamplingParams:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError("max_tokens may be 0 only with echo", param="max_tokens")
    return sampling_params(
        engine.model,
        body.given(),
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )

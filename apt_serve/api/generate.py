"""POST /generate: text in, text out."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import wire_names
from apt_serve.api.generation import make_job
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.limited import limit_headers, run_limited
from apt_serve.api.openapi import BODY_ERRORS, errors
from apt_serve.api.prompts import sampling_params, text_prompts
from apt_serve.api.schemas.simple import GenerateRequest, GenerateResponse
from apt_serve.api.state import State
from apt_serve.api.streaming import collected

router = APIRouter(route_class=JsonRoute, tags=["Simple"], dependencies=[needs(Scope.INFERENCE)])

_NAMES = {"prompt": "text", "prompt_token_ids": "text", "max_tokens": "max_length"}


@router.post("/generate", response_model=GenerateResponse, responses=BODY_ERRORS | errors(429, 500, 503, 504))
async def generate(body: GenerateRequest, request: Request, state: State, caller: Caller) -> Response:
    """Continue a text."""
    began = time.perf_counter()
    engine = await state.engine_of(request, caller, body.model)
    given = {} if body.temperature is None else {"temperature": body.temperature}
    prompts = await text_prompts(engine.model, body.text, add_special_tokens=True)
    with wire_names(_NAMES):
        sampling = sampling_params(engine.model, given, max_tokens=body.max_length)
    job = make_job(engine, "gen", prompts, sampling, origin=state.origin(caller, model=body.model), names=_NAMES)
    batches = run_limited(state, caller, engine, job, limit_headers(request))
    [choice], _ = await collected(request.receive, job, batches)
    answer = GenerateResponse(
        generated_text=choice.output.text,
        tokens=len(choice.output.token_ids),
        latency_ms=(time.perf_counter() - began) * 1000,
        weight_version=choice.output.weight_version,
    )
    return answer.response()

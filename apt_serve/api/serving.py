"""The path that completions and chat completions share, from a valid job to the HTTP response."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from apt_serve.api.access import identity_of
from apt_serve.api.formatting import Formatter
from apt_serve.api.generation import Job
from apt_serve.api.limited import limit_headers, run_limited
from apt_serve.api.schemas.common import GenerationFields
from apt_serve.api.state import ApiState
from apt_serve.api.streaming import WEIGHT_VERSION_HEADER, StreamUsage, collected, streamed_answer
from apt_serve.engine.client import EngineClient


async def answer(
    request: Request, state: ApiState, engine: EngineClient, job: Job, formatter: Formatter, body: GenerationFields
) -> Response:
    """Run a job and answer in the way the client asked for."""
    batches = run_limited(state, identity_of(request), engine, job, limit_headers(request))
    if body.stream:
        return await streamed_answer(request.receive, job, batches, formatter, StreamUsage.of(body.stream_options))
    choices, usage = await collected(request.receive, job, batches)
    weight_version = choices[0].output.weight_version
    formatter.start(weight_version)
    response = formatter.response(choices, usage).response()
    response.headers[WEIGHT_VERSION_HEADER] = weight_version
    return response

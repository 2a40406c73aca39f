"""/v1/batches: the requests of a file, run when there is room."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import ApiError
from apt_serve.api.files import find_file
from apt_serve.api.job_access import After, Limit, cancel_job, create_job, find_job, find_page
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.jobs import BatchList, BatchObject, BatchRequest
from apt_serve.api.state import State
from apt_serve.jobs.records import Kind

router = APIRouter(tags=["Jobs"], dependencies=[needs(Scope.JOBS), needs(Scope.INFERENCE)])
writing = APIRouter(route_class=JsonRoute)


@writing.post("/v1/batches", response_model=BatchObject, responses=errors(400, 401, 403, 404, 413, 415, 429))
async def create_batch(body: BatchRequest, state: State, caller: Caller) -> Response:
    """Run the lines of a file; it is read and checked after the answer."""
    file = await find_file(state, caller.owner, body.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        message = "input_file_id: the file's purpose must be batch"
        raise ApiError(400, message, param="input_file_id", code="invalid_purpose")
    expires = body.output_expires_after
    batch = await create_job(
        state,
        caller,
        Kind.BATCH,
        body.completion_window,
        endpoint=body.endpoint,
        input_file_id=file.id,
        metadata=body.metadata,
        output_expires_s=expires and float(expires.seconds),
        webhook_url=body.webhook_url,
    )
    return BatchObject.of(batch).response()


@router.get("/v1/batches", response_model=BatchList, responses=errors(400, 401, 403, 404))
async def list_batches(state: State, caller: Caller, after: After = None, limit: Limit = 20) -> Response:
    """The caller's batches, the newest first."""
    page = await find_page(state, Kind.BATCH, caller.owner, after, limit)
    return BatchList(data=[BatchObject.of(job) for job in page.jobs], **page.envelope).response()


@router.get("/v1/batches/{batch_id}", response_model=BatchObject, responses=errors(401, 403, 404))
async def get_batch(batch_id: str, state: State, caller: Caller) -> Response:
    """One batch."""
    return BatchObject.of(await find_job(state, Kind.BATCH, caller.owner, batch_id)).response()


@router.post("/v1/batches/{batch_id}/cancel", response_model=BatchObject, responses=errors(401, 403, 404, 409))
async def cancel_batch(batch_id: str, state: State, caller: Caller) -> Response:
    """Run no further line; the files tell of those that ran."""
    return BatchObject.of(await cancel_job(state, Kind.BATCH, caller.owner, batch_id)).response()


router.include_router(writing)

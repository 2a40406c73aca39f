"""/v1/jobs: one request, run when there is room, its answer kept."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import ApiError
from apt_serve.api.job_access import After, Limit, cancel_job, create_job, find_job, find_page
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import answer, errors
from apt_serve.api.schemas.jobs import JobList, JobObject, JobRequest
from apt_serve.api.state import State
from apt_serve.jobs.records import Kind

router = APIRouter(tags=["Jobs"], dependencies=[needs(Scope.JOBS), needs(Scope.INFERENCE)])
writing = APIRouter(route_class=JsonRoute)


@writing.post("/v1/jobs", status_code=202, response_model=JobObject, responses=errors(400, 401, 403, 413, 415, 429))
async def submit_job(body: JobRequest, state: State, caller: Caller) -> Response:
    """Run a request later; `Location` says where to look for it."""
    job = await create_job(
        state,
        caller,
        Kind.JOB,
        body.completion_window,
        endpoint=body.endpoint,
        body=body.body,
        metadata=body.metadata,
        webhook_url=body.webhook_url,
    )
    response = JobObject.of(job).response()
    response.status_code = 202
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return response


@router.get("/v1/jobs", response_model=JobList, responses=errors(400, 401, 403, 404))
async def list_jobs(state: State, caller: Caller, after: After = None, limit: Limit = 20) -> Response:
    """The caller's jobs, the newest first."""
    page = await find_page(state, Kind.JOB, caller.owner, after, limit)
    return JobList(data=[JobObject.of(job) for job in page.jobs], **page.envelope).response()


@router.get("/v1/jobs/{job_id}", response_model=JobObject, responses=errors(401, 403, 404))
async def get_job(job_id: str, state: State, caller: Caller) -> Response:
    """One job."""
    return JobObject.of(await find_job(state, Kind.JOB, caller.owner, job_id)).response()


@router.get(
    "/v1/jobs/{job_id}/result",
    responses=answer("The endpoint's answer.", "application/json") | errors(401, 403, 404, 409),
)
async def get_job_result(job_id: str, state: State, caller: Caller) -> Response:
    """What the endpoint answered, with its status; 409 while there is no answer."""
    job = await find_job(state, Kind.JOB, caller.owner, job_id)
    result = await state.jobs.store.result(job.id)
    if job.is_active or result is None:
        raise ApiError(409, f"The job is {job.state}: there is no result.", code=f"job_{job.state}")
    return Response(result.body, result.status_code, media_type="application/json")


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobObject, responses=errors(401, 403, 404, 409))
async def cancel_one_job(job_id: str, state: State, caller: Caller) -> Response:
    """End it without an answer."""
    return JobObject.of(await cancel_job(state, Kind.JOB, caller.owner, job_id)).response()


router.include_router(writing)

"""What batches and jobs share: finding the caller's own, pages, cancelling, admission."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query

from apt_serve.access.identity import Identity
from apt_serve.api.errors import ApiError
from apt_serve.api.schemas.jobs import window_s
from apt_serve.api.state import ApiState
from apt_serve.jobs.job_store import TooManyJobsError
from apt_serve.jobs.records import JobRecord, Kind, State, identity_columns
from apt_serve.telemetry.exchange import CURRENT

After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=100)]


@dataclass(frozen=True)
class Page:
    """Some of an owner's, the newest first."""

    jobs: list[JobRecord]
    has_more: bool

    @property
    def envelope(self) -> dict[str, Any]:
        """What OpenAI puts around a page."""
        first, last = (self.jobs[0].id, self.jobs[-1].id) if self.jobs else (None, None)
        return {"object": "list", "first_id": first, "last_id": last, "has_more": self.has_more}


async def create_job(
    state: ApiState, caller: Identity, kind: Kind, completion_window: str, **columns: Any
) -> JobRecord:
    """Keep a new one and let a worker know.

    Raises:
        ApiError: the caller has too many that have not finished.
        InvalidRequestError: its webhook could never be delivered.
    """
    state.jobs.webhooks.check(columns["webhook_url"])
    exchange = CURRENT.get()
    try:
        job = await state.jobs.store.create(
            kind,
            max_unfinished=state.config.jobs.max_unfinished,
            window_s=window_s(completion_window),
            owner=caller.owner,
            identity=identity_columns(caller, exchange.traceparent if exchange else None),
            completion_window=completion_window,
            **columns,
        )
    except TooManyJobsError as error:
        headers = {"Retry-After": "60"}
        raise ApiError(429, str(error), type="rate_limit_error", code="too_many_jobs", headers=headers) from None
    state.jobs.wake()
    return job


async def find_job(state: ApiState, kind: Kind, owner: str, job_id: str, param: str = "id") -> JobRecord:
    """One of the caller's; another's is as if it were not there.

    Raises:
        ApiError: there is none.
    """
    job = await state.jobs.store.get(kind, owner, job_id)
    if job is None:
        raise _no_job(kind, job_id, param)
    return job


async def find_page(state: ApiState, kind: Kind, owner: str, after: str | None, limit: int) -> Page:
    """Some of the caller's."""
    before = None if after is None else (await find_job(state, kind, owner, after, "after")).number
    found = await state.jobs.store.page(kind, owner, before=before, limit=limit + 1)
    return Page(found[:limit], len(found) > limit)


async def cancel_job(state: ApiState, kind: Kind, owner: str, job_id: str) -> JobRecord:
    """Ask for its end.

    Raises:
        ApiError: there is none, or it ends by itself.
    """
    job = await state.jobs.store.cancel(kind, owner, job_id)
    if job is None:
        raise _no_job(kind, job_id, "id")
    if job.state not in (State.CANCELLING, State.CANCELLED):
        raise ApiError(409, f"Cannot cancel a {kind} with status '{job.state}'.", code="not_cancellable")
    state.jobs.wake()
    return job


def _no_job(kind: Kind, job_id: str, param: str) -> ApiError:
    return ApiError(404, f"No {kind} found with id '{job_id}'.", param=param, code=f"{kind}_not_found")

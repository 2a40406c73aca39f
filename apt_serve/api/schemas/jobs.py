"""/v1/files, /v1/batches and /v1/jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from apt_serve.api.schemas.base import RequestSchema, ResponseSchema, example
from apt_serve.jobs.records import FileRecord, JobRecord, State

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
WebhookUrl = Annotated[str, Field(max_length=2048)]
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2592000
WINDOW = r"^[1-9][0-9]{0,3}[mh]$"


class ExpiresAfter(RequestSchema):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class BatchRequest(RequestSchema):
    """Run the lines of a file."""

    model_config = example(
        input_file_id="file-0123456789abcdef0123456789abcdef",
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )

    input_file_id: str = Field(max_length=64)
    endpoint: Endpoint
    completion_window: str = Field(pattern=WINDOW, description="Such as 24h or 30m; what has not run by then expires.")
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    webhook_url: WebhookUrl | None = Field(None, description="Gets a signed POST when the batch has ended (APT).")


class JobRequest(RequestSchema):
    """Run one request later."""

    model_config = example(
        endpoint="/v1/chat/completions", body={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    )

    endpoint: Endpoint
    body: dict[str, Any] = Field(description="What would be posted to the endpoint, without `stream`.")
    completion_window: str = Field("24h", pattern=WINDOW, description="A job that has not finished by then expires.")
    metadata: Metadata | None = None
    webhook_url: WebhookUrl | None = Field(None, description="Gets a signed POST when the job has ended.")


def window_s(window: str) -> float:
    """Seconds of a completion window."""
    return int(window[:-1]) * {"m": 60.0, "h": 3600.0}[window[-1]]


class FileObject(ResponseSchema):
    """A file, as OpenAI has it."""

    id: str
    object: str
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    """Always processed: nothing is done to a file."""

    @classmethod
    def of(cls, file: FileRecord) -> FileObject:
        """A file of the store."""
        return cls(
            id=file.id,
            object="file",
            bytes=file.bytes,
            created_at=int(file.created_at),
            expires_at=_seconds(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
            status="processed",
        )


class FileList(ResponseSchema):
    """A page of files."""

    object: str
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(ResponseSchema):
    """A file is gone."""

    id: str
    object: str
    deleted: bool


class JobProblem(ResponseSchema):
    """Why no line of it ran."""

    code: str
    message: str
    param: str | None
    line: int | None
    """In the input file, from 1."""


class JobProblems(ResponseSchema):
    """The first hundred."""

    object: str
    data: list[JobProblem]


class RequestCounts(ResponseSchema):
    """Lines of a batch; those neither completed nor failed have not run."""

    total: int
    completed: int
    failed: int


class BatchObject(ResponseSchema):
    """A batch, as OpenAI has it."""

    id: str
    object: str
    endpoint: str
    errors: JobProblems | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, job: JobRecord) -> BatchObject:
        """A batch of the store."""
        assert job.input_file_id is not None
        return cls(
            object="batch",
            input_file_id=job.input_file_id,
            status=job.state,
            output_file_id=job.output_file_id,
            error_file_id=job.error_file_id,
            finalizing_at=_seconds(job.finalizing_at),
            request_counts=RequestCounts(total=job.total, completed=job.completed, failed=job.failed),
            **_shared(job),
        )


class BatchList(ResponseSchema):
    """A page of batches, the newest first."""

    object: str
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobObject(ResponseSchema):
    """A job: a batch of one line, whose answer is read at its result."""

    id: str
    object: str
    endpoint: str
    status: str
    """queued, in_progress, completed, failed, expired, cancelling or cancelled."""
    completion_window: str
    created_at: int
    in_progress_at: int | None
    expires_at: int
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    errors: JobProblems | None
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, job: JobRecord) -> JobObject:
        """A job of the store."""
        names = {State.VALIDATING: "queued", State.FINALIZING: "in_progress"}
        return cls(object="job", status=names.get(job.state, job.state), **_shared(job))


class JobList(ResponseSchema):
    """A page of jobs, the newest first."""

    object: str
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _shared(job: JobRecord) -> dict[str, Any]:
    problems = job.errors and JobProblems(object="list", data=[JobProblem(**each) for each in job.errors])
    stamps = ("in_progress_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")
    return {
        "id": job.id,
        "endpoint": job.endpoint,
        "completion_window": job.completion_window,
        "created_at": int(job.created_at),
        "expires_at": int(job.expires_at),
        "errors": problems,
        "metadata": job.metadata,
        **{name: _seconds(getattr(job, name)) for name in stamps},
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)

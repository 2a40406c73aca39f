"""What a job, a line's result and a file are, and the tables that keep them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Index, Integer, String, Table, Text

from apt_serve.access.identity import Identity, Scope
from apt_serve.records.database import METADATA


class Kind(StrEnum):
    """What a client asked for. A job is run as a batch of one line."""

    BATCH = "batch"
    JOB = "job"


class State(StrEnum):
    """OpenAI's states of a batch; those of a job are the same."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ACTIVE = (State.VALIDATING, State.IN_PROGRESS, State.FINALIZING, State.CANCELLING)
"""Those that a worker has still to do something about."""
STAMPED = tuple(state for state in State if state is not State.VALIDATING)
"""Each has a column that says when it was entered."""

_BIG = BigInteger().with_variant(Integer, "sqlite")  # what SQLite counts up by itself

JOBS = Table(
    "apt_jobs",
    METADATA,
    Column("number", _BIG, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("identity", JSON, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("body", JSON),
    Column("input_file_id", String(64)),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("completion_window", String(16), nullable=False),
    Column("output_expires_s", Double),
    Column("metadata", JSON),
    Column("errors", JSON),
    Column("state", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    *(Column(f"{state}_at", Double) for state in STAMPED),
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),
    Column("failed", Integer, nullable=False, default=0),
    # The lease: who runs it, until when, and how often it has been taken. The last is the fence of every write.
    Column("attempt", Integer, nullable=False, default=0),
    Column("lease_until", Double, nullable=False, default=0.0),
    Column("fruitless", Integer, nullable=False, default=0),
    Column("enqueued_at", Double, nullable=False, default=0.0),
    Column("webhook_url", Text),
    Column("webhook_due", Double),
    Column("webhook_attempts", Integer, nullable=False, default=0),
)
Index("apt_jobs_by_state", JOBS.c.state, JOBS.c.lease_until)
Index("apt_jobs_by_owner", JOBS.c.owner, JOBS.c.kind, JOBS.c.number)
Index("apt_jobs_by_webhook", JOBS.c.webhook_due)

RESULTS = Table(
    "apt_job_results",
    METADATA,
    Column("job_id", String(64), ForeignKey("apt_jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", Text, nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("status_code", Integer, nullable=False),
    Column("body", Text, nullable=False),
)

FILES = Table(
    "apt_files",
    METADATA,
    Column("number", _BIG, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
)
Index("apt_files_by_owner", FILES.c.owner, FILES.c.number)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A row of JOBS, as it was when it was read. Times are Unix seconds."""

    number: int
    id: str
    owner: str
    kind: Kind
    identity: dict[str, Any]
    endpoint: str
    body: dict[str, Any] | None
    """Of a job's one request."""
    input_file_id: str | None
    """Of a batch."""
    output_file_id: str | None
    error_file_id: str | None
    completion_window: str
    output_expires_s: float | None
    metadata: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    """Why it failed: code, message, param and line."""
    state: State
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    total: int
    completed: int
    failed: int
    attempt: int
    lease_until: float
    fruitless: int
    """Times it was taken since a result was last written."""
    enqueued_at: float
    webhook_url: str | None
    webhook_due: float | None
    webhook_attempts: int

    @classmethod
    def of(cls, row: Any) -> JobRecord:
        """A row as SQLAlchemy gives it."""
        values = {field.name: row[field.name] for field in fields(cls)}
        return cls(**values | {"kind": Kind(row["kind"]), "state": State(row["state"])})

    @property
    def is_active(self) -> bool:
        """Whether there is still something to do."""
        return self.state in ACTIVE

    @property
    def trace_headers(self) -> dict[str, str]:
        """What continues the trace of its submission (W3C Trace Context); empty where that was not traced."""
        traceparent = self.identity.get("traceparent")
        return {} if traceparent is None else {"traceparent": traceparent}

    @property
    def caller(self) -> Identity:
        """Whom its requests are for: the owner, whatever has become of the key or token that it was accepted with."""
        models = self.identity["models"]
        return Identity(
            self.owner,
            frozenset({Scope.INFERENCE}),
            models=None if models is None else frozenset(models),
            tenant_class=self.identity["tenant_class"],
            is_job=True,
        )


def identity_columns(caller: Identity, traceparent: str | None) -> dict[str, Any]:
    """What a job remembers of its caller, and of the trace of the request that it was submitted by."""
    models = None if caller.models is None else sorted(caller.models)
    trace = {} if traceparent is None else {"traceparent": traceparent}
    return {"models": models, "tenant_class": caller.tenant_class} | trace


@dataclass(frozen=True, slots=True)
class LineResult:
    """What became of one line: an answer of the endpoint's, a success or an error."""

    line: int
    custom_id: str
    request_id: str
    status_code: int
    body: str
    """JSON."""

    @property
    def is_success(self) -> bool:
        """Whether it goes into the output file."""
        return self.status_code < 400


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A row of FILES."""

    id: str
    owner: str
    filename: str
    """As the client named it: shown to clients, never used as a path."""
    purpose: str
    bytes: int
    created_at: float
    expires_at: float | None

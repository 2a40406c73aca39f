"""The job table: the truth about every batch and job, whoever runs them.

A worker takes a job by compare-and-set, which counts ``attempt`` up, and names that number in every write: once another
has taken the job, what the first one writes is refused. A line's result is kept once, the first that comes.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from apt_core.errors import AptError
from apt_serve.jobs.records import ACTIVE, FILES, JOBS, RESULTS, FileRecord, JobRecord, Kind, LineResult, State
from apt_serve.records.database import Database, upserting

_RESULTS_AT_A_TIME = 256
_JOB_ID = re.compile(r"(batch|job)_[0-9a-f]{32}")
_PREFIXES = {Kind.BATCH: "batch_", Kind.JOB: "job_"}


class LeaseLostError(AptError):
    """Another worker has taken the job; whatever this one still does for it is void."""


class TooManyJobsError(AptError):
    """An owner has as many unfinished ones as it may."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in the hands of a worker."""

    job: JobRecord
    """As it was when it was taken."""
    attempt: int
    """The fence."""


class JobStore:
    """All statements on jobs and results. Every method is one transaction."""

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database = database
        self._lease_s = lease_s

    async def create(self, kind: Kind, *, max_unfinished: int, window_s: float, **columns: Any) -> JobRecord:
        """Keep a new one.

        Raises:
            TooManyJobsError: the owner has ``max_unfinished`` already.
        """
        now, job_id = time.time(), _PREFIXES[kind] + uuid.uuid4().hex
        row = {"id": job_id, "kind": kind, "state": State.VALIDATING, "created_at": now, "expires_at": now + window_s}
        unfinished = select(func.count()).where(JOBS.c.owner == columns["owner"], JOBS.c.state.in_(ACTIVE))
        async with self._database.begin(alone=f"jobs of {columns['owner']}") as connection:
            await connection.execute(insert(JOBS).values(**row, **columns))
            if (await connection.execute(unfinished)).scalar_one() > max_unfinished:
                raise TooManyJobsError(f"You have {max_unfinished} batches and jobs that have not finished.")
            found = await _one(connection, JOBS.c.id == job_id)
        assert found is not None
        return found

    async def get(self, kind: Kind, owner: str, job_id: str) -> JobRecord | None:
        """One of an owner's."""
        if not _JOB_ID.fullmatch(job_id):
            return None
        async with self._database.begin() as connection:
            return await _one(connection, JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.kind == kind)

    async def page(self, kind: Kind, owner: str, *, before: int | None, limit: int) -> list[JobRecord]:
        """An owner's, the newest first, from below a number on."""
        query = select(JOBS).where(JOBS.c.owner == owner, JOBS.c.kind == kind)
        if before is not None:
            query = query.where(JOBS.c.number < before)
        async with self._database.begin() as connection:
            rows = await connection.execute(query.order_by(JOBS.c.number.desc()).limit(limit))
            return [JobRecord.of(row) for row in rows.mappings()]

    async def cancel(self, kind: Kind, owner: str, job_id: str) -> JobRecord | None:
        """Ask for an end. One that is being finalized or has ended stays as it is; None if there is none."""
        if not _JOB_ID.fullmatch(job_id):
            return None
        mine = (JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.kind == kind)
        now = time.time()
        async with self._database.begin() as connection:
            change = update(JOBS).where(*mine, JOBS.c.state.in_((State.VALIDATING, State.IN_PROGRESS)))
            await connection.execute(change.values(state=State.CANCELLING, cancelling_at=now))
            return await _one(connection, *mine)

    async def claim(self, job_id: str | None = None) -> Claim | None:
        """Take the oldest job that nobody holds, or the named one unless somebody does."""
        now = time.time()
        free = and_(JOBS.c.state.in_(ACTIVE), JOBS.c.lease_until < now)
        wanted = free if job_id is None else and_(free, JOBS.c.id == job_id)
        async with self._database.begin() as connection:
            query = select(JOBS.c.id, JOBS.c.attempt).where(wanted).order_by(JOBS.c.number).limit(1)
            found = (await connection.execute(query)).first()
        if found is None:
            return None
        async with self._database.begin() as connection:
            change = update(JOBS).where(JOBS.c.id == found.id, JOBS.c.attempt == found.attempt, free)
            values = {"lease_until": now + self._lease_s, "attempt": found.attempt + 1}
            taken = await connection.execute(change.values(**values, fruitless=JOBS.c.fruitless + 1))
            job = await _one(connection, JOBS.c.id == found.id) if taken.rowcount else None
        return None if job is None else Claim(job, job.attempt)

    async def renew(self, claim: Claim) -> State:
        """Hold on to a job; the state it is in by now.

        Raises:
            LeaseLostError: another worker has taken it. So do all that follow.
        """
        async with self._database.begin() as connection:
            await _write(connection, claim, lease_until=time.time() + self._lease_s)
            state = await connection.execute(select(JOBS.c.state).where(JOBS.c.id == claim.job.id))
            return State(state.scalar_one())

    async def release(self, claim: Claim) -> None:
        """Let another worker take it at once; it is not to blame for this one's end."""
        async with self._database.begin() as connection:
            await _write(connection, claim, lease_until=0.0, enqueued_at=0.0, fruitless=JOBS.c.fruitless - 1)

    async def begin(self, claim: Claim, total: int) -> None:
        """Its lines are sound and there are so many."""
        async with self._database.begin() as connection:
            await _write(connection, claim, total=total)
            is_new = and_(JOBS.c.id == claim.job.id, JOBS.c.state == State.VALIDATING)
            values = {"state": State.IN_PROGRESS, "in_progress_at": time.time()}
            await connection.execute(update(JOBS).where(is_new).values(**values))

    async def record(self, claim: Claim, results: Sequence[LineResult]) -> None:
        """Keep the results of lines, except of those that have one already."""
        async with self._database.begin() as connection:
            new = {True: 0, False: 0}
            keep = upserting(connection, RESULTS).on_conflict_do_nothing().returning(RESULTS.c.job_id)
            for result in results:
                row = {"job_id": claim.job.id, **asdict(result)}
                new[result.is_success] += (await connection.execute(keep, row)).first() is not None
            counts = {"completed": JOBS.c.completed + new[True], "failed": JOBS.c.failed + new[False]}
            await _write(connection, claim, **counts, fruitless=0)

    async def recorded_lines(self, job_id: str) -> set[int]:
        """Numbers of the lines that have a result."""
        async with self._database.begin() as connection:
            rows = await connection.execute(select(RESULTS.c.line).where(RESULTS.c.job_id == job_id))
            return set(rows.scalars())

    async def results(self, job_id: str) -> AsyncIterator[list[LineResult]]:
        """All results by line, some at a time."""
        last = -1
        while True:
            query = select(RESULTS).where(RESULTS.c.job_id == job_id, RESULTS.c.line > last)
            async with self._database.begin() as connection:
                rows = await connection.execute(query.order_by(RESULTS.c.line).limit(_RESULTS_AT_A_TIME))
                found = [LineResult(*row[1:]) for row in rows]
            if not found:
                return
            yield found
            last = found[-1].line

    async def finalize(self, claim: Claim) -> None:
        """No further line will run; one that was cancelled meanwhile is cancelled."""
        async with self._database.begin() as connection:
            await _write(connection, claim, fruitless=0)
            runs = and_(JOBS.c.id == claim.job.id, JOBS.c.state == State.IN_PROGRESS)
            values = {"state": State.FINALIZING, "finalizing_at": time.time()}
            await connection.execute(update(JOBS).where(runs).values(**values))

    async def finish(
        self,
        claim: Claim,
        ending: State,
        *,
        output: FileRecord | None = None,
        errors_file: FileRecord | None = None,
        errors: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Its end, with its files, all at once. A batch's results are in its files from now on."""
        now = time.time()
        async with self._database.begin() as connection:
            values: dict[str, Any] = {"state": ending, f"{ending}_at": now, "lease_until": 0.0}
            values |= {"output_file_id": output and output.id, "error_file_id": errors_file and errors_file.id}
            due = now if claim.job.webhook_url else None
            await _write(connection, claim, **values, errors=errors and list(errors), webhook_due=due)
            for file in (output, errors_file):
                if file is not None:
                    await connection.execute(insert(FILES).values(**asdict(file)))
            if claim.job.kind is Kind.BATCH:
                await connection.execute(delete(RESULTS).where(RESULTS.c.job_id == claim.job.id))

    async def result(self, job_id: str) -> LineResult | None:
        """Of a job's one line."""
        async for found in self.results(job_id):
            return found[0]
        return None

    async def reads(self, file_id: str) -> bool:
        """Whether one that has not finished reads a file."""
        query = select(func.count()).where(JOBS.c.input_file_id == file_id, JOBS.c.state.in_(ACTIVE))
        async with self._database.begin() as connection:
            return bool((await connection.execute(query)).scalar_one())

    async def to_enqueue(self, older_than: float) -> list[str]:
        """Ids of jobs that nobody holds and that were last enqueued before a time; each is given to one asker."""
        now = time.time()
        lost = and_(JOBS.c.state.in_(ACTIVE), JOBS.c.lease_until < now, JOBS.c.enqueued_at < older_than)
        async with self._database.begin() as connection:
            found = list((await connection.execute(select(JOBS.c.id).where(lost).order_by(JOBS.c.number))).scalars())
        mine = []
        for job_id in found:
            async with self._database.begin() as connection:
                change = update(JOBS).where(JOBS.c.id == job_id, lost).values(enqueued_at=now)
                if (await connection.execute(change)).rowcount:
                    mine.append(job_id)
        return mine

    async def not_enqueued(self, job_id: str) -> None:
        """Nobody took it: it is to be enqueued as soon as somebody does."""
        async with self._database.begin() as connection:
            await connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(enqueued_at=0.0))

    async def claim_webhook(self, lease_s: float) -> JobRecord | None:
        """One whose webhook is due, for one asker; due again after ``lease_s`` unless ``webhook_tried`` says when."""
        now = time.time()
        async with self._database.begin() as connection:
            query = select(JOBS).where(JOBS.c.webhook_due <= now).order_by(JOBS.c.webhook_due).limit(1)
            row = (await connection.execute(query)).mappings().first()
        if row is None:
            return None
        job = JobRecord.of(row)
        async with self._database.begin() as connection:
            change = update(JOBS).where(JOBS.c.id == job.id, JOBS.c.webhook_attempts == job.webhook_attempts)
            values = {"webhook_attempts": job.webhook_attempts + 1, "webhook_due": now + lease_s}
            taken = await connection.execute(change.values(**values))
        return job if taken.rowcount else None

    async def webhook_tried(self, job_id: str, next_try: float | None) -> None:
        """When it is due again; None: never."""
        async with self._database.begin() as connection:
            await connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(webhook_due=next_try))

    async def forget(self, before: float) -> None:
        """Delete what finished before a time."""
        ended = or_(*(JOBS.c[f"{state}_at"] < before for state in State if state not in ACTIVE))
        old = select(JOBS.c.id).where(JOBS.c.state.not_in(ACTIVE), ended)
        async with self._database.begin() as connection:
            await connection.execute(delete(RESULTS).where(RESULTS.c.job_id.in_(old)))
            await connection.execute(delete(JOBS).where(JOBS.c.state.not_in(ACTIVE), ended))


async def _one(connection: AsyncConnection, *conditions: ColumnElement[bool]) -> JobRecord | None:
    row = (await connection.execute(select(JOBS).where(*conditions))).mappings().first()
    return None if row is None else JobRecord.of(row)


async def _write(connection: AsyncConnection, claim: Claim, **values: Any) -> None:
    """Change a job in the name of who holds it; what else is in the transaction stands and falls with it."""
    held = (JOBS.c.id == claim.job.id, JOBS.c.attempt == claim.attempt, JOBS.c.state.in_(ACTIVE))
    if not (await connection.execute(update(JOBS).where(*held).values(**values))).rowcount:
        raise LeaseLostError(f"{claim.job.id} is no longer held by attempt {claim.attempt}")

"""A worker: takes a job, runs its lines, and writes its end, whatever was done of it before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import asdict

from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.file_store import FileStore
from apt_serve.jobs.job_store import Claim, JobStore, LeaseLostError
from apt_serve.jobs.lines import Line, Problem, find_problems, read_lines
from apt_serve.jobs.output import OutputFiles
from apt_serve.jobs.records import JobRecord, Kind, LineResult, State
from apt_serve.jobs.runner import LineRunner
from apt_serve.records.database import RecordsError

logger = logging.getLogger(__name__)

MAX_FRUITLESS = 10
"""After workers took a job so often without any result, no line of it is run again: it seems to kill them."""


class Worker:
    """Runs one job at a time and any number of them one after another or beside each other."""

    def __init__(self, config: JobsConfig, store: JobStore, files: FileStore, runner: LineRunner) -> None:
        self._config = config
        self._store = store
        self._files = files
        self._runner = runner

    async def run_next(self, job_id: str | None = None) -> bool:
        """Run the oldest job that nobody holds, or the named one; False if there is none.

        Cancelled, it gives the job back.
        """
        claim = await self._store.claim(job_id)
        if claim is None:
            return False
        try:
            await self._run(claim)
        except LeaseLostError as error:
            logger.warning("%s", error)
        except asyncio.CancelledError:
            with suppress(LeaseLostError, RecordsError):
                await asyncio.shield(self._store.release(claim))
            raise
        except Exception:  # its lease runs out, and it is tried again
            logger.exception("%s: attempt %d broke off", claim.job.id, claim.attempt)
        return True

    async def _run(self, claim: Claim) -> None:
        job = claim.job
        is_deadly = job.fruitless > MAX_FRUITLESS
        if job.state is State.VALIDATING:
            if is_deadly:
                await self._store.finish(claim, State.FAILED, errors=[_LOST])
                return
            if not await self._is_sound(claim):
                return
        if not is_deadly and not self._is_over(job, await self._store.renew(claim)):
            await self._while_held(claim, self._run_lines(claim), ends_early=True)
        await self._store.finalize(claim)
        await self._while_held(claim, self._finish(claim), ends_early=False)

    async def _is_sound(self, claim: Claim) -> bool:
        """Whether its lines may run; if not, it has failed."""
        job, total = claim.job, 1
        if job.kind is Kind.BATCH:
            assert job.input_file_id is not None
            path = self._files.path(job.input_file_id)
            if not path.is_file():
                await self._store.finish(claim, State.FAILED, errors=[_problem("no_input_file", "It is gone.")])
                return False
            total, problems = await asyncio.to_thread(find_problems, path, job.endpoint, self._config.max_lines)
            if problems:
                await self._store.finish(claim, State.FAILED, errors=problems)
                return False
        await self._store.begin(claim, total)
        return True

    async def _while_held(self, claim: Claim, work: Coroutine[None, None, None], *, ends_early: bool) -> None:
        """Do something with the job for as long as it is ours and, if it ``ends_early``, still wanted."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=self._config.poll_s))[0]:
                state = await self._store.renew(claim)
                if ends_early and self._is_over(claim.job, state):
                    return
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _is_over(self, job: JobRecord, state: State) -> bool:
        """Whether no further line should run."""
        return state not in (State.VALIDATING, State.IN_PROGRESS) or time.time() >= job.expires_at

    async def _run_lines(self, claim: Claim) -> None:
        done = await self._store.recorded_lines(claim.job.id)
        slots, results = asyncio.Semaphore(self._config.concurrency), _Results(claim, self._store)

        async def run(line: Line) -> None:
            try:
                await results.keep(await self._runner.run(claim.job, line))
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as group:
                for line in self._lines(claim.job):
                    if line.number not in done:
                        await slots.acquire()
                        group.create_task(run(line))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _lines(self, job: JobRecord) -> Iterable[Line]:
        if job.input_file_id is not None:
            return read_lines(self._files.path(job.input_file_id), job.endpoint)
        assert job.body is not None
        return [Line(0, job.id, job.body)]

    async def _finish(self, claim: Claim) -> None:
        job = await self._store.get(claim.job.kind, claim.job.owner, claim.job.id)
        assert job is not None
        ending = _ending(job)
        errors = [_LOST] if ending is State.FAILED and job.completed + job.failed < job.total else None
        if job.kind is Kind.JOB:
            await self._store.finish(claim, ending, errors=errors)
            return
        output = OutputFiles(job, self._store, self._files, self._config.retention_s)
        try:
            answers, failures = await output.write(ending)
            await self._store.finish(claim, ending, output=answers, errors_file=failures, errors=errors)
        except LeaseLostError:  # after any other failure they may be the batch's
            output.discard()
            raise


class _Results:
    """Results on their way into the table: all that have come meanwhile go in one transaction."""

    def __init__(self, claim: Claim, store: JobStore) -> None:
        self._claim = claim
        self._store = store
        self._pending: list[LineResult] = []
        self._writing = asyncio.Lock()

    async def keep(self, result: LineResult) -> None:
        """Returns when it is in the table."""
        self._pending.append(result)
        async with self._writing:
            pending, self._pending = self._pending, []
            if pending:
                await self._store.record(self._claim, pending)


def _ending(job: JobRecord) -> State:
    if job.kind is Kind.JOB and job.failed:
        return State.FAILED
    if job.state is State.CANCELLING:
        return State.CANCELLED
    if job.completed + job.failed == job.total:
        return State.COMPLETED
    return State.EXPIRED if time.time() >= job.expires_at else State.FAILED


def _problem(code: str, message: str) -> dict[str, object]:
    return asdict(Problem(code, message, None, None))


_LOST = _problem("worker_lost", f"Workers that took it ended {MAX_FRUITLESS} times in a row before any result.")

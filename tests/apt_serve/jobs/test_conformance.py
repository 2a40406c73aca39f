"""What holds whoever runs the jobs: the server's own workers, or Celery's with a real Redis."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Executable, NullPool, create_engine, select, update

from apt_serve.jobs.celery_app import make_celery, send
from apt_serve.jobs.job_store import Claim, JobStore, LeaseLostError
from apt_serve.jobs.records import JOBS, Kind, LineResult, State
from apt_serve.records.database import Database
from tests.apt_serve.jobs.stack import REDIS, Stack
from tests.apt_serve.records.postgres import needs_postgres

needs_redis = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed")
COMPOSE = pytest.param("compose", marks=[needs_redis, needs_postgres])
DRIVERS = ["embedded", pytest.param("celery", marks=needs_redis), COMPOSE]


@pytest.fixture(scope="module", params=DRIVERS)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    url = request.getfixturevalue("postgres").new_database() if request.param == "compose" else None
    folder = tmp_path_factory.mktemp(request.param)
    with Stack(request.param, folder, token_delay_s=0.01, records_url=url) as found:
        yield found


def execute(stack: Stack, statement: Executable) -> list[Any]:
    """In the database, behind everybody's back; the rows, if it has any."""
    engine = create_engine(stack.records.database_url.replace("+aiosqlite", ""), poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(statement)
        return list(result) if result.returns_rows else []


def row(stack: Stack, job_id: str) -> Any:
    """All that is kept of a job."""
    [found] = execute(stack, select(JOBS).where(JOBS.c.id == job_id))
    return found


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_every_line_is_answered_once_and_in_order(stack: Stack) -> None:
    batch = stack.ended(stack.submit(30))
    assert batch["status"] == "completed", stack.logs()
    assert stack.custom_ids(batch["output_file_id"]) == names(30)
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}


async def claim(stack: Stack, job_id: str) -> Claim | None:
    """As a second replica would."""
    database = Database(stack.records)
    try:
        return await JobStore(database, stack.jobs.lease_s).claim(job_id)
    finally:
        await database.close()


def test_a_job_that_is_handed_out_again_and_again_runs_once(stack: Stack) -> None:
    batch_id = stack.submit(20)
    stack.wait_until(lambda: stack.batch(batch_id)["status"] != "validating")
    for _ in range(10):
        if stack.driver != "embedded":
            send(make_celery(stack.jobs), batch_id)
        else:
            assert asyncio.run(claim(stack, batch_id)) is None
    batch = stack.ended(batch_id)
    assert stack.custom_ids(batch["output_file_id"]) == names(20)
    assert row(stack, batch_id).attempt == 1


async def taken(stack: Stack) -> tuple[JobStore, Claim]:
    """A job in the hands of a worker that says nothing more, and the table."""
    store = stack.store()
    while True:
        columns = {"owner": stack.owner, "identity": {"models": None, "tenant_class": "default"}}
        body = {"prompt": "x", "max_tokens": 4}
        job = await store.create(
            Kind.JOB,
            max_unfinished=100,
            window_s=600,
            endpoint="/v1/completions",
            body=body,
            completion_window="10m",
            **columns,
        )
        claim = await store.claim(job.id)
        if claim is not None:
            return store, claim


def test_what_a_silent_worker_holds_is_taken_up_and_its_late_writes_are_refused(stack: Stack) -> None:
    async def check() -> None:
        store, claim = await taken(stack)
        began = time.time()
        await store.begin(claim, 1)
        while (job := await store.get(Kind.JOB, stack.owner, claim.job.id)).state is not State.COMPLETED:
            assert time.time() < began + 60, stack.logs()
            await asyncio.sleep(0.05)
        assert job.attempt == 2
        assert job.completed_at >= claim.job.lease_until
        late = LineResult(0, job.id, "late", 200, '{"late": true}')
        for write in (store.record(claim, [late]), store.renew(claim), store.finish(claim, State.FAILED)):
            with pytest.raises(LeaseLostError):
                await write
        assert (await store.get(Kind.JOB, stack.owner, job.id)).completed == 1
        assert "late" not in (await store.result(job.id)).body
        await store._database.close()

    asyncio.run(check())


def test_cancelled_it_ends_with_what_was_done(stack: Stack) -> None:
    batch_id = stack.submit(300)
    stack.wait_until(lambda: stack.batch(batch_id)["request_counts"]["completed"] > 4)
    assert stack.http.post(f"/v1/batches/{batch_id}/cancel").json()["status"] == "cancelling"
    batch = stack.ended(batch_id)
    done, left = (stack.custom_ids(batch[f"{kind}_file_id"]) for kind in ("output", "error"))
    assert batch["status"] == "cancelled"
    assert len(done) >= 4 and len(left) > 0
    assert sorted(done + left, key=int) == names(300)


def test_expired_it_ends_with_what_was_done(stack: Stack) -> None:
    """Its time is up when another worker takes it, as one reads the time when it takes it."""
    batch_id = stack.submit(300)
    stack.wait_until(lambda: stack.batch(batch_id)["request_counts"]["completed"] > 4)
    change = update(JOBS).where(JOBS.c.id == batch_id)
    execute(stack, change.values(expires_at=1, attempt=JOBS.c.attempt + 1, lease_until=0, enqueued_at=0))
    batch = stack.ended(batch_id)
    done, left = (stack.custom_ids(batch[f"{kind}_file_id"]) for kind in ("output", "error"))
    assert batch["status"] == "expired"
    assert len(done) >= 4 and len(left) > 0
    assert sorted(done + left, key=int) == names(300)


def test_a_worker_that_is_told_to_stop_gives_its_jobs_back(stack: Stack) -> None:
    """At once: the next one does not wait for the lease."""
    name = stack.names[-1]
    batch_id = stack.submit(100)
    stack.wait_until(lambda: stack.batch(batch_id)["request_counts"]["completed"] > 4)
    stack.kill(name, signal.SIGTERM)
    found = row(stack, batch_id)
    stack.start(name)
    assert (found.lease_until, found.state) == (0.0, "in_progress")
    batch = stack.ended(batch_id)
    assert stack.custom_ids(batch["output_file_id"]) == names(100)


@pytest.mark.parametrize("stack", [COMPOSE], indirect=True)
def test_lines_wait_for_a_worker_that_the_server_knows(stack: Stack) -> None:
    """A worker with another pepper is nothing that the owner of a batch has to do with."""
    stack.kill("worker")
    stack.start("worker", APT_KEY_PEPPER="another pepper, which has as many bytes as it must")
    batch_id = stack.submit(3)
    stack.wait_until(lambda: f"{batch_id} waits: the server does not know this worker" in stack.logs())
    assert stack.batch(batch_id)["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    stack.kill("worker", signal.SIGTERM)
    stack.start("worker")
    batch = stack.ended(batch_id)
    assert stack.custom_ids(batch["output_file_id"]) == names(3)

"""One worker on the job table: lines that end it, and files that run out while it works."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import func, select, update

from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.file_store import FileStore
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.lines import Line
from apt_serve.jobs.records import FILES, RESULTS, JobRecord, Kind, LineResult, State
from apt_serve.jobs.worker import MAX_FRUITLESS, Worker
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database
from tests.apt_serve.jobs.conftest import line

CONFIG = JobsConfig(lease_s=0.03, poll_s=0.01, concurrency=8)
DEADLY = "deadly"


class Runner:
    """Answers lines with their names; one of them, and a job, breaks the worker off once all others are answered."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.num_others = 0
        self.num_deaths = 0

    async def run(self, job: JobRecord, line: Line) -> LineResult:
        if job.kind is Kind.JOB or line.custom_id == DEADLY:
            while await self._room.num_results() < self.num_others:
                await asyncio.sleep(0.01)
            self.num_deaths += 1
            raise MemoryError(f"attempt {job.attempt}")
        return LineResult(line.number, line.custom_id, f"req-{line.number}", 200, json.dumps({"text": line.custom_id}))

    async def close(self) -> None:
        pass


class Room:
    """A table, a folder, and a worker."""

    def __init__(self, records: RecordsConfig) -> None:
        self.database = Database(records)
        self.store = JobStore(self.database, CONFIG.lease_s)
        self.files = FileStore(self.database, records)
        self.runner = Runner(self)
        self.worker = Worker(CONFIG, self.store, self.files, self.runner)

    async def submit(self, kind: Kind, *names: str) -> JobRecord:
        """A batch with lines of these names, or a job."""
        columns: dict[str, Any] = {"body": {}}
        if kind is Kind.BATCH:
            data = io.BytesIO("\n".join(json.dumps(line(name)) for name in names).encode())
            file = await self.files.add("alice", "in.jsonl", "batch", data, expires_s=3600, max_stored_bytes=10**6)
            columns = {"input_file_id": file.id}
        columns |= {"endpoint": "/v1/completions", "completion_window": "10m", "owner": "alice"}
        columns["identity"] = {"models": None, "tenant_class": "default"}
        return await self.store.create(kind, max_unfinished=9, window_s=600, **columns)

    async def now(self, job: JobRecord) -> JobRecord:
        """What has become of it."""
        found = await self.store.get(job.kind, job.owner, job.id)
        assert found is not None
        return found

    async def num_results(self) -> int:
        async with self.database.begin() as connection:
            return int((await connection.execute(select(func.count()).select_from(RESULTS))).scalar_one())

    async def run_to_the_end(self, job: JobRecord) -> JobRecord:
        """As workers do one after another."""
        async with asyncio.timeout(60):
            while (await self.now(job)).is_active:
                if not await self.worker.run_next():
                    await asyncio.sleep(0.01)
        return await self.now(job)

    def lines_of(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(each) for each in self.files.path(file_id).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
async def room(records: RecordsConfig) -> AsyncIterator[Room]:
    found = Room(records)
    yield found
    await found.database.close()


async def test_a_line_that_ends_every_worker_takes_no_other_with_it(room: Room) -> None:
    room.runner.num_others = 2
    batch = await room.run_to_the_end(await room.submit(Kind.BATCH, "a", DEADLY, "b"))
    assert batch.state is State.FAILED
    assert batch.errors is not None and [error["code"] for error in batch.errors] == ["worker_lost"]
    assert [each["custom_id"] for each in room.lines_of(batch.output_file_id)] == ["a", "b"]
    [missing] = room.lines_of(batch.error_file_id)
    assert (missing["custom_id"], missing["error"]["code"]) == (DEADLY, "worker_lost")
    assert room.runner.num_deaths == 1 + MAX_FRUITLESS


async def test_a_job_that_ends_every_worker_fails(room: Room) -> None:
    job = await room.run_to_the_end(await room.submit(Kind.JOB))
    assert job.state is State.FAILED
    assert job.errors is not None and [error["code"] for error in job.errors] == ["worker_lost"]
    assert room.runner.num_deaths == MAX_FRUITLESS


async def test_a_job_that_is_given_back_is_not_to_blame(room: Room) -> None:
    job = await room.submit(Kind.JOB)
    for _ in range(2 * MAX_FRUITLESS):
        claim = await room.store.claim()
        assert claim is not None and claim.job.fruitless == 1
        await room.store.release(claim)
    assert (await room.now(job)).is_active


async def test_the_input_of_a_batch_stays_until_it_has_ended_though_it_expires(room: Room) -> None:
    batch = await room.submit(Kind.BATCH, "a", "b")
    assert batch.input_file_id is not None
    path = room.files.path(batch.input_file_id)
    os.utime(path, (0, 0))
    async with room.database.begin() as connection:
        await connection.execute(update(FILES).values(expires_at=1.0))
    await room.files.sweep()
    assert (await room.run_to_the_end(batch)).state is State.COMPLETED
    await room.files.sweep()
    assert not path.exists()


async def test_of_many_files_those_without_a_record_are_swept(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_serve.jobs.file_store._NAMES_AT_A_TIME", 2)
    kept = {(await room.submit(Kind.BATCH, name)).input_file_id for name in "abcde"}
    folder = room.files.path("file-" + "0" * 32).parent
    for number in range(5):
        (folder / f"file-{number:032x}").write_bytes(b"nobody's")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    await room.files.sweep()
    assert {path.name for path in folder.iterdir()} == kept

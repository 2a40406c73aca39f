"""The files that a batch ends with: answers in one, errors in the other, both in the order of the input."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from pydantic_core import from_json, to_json

from apt_serve.jobs.file_store import FileStore, new_file_id
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.lines import Line, read_lines
from apt_serve.jobs.records import FileRecord, JobRecord, LineResult, State

_REASONS = {
    State.EXPIRED: ("batch_expired", "This request was not executed before the completion window expired."),
    State.CANCELLED: ("batch_cancelled", "This request was not executed before the batch was cancelled."),
    State.FAILED: ("worker_lost", "This request was not executed before workers had ended too often."),
}


class OutputFiles:
    """Two files in the making; they are somebody's once ``JobStore.finish`` has their records."""

    def __init__(self, job: JobRecord, store: JobStore, files: FileStore, retention_s: float) -> None:
        self._job = job
        self._store = store
        self._files = files
        self._expires_s = job.output_expires_s or retention_s
        self._ids = {True: new_file_id(), False: new_file_id()}

    async def write(self, ending: State) -> tuple[FileRecord | None, FileRecord | None]:
        """Output and errors; None for one without lines."""
        with ExitStack() as stack:
            parts = {
                is_success: stack.enter_context(self._files.writing(name)) for is_success, name in self._ids.items()
            }
            async for results in self._store.results(self._job.id):
                await asyncio.to_thread(_write_results, results, parts)
            if ending is not State.COMPLETED and self._job.total:  # one cancelled before has lines of any sort
                done = await self._store.recorded_lines(self._job.id)
                await asyncio.to_thread(_write_missing, self._missing(done), ending, parts[False])
            sizes = {key: part.tell() for key, part in parts.items()}
        return self._record(True, sizes[True]), self._record(False, sizes[False])

    def discard(self) -> None:
        """They are nobody's."""
        for name in self._ids.values():
            self._files.remove(name)

    def _missing(self, done: set[int]) -> Iterator[Line]:
        assert self._job.input_file_id is not None
        lines = read_lines(self._files.path(self._job.input_file_id), self._job.endpoint)
        return (line for line in lines if line.number not in done)

    def _record(self, is_success: bool, size: int) -> FileRecord | None:
        file_id, now = self._ids[is_success], time.time()
        if not size:
            self._files.remove(file_id)
            return None
        name = f"{self._job.id}_{'output' if is_success else 'error'}.jsonl"
        return FileRecord(file_id, self._job.owner, name, "batch_output", size, now, now + self._expires_s)


def _write_results(results: list[LineResult], parts: dict[bool, BinaryIO]) -> None:
    for result in results:
        answer = {"status_code": result.status_code, "request_id": result.request_id, "body": from_json(result.body)}
        line = {"id": result.request_id, "custom_id": result.custom_id, "response": answer, "error": None}
        parts[result.is_success].write(to_json(line) + b"\n")


def _write_missing(lines: Iterator[Line], ending: State, part: BinaryIO) -> None:
    code, message = _REASONS[ending]
    for line in lines:
        error = {"code": code, "message": message}
        record = {"id": None, "custom_id": line.custom_id, "response": None, "error": error}
        part.write(to_json(record) + b"\n")

import asyncio
import contextlib
import gc
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from apt_serve.records.config import SQLITE_FILE, RecordsConfig
from apt_serve.records.database import Database

_NUM_ROWS = 300_000
_LONG_INSERT = text(
    "INSERT INTO apt_schema (version) WITH RECURSIVE row (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM row "
    f"WHERE n < {1000 + _NUM_ROWS}) SELECT n FROM row RETURNING version"
)


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_garbage_collection")
async def test_work_cancelled_within_a_statement_is_undone_and_gives_the_lock_back(tmp_path: Path) -> None:
    database = Database(RecordsConfig(folder=str(tmp_path)))
    has_begun = asyncio.Event()

    async def write() -> None:
        async with database.begin() as connection:
            has_begun.set()
            await connection.execute(_LONG_INSERT)

    work = asyncio.create_task(write())
    await has_begun.wait()
    await asyncio.sleep(0.02)  # a fifth of what the statement takes
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    assert work.cancelled()

    def num_rows_seen_by_another_writer() -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / SQLITE_FILE, timeout=10)) as other:
            other.execute("BEGIN IMMEDIATE")
            return int(other.execute("SELECT count(*) FROM apt_schema WHERE version >= 1000").fetchone()[0])

    assert await asyncio.to_thread(num_rows_seen_by_another_writer) == 0
    await database.close()

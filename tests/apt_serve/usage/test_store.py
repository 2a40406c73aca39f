"""The table of usage, and what is on its way into it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from apt_serve.access.identity import Identity
from apt_serve.records.config import SQLITE_FILE, RecordsConfig
from apt_serve.records.database import Database
from apt_serve.usage import ledger as ledger_module
from apt_serve.usage.ledger import UsageLedger
from apt_serve.usage.records import HOUR_S, Account, Usage
from apt_serve.usage.store import GroupBy, UsageFilter, UsageStore

DAY_S = 24 * HOUR_S
MONDAY = 1_600_041_600
ALICE = Account(MONDAY, "alice", "key00001", "small", is_batch=False)
BOB = replace(ALICE, owner="bob", key_id="")
ONE = Usage(1, 10, 4, 5)
NO_FILTER = UsageFilter()
CALLER = Identity("alice", frozenset(), key_id="key00001")


@asynccontextmanager
async def opened(records: RecordsConfig) -> AsyncIterator[UsageStore]:
    database = Database(records)
    yield UsageStore(database)
    await database.close()


@pytest.fixture
async def store(records: RecordsConfig) -> AsyncIterator[UsageStore]:
    """In either database."""
    async with opened(records) as store:
        yield store


@pytest.fixture
async def in_sqlite(tmp_path: Path) -> AsyncIterator[UsageStore]:
    """In one whose tables can be taken away."""
    async with opened(RecordsConfig(folder=str(tmp_path))) as store:
        yield store


async def total(store: UsageStore) -> Usage:
    return sum((row.usage for row in await store.sums(0, 2**40, HOUR_S, frozenset(), NO_FILTER)), Usage())


async def test_what_replicas_add_at_once_adds_up(store: UsageStore, records: RecordsConfig) -> None:
    async with opened(records) as other:
        entries = [{ALICE: ONE, BOB: ONE}, {BOB: ONE, ALICE: ONE}]
        await asyncio.gather(*((store, other)[i % 2].add(entries[i % 2]) for i in range(20)))
    [row] = await store.sums(MONDAY, MONDAY + HOUR_S, HOUR_S, frozenset(), NO_FILTER)
    assert row.usage == Usage(40, 400, 160, 200)


async def test_sums_by_time_and_by_what_is_asked_for(store: UsageStore) -> None:
    later = replace(ALICE, hour=MONDAY + 5 * HOUR_S, model="large", is_batch=True)
    tomorrow = replace(BOB, hour=MONDAY + DAY_S)
    await store.add({ALICE: ONE, BOB: ONE + ONE, later: ONE, tomorrow: ONE})

    async def counts(width_s: int, *group_by: GroupBy, only: UsageFilter = NO_FILTER) -> list[tuple[object, ...]]:
        rows = await store.sums(MONDAY, MONDAY + 2 * DAY_S, width_s, frozenset(group_by), only)
        return [((row.start - MONDAY) // HOUR_S, *row.group.values(), row.usage.num_requests) for row in rows]

    assert await counts(DAY_S) == [(0, 4), (24, 1)]
    assert await counts(HOUR_S) == [(0, 3), (5, 1), (24, 1)]
    assert await counts(DAY_S, GroupBy.OWNER) == [(0, "alice", 2), (0, "bob", 2), (24, "bob", 1)]
    assert await counts(DAY_S, GroupBy.MODEL, GroupBy.BATCH) == [
        (0, "large", True, 1),
        (0, "small", False, 3),
        (24, "small", False, 1),
    ]
    assert await counts(DAY_S, GroupBy.KEY, only=UsageFilter(owners=frozenset({"alice"}))) == [(0, "key00001", 2)]
    assert await counts(DAY_S, only=UsageFilter(models=frozenset({"large"}))) == [(0, 1)]
    assert await counts(DAY_S, only=UsageFilter(is_batch=False)) == [(0, 3), (24, 1)]
    assert await counts(DAY_S, only=UsageFilter(key_ids=frozenset({"none"}))) == []
    assert [
        row.usage.num_requests
        for row in await store.sums(MONDAY + HOUR_S, MONDAY + DAY_S, DAY_S, frozenset(), NO_FILTER)
    ] == [1]


async def test_a_ledger_writes_by_itself_and_at_its_end(store: UsageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.01)
    ledger = UsageLedger(store, is_enabled=True)
    ledger.start()
    ledger.note(CALLER, "small", ONE)
    async with asyncio.timeout(30):
        while await total(store) != ONE:
            await asyncio.sleep(0.01)
    monkeypatch.setattr(ledger_module, "FLUSH_S", 600)
    await asyncio.sleep(0.05)
    ledger.note(CALLER, "small", ONE)
    await ledger.stop()
    await ledger.stop()
    assert await total(store) == ONE + ONE


async def test_what_cannot_be_written_is_kept_until_it_can(
    in_sqlite: UsageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = in_sqlite
    ledger = UsageLedger(store, is_enabled=True)
    assert await total(store) == Usage()  # which makes the table
    with sqlite3.connect(tmp_path / SQLITE_FILE) as connection:
        connection.execute("ALTER TABLE apt_usage RENAME TO elsewhere")
    ledger.note(CALLER, "small", ONE)
    await ledger.flush()
    ledger.note(CALLER, "small", ONE)
    await ledger.flush()
    assert caplog.text.count("usage cannot be written") == 1
    with sqlite3.connect(tmp_path / SQLITE_FILE) as connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO apt_usage")
    await ledger.flush()
    await ledger.flush()
    assert await total(store) == ONE + ONE
    assert "usage is written again" in caplog.text


async def test_usage_that_is_lost_at_the_end_is_said(
    in_sqlite: UsageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = UsageLedger(in_sqlite, is_enabled=True)
    await total(in_sqlite)
    ledger.start()
    with sqlite3.connect(tmp_path / SQLITE_FILE) as connection:
        connection.execute("DROP TABLE apt_usage")
    ledger.note(CALLER, "small", ONE + ONE)
    await ledger.stop()
    assert "usage of 2 requests is lost" in caplog.text


async def test_without_access_control_nothing_is_counted(in_sqlite: UsageStore, tmp_path: Path) -> None:
    ledger = UsageLedger(in_sqlite, is_enabled=False)
    ledger.start()
    ledger.note(CALLER, "small", ONE)
    await ledger.stop()
    assert not (tmp_path / SQLITE_FILE).exists()

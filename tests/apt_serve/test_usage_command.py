"""`apt-serve usage`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from apt_serve.access.identity import Identity
from apt_serve.cli import main
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database
from apt_serve.usage.records import HOUR_S, Account, Usage
from apt_serve.usage.store import UsageStore

ALICE = Identity("alice", frozenset(), key_id="key00001")
BOB = Identity("bob", frozenset(), is_job=True)
ONE = Usage(1, 1000, 400, 50)


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(f"applications: [{{args: {{records: {{folder: {tmp_path / 'records'}}}}}}}]")
    return str(file)


@pytest.fixture
def usage(config: str, tmp_path: Path) -> None:
    async def add() -> None:
        database, now = Database(RecordsConfig(folder=str(tmp_path / "records"))), time.time()
        entries = {Account.of(ALICE, "small", now): ONE, Account.of(BOB, "large", now): ONE + ONE}
        await UsageStore(database).add(entries | {Account.of(ALICE, "large", now - 48 * HOUR_S): ONE})
        await database.close()

    asyncio.run(add())


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert main(["usage", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.usefixtures("usage")
def test_sums_over_days_by_what_is_asked_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> list[list[str]]:
        return table(capsys, "--config", config, *arguments)

    assert shown() == [
        ["alice", "2", "2,000", "800", "100"],
        ["bob", "2", "2,000", "800", "100"],
        ["all", "4", "4,000", "1,600", "200"],
    ]
    assert shown("--by", "batch", "--by", "key")[:-1] == [
        ["-", "batch", "2", "2,000", "800", "100"],
        ["key00001", "live", "2", "2,000", "800", "100"],
    ]
    assert shown("--days", "1", "--owner", "alice", "--by", "model") == [
        ["small", "1", "1,000", "400", "50"],
        ["all", "1", "1,000", "400", "50"],
    ]
    days = [line[0] for line in shown("--per-day", "--owner", "alice")[:-1]]
    assert len(days) == 2
    assert days[1] in {f"{datetime.fromtimestamp(time.time() - ago, UTC):%Y-%m-%d}" for ago in (0, 60)}


def test_without_records_none_are_made(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(capsys, "--config", config) == [["all", "0", "0", "0", "0"]]
    assert not (tmp_path / "records").exists()


def test_days_that_cannot_be_are_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--days", "0", "--config", config]) == 2
    assert "--days" in capsys.readouterr().err

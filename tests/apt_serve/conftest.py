"""What tests of the server share: databases of records, of both kinds, and a receiver of traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_serve.records.config import RecordsConfig
from tests.apt_serve.records.postgres import PostgresServer, needs_postgres, postgres_server
from tests.apt_serve.telemetry.collector import Collector


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests of a process."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> RecordsConfig:
    """Empty records, in SQLite and in PostgreSQL."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()
    return RecordsConfig(url=url, folder=str(tmp_path))


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A running one."""
    collector = Collector()
    yield collector
    collector.close()

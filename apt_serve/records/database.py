"""The SQL database of records: SQLite beside the server, or PostgreSQL by URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from apt_core.errors import AptError
from apt_serve.records.config import SQLITE_FILE, RecordsConfig

SCHEMA_VERSION = 1
"""Of all tables together. A change that old servers cannot work with raises it, and says how to migrate."""
METADATA = MetaData()
"""Every table of APT's: each lives in the room that uses it."""
_VERSION = Table("apt_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False))


_INSERTS: Final[dict[str, Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_MAX_ATTEMPTS = 20
"""At making the tables: there are fewer to meet another process at."""


class RecordsError(AptError):
    """The database cannot be used; the message says why."""


class Database:
    """Connections to one database. Opened, and its tables made, at the first use."""

    def __init__(self, config: RecordsConfig) -> None:
        self._config = config
        self._engine: AsyncEngine | None = None
        self._opening = asyncio.Lock()

    @property
    def exists(self) -> bool:
        """Whether anything may be kept in it; that of a laptop comes with the first record."""
        return self._config.url is not None or (self._config.path / SQLITE_FILE).exists()

    @asynccontextmanager
    async def begin(self, *, alone: str | None = None) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed at the end, undone by an exception.

        Args:
            alone: transactions of one name run one after another, so that what they count is what is there. In SQLite
                all that write do, from the first write on.

        Raises:
            RecordsError: it does not answer, or its tables are those of a newer APT.
        """
        try:
            engine = await self._opened()
            async with engine.begin() as connection:
                if alone is not None and connection.dialect.name == "postgresql":
                    await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(alone, 0))))
                yield connection
        except (IntegrityError, DataError):  # of what was to be written
            raise
        except (DBAPIError, NoConnectionError) as error:
            raise RecordsError(f"the records do not answer: {_reason(error)}") from error

    async def close(self) -> None:
        """Give all connections back."""
        if self._engine is not None:
            await self._engine.dispose()
            self._engine = None

    async def _opened(self) -> AsyncEngine:
        async with self._opening:
            if self._engine is None:
                engine = self._connect()
                try:
                    await _make_tables(engine)
                    await _require_version(engine)
                except BaseException:
                    await engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _connect(self) -> AsyncEngine:
        if self._config.url is not None:
            return create_async_engine(self._config.url, pool_pre_ping=True)
        try:
            self._config.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RecordsError(f"the folder of records cannot be made: {error}") from error
        engine = create_async_engine(self._config.database_url)
        _prepare_sqlite(engine.sync_engine)
        return engine


def upserting(connection: AsyncConnection, table: Table) -> Any:
    """SQLAlchemy's insert that knows ``on_conflict_do_...``, as the database has it."""
    return _INSERTS[connection.dialect.name](table)


def _prepare_sqlite(engine: Engine) -> None:
    """Let several processes use it: readers beside one writer (WAL), and writers that wait for each other."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "busy_timeout = 10000", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "invalidate")
    def on_invalidate(connection: Any, record: Any, error: BaseException | None) -> None:
        # Where work is cancelled within a statement SQLAlchemy only closes the connection. SQLite keeps one with an
        # unfinished statement, and its lock on the file, until Python's garbage collector finds that statement.
        connection.rollback()


def _reason(error: SQLAlchemyError) -> str:
    """What the driver says, in a line, without the statement."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


async def _make_tables(engine: AsyncEngine) -> None:
    """Make those that are not there, beside other processes that do the same."""
    for attempt in range(_MAX_ATTEMPTS):
        try:
            async with engine.begin() as connection:
                await connection.run_sync(METADATA.create_all)
            return
        except DBAPIError as error:  # another made one between the look and the making: look again
            is_race = isinstance(error, IntegrityError) or "already exists" in str(error.orig)
            if not is_race or attempt == _MAX_ATTEMPTS - 1:
                raise


async def _require_version(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        version = (await connection.execute(select(_VERSION.c.version))).scalar()
    if version is None:
        try:
            async with engine.begin() as connection:
                await connection.execute(insert(_VERSION).values(version=SCHEMA_VERSION))
        except IntegrityError:  # another process was first
            return
    elif version > SCHEMA_VERSION:
        raise RecordsError(f"the records are those of a newer APT (schema {version}, this one knows {SCHEMA_VERSION})")

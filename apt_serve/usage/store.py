"""The table of usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, func, select

from apt_serve.records.database import Database, upserting
from apt_serve.usage.records import COUNTS, USAGE, Account, Usage


class GroupBy(StrEnum):
    """What usage may be told apart by: columns of the table."""

    OWNER = "owner"
    KEY = "key_id"
    MODEL = "model"
    BATCH = "is_batch"


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Which usage is meant; an empty set leaves none out."""

    owners: frozenset[str] = frozenset()
    key_ids: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    is_batch: bool | None = None

    def conditions(self) -> Iterable[ColumnElement[bool]]:
        """The same in SQL."""
        for name, values in (("owner", self.owners), ("key_id", self.key_ids), ("model", self.models)):
            if values:
                yield USAGE.c[name].in_(values)
        if self.is_batch is not None:
            yield USAGE.c.is_batch.is_(self.is_batch)


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum over part of a time and, of what it was grouped by, over one value of each."""

    start: int
    """Unix seconds at which its part of the time begins."""
    group: Mapping[GroupBy, Any]
    usage: Usage


class UsageStore:
    """Adds to the table and sums it up.

    Every method raises RecordsError where the database does not answer.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entries: Mapping[Account, Usage]) -> None:
        """Add to what is there, also when other replicas do at the same time; all entries or none."""
        rows = [asdict(account) | asdict(usage) for account, usage in sorted(entries.items(), key=_in_order)]
        if not rows:
            return
        async with self._database.begin() as connection:
            insert = upserting(connection, USAGE)
            added = {name: USAGE.c[name] + insert.excluded[name] for name in COUNTS}
            await connection.execute(insert.on_conflict_do_update(index_elements=USAGE.primary_key, set_=added), rows)

    async def sums(
        self, start: int, end: int, width_s: int, group_by: frozenset[GroupBy], only: UsageFilter
    ) -> list[UsageRow]:
        """Sums from one Unix time to before another, in parts of a number of seconds, in the order of time.

        Args:
            start, end: whole hours.
            width_s: whole hours; parts begin at its multiples.
        """
        part = (USAGE.c.hour - USAGE.c.hour % width_s).label("start")
        keys = [USAGE.c[name] for name in GroupBy if name in group_by]
        query = (
            select(part, *keys, *(func.sum(USAGE.c[name]).label(name) for name in COUNTS))
            .where(USAGE.c.hour >= start, USAGE.c.hour < end, *only.conditions())
            .group_by(part, *keys)
            .order_by(part, *keys)
        )
        async with self._database.begin() as connection:
            rows = [row._asdict() for row in await connection.execute(query)]
        return [
            UsageRow(
                row["start"],
                {name: row[name] for name in GroupBy if name in group_by},
                Usage(*(int(row[name]) for name in COUNTS)),
            )
            for row in rows
        ]


def _in_order(entry: tuple[Account, Usage]) -> tuple[int, str, str, str, bool]:
    """Replicas that add at the same time lock rows in one order, so that none waits for another in a circle."""
    account = entry[0]
    return account.hour, account.owner, account.key_id, account.model, account.is_batch

"""How many jobs there are, for metrics: counted in the table, so that it is right whoever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import func, select

from apt_serve.jobs.records import ACTIVE, JOBS
from apt_serve.records.database import Database


@dataclass(frozen=True, slots=True)
class Census:
    """At one moment."""

    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Jobs by kind and state; ended ones until they are forgotten."""
    waiting_since: Mapping[str, float] = field(default_factory=dict)
    """By kind, when the oldest was created that no worker has taken yet, in Unix seconds; a kind without any is left
    out."""
    num_webhooks_due: int = 0
    """Webhooks that have not been delivered and will be tried again."""


async def take_census(database: Database) -> Census:
    """Count.

    Raises:
        RecordsError: the database does not answer.
    """
    counts = select(JOBS.c.kind, JOBS.c.state, func.count()).group_by(JOBS.c.kind, JOBS.c.state)
    untaken = JOBS.c.state.in_(ACTIVE), JOBS.c.attempt == 0
    waiting = select(JOBS.c.kind, func.min(JOBS.c.created_at)).where(*untaken).group_by(JOBS.c.kind)
    due = select(func.count()).where(JOBS.c.webhook_due.is_not(None))
    async with database.begin() as connection:
        return Census(
            {(kind, state): number for kind, state, number in await connection.execute(counts)},
            {kind: created_at for kind, created_at in await connection.execute(waiting)},
            (await connection.execute(due)).scalar_one(),
        )

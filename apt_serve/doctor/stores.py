"""Where the server keeps things: the records' database and folder, and Redis."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import redis
from sqlalchemy.engine import make_url

from apt_serve.doctor.environment import is_writable
from apt_serve.doctor.finding import Finding, ok, problem, warning
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database, RecordsError

REDIS_TIMEOUT_S = 2.0
LOW_DISK_BYTES = 2**30


def records(config: RecordsConfig) -> Finding:
    """Whether the database opens; its tables are made then, as a start would."""
    is_new = config.url is None and not config.path.exists()
    if not is_writable(config.path):
        return problem("records", f"{config.path} cannot be written", "make it writable, or set records.folder")
    if is_new:
        return ok("records", f"{config.path} is made when something is first kept")
    try:
        asyncio.run(_open(config))
    except RecordsError as error:
        reason = str(error).splitlines()[0]
        return problem("records", f"{_shown(config)}: {reason}", "check records.url and records.folder")
    if shutil.disk_usage(config.path if config.path.exists() else "/").free < LOW_DISK_BYTES:
        return warning("records", f"less than 1 GiB is free below {config.path}", "make room: uploads go there")
    return ok("records", f"{_shown(config)} opens")


async def _open(config: RecordsConfig) -> None:
    database = Database(config)
    try:
        async with database.begin():
            pass
    finally:
        await database.close()


def _shown(config: RecordsConfig) -> str:
    """Without a password."""
    return make_url(config.database_url).render_as_string(hide_password=True)


def redis_servers(config: object) -> list[Finding]:
    """Whether each Redis that a setting names answers."""
    return [_redis(name, url) for name, url in sorted(_redis_urls(config))]


def _redis_urls(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting called redis_url that has a value, whichever section has it."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _redis_urls(value, f"{prefix}{field.name}.")
        elif field.name == "redis_url" and value:
            yield f"{prefix}{field.name}", value


def _redis(name: str, url: str) -> Finding:
    timeouts: dict[str, Any] = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
    try:
        with redis.Redis.from_url(url, **timeouts) as server:
            server.ping()
    except (redis.RedisError, ValueError, OSError) as error:
        return problem(name, f"Redis does not answer: {error}", "start it, or correct the address; null does without")
    return ok(name, "Redis answers")

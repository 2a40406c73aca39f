"""The table of API keys."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sqlalchemy import Column, Float, Row, String, Table, Text, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from apt_serve.access.errors import KeyNotFoundError, TooManyKeysError
from apt_serve.access.identity import Identity, Scope
from apt_serve.access.keys import ApiKey
from apt_serve.records.database import METADATA, Database

MAX_LIVE_KEYS = 2
"""Of one owner and name: the one in use and the one that takes its place."""

_KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(8), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("owner", String(128), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("models", Text),
    Column("tenant_class", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float, index=True),
)


@dataclass(frozen=True, slots=True)
class KeyGrant:
    """What a key is to be for."""

    owner: str
    name: str = "default"
    """Tells keys of one owner apart."""
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    models: frozenset[str] | None = None
    """None: all."""
    tenant_class: str = "default"
    expires_at: float | None = None
    """Unix seconds; None: never."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key."""

    id: str
    grant: KeyGrant
    created_at: float
    revoked_at: float | None
    digest: str = field(repr=False)

    def is_live(self, now: float) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.grant.expires_at is None or now < self.grant.expires_at)

    @property
    def identity(self) -> Identity:
        """Whom it proves."""
        grant = self.grant
        return Identity(grant.owner, grant.scopes, self.id, grant.models, grant.tenant_class, grant.expires_at)


class KeyStore:
    """Creates, finds and ends keys.

    Every method raises RecordsError where the database does not answer.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, grant: KeyGrant, pepper: bytes) -> tuple[ApiKey, KeyRecord]:
        """A new key, whose secret is nowhere else.

        Raises:
            TooManyKeysError: its owner has two live ones of that name.
        """
        async with self._database.begin(alone=_keys_of(grant.owner)) as connection:
            return await _create(connection, grant, pepper)

    async def rotate(self, key_id: str, pepper: bytes, overlap_s: float) -> tuple[ApiKey, KeyRecord]:
        """A new key for the same, beside the old one, which expires after ``overlap_s`` seconds.

        Raises:
            KeyNotFoundError: no live key has this id.
            TooManyKeysError: it is being rotated already.
        """
        now = time.time()
        found = await self.find(key_id)
        async with self._database.begin(alone=_keys_of(found.grant.owner if found else "")) as connection:
            old = await _find(connection, key_id)
            if old is None or not old.is_live(now):
                raise KeyNotFoundError(f"there is no live key {key_id!r}")
            end = min(now + overlap_s, old.grant.expires_at or float("inf"))
            await connection.execute(update(_KEYS).where(_KEYS.c.id == key_id).values(expires_at=end))
            return await _create(connection, old.grant, pepper)

    async def revoke(self, key_id: str) -> KeyRecord:
        """End a key at once; one that has ended already stays as it is.

        Raises:
            KeyNotFoundError: there is none with this id.
        """
        async with self._database.begin() as connection:
            matches = (_KEYS.c.id == key_id) & _KEYS.c.revoked_at.is_(None)
            await connection.execute(update(_KEYS).where(matches).values(revoked_at=time.time()))
            record = await _find(connection, key_id)
        if record is None:
            raise KeyNotFoundError(f"there is no key {key_id!r}")
        return record

    async def find(self, key_id: str) -> KeyRecord | None:
        """What is kept of a key."""
        async with self._database.begin() as connection:
            return await _find(connection, key_id)

    async def list(self, owner: str | None = None) -> list[KeyRecord]:
        """All keys, or an owner's, oldest first; ended ones included."""
        query = select(_KEYS).order_by(_KEYS.c.created_at, _KEYS.c.id)
        if owner is not None:
            query = query.where(_KEYS.c.owner == owner)
        async with self._database.begin() as connection:
            return [_record(row) for row in await connection.execute(query)]

    async def revoked_since(self, moment: float) -> frozenset[str]:
        """Ids of keys revoked at a Unix time or later."""
        async with self._database.begin() as connection:
            rows = await connection.execute(select(_KEYS.c.id).where(_KEYS.c.revoked_at >= moment))
            return frozenset(row.id for row in rows)


def _keys_of(owner: str) -> str:
    return f"keys of {owner}"


async def _create(connection: AsyncConnection, grant: KeyGrant, pepper: bytes) -> tuple[ApiKey, KeyRecord]:
    key, now = ApiKey.make(), time.time()
    record = KeyRecord(key.id, grant, now, None, key.digest(pepper))
    await connection.execute(insert(_KEYS).values(**_columns(record)))
    # Counted after the insert, from which on SQLite lets nobody else write.
    live = or_(_KEYS.c.expires_at.is_(None), _KEYS.c.expires_at > now) & _KEYS.c.revoked_at.is_(None)
    query = select(func.count()).where(_KEYS.c.owner == grant.owner, _KEYS.c.name == grant.name, live)
    if (await connection.execute(query)).scalar_one() > MAX_LIVE_KEYS:
        raise TooManyKeysError(f"{grant.owner!r} has {MAX_LIVE_KEYS} live keys named {grant.name!r}; revoke one first")
    return key, record


async def _find(connection: AsyncConnection, key_id: str) -> KeyRecord | None:
    row = (await connection.execute(select(_KEYS).where(_KEYS.c.id == key_id))).first()
    return None if row is None else _record(row)


def _columns(record: KeyRecord) -> dict[str, object]:
    grant = record.grant
    return {
        "id": record.id,
        "digest": record.digest,
        "owner": grant.owner,
        "name": grant.name,
        "scopes": _names(grant.scopes),
        "models": None if grant.models is None else _names(grant.models),
        "tenant_class": grant.tenant_class,
        "created_at": record.created_at,
        "expires_at": grant.expires_at,
        "revoked_at": record.revoked_at,
    }


def _names(names: Iterable[str]) -> str:
    return json.dumps(sorted(names))


def _record(row: Row[tuple[object, ...]]) -> KeyRecord:
    values = row._asdict()
    grant = KeyGrant(values["owner"], values["name"], tenant_class=values["tenant_class"])
    grant = replace(
        grant,
        scopes=frozenset(map(Scope, json.loads(values["scopes"]))),
        models=None if values["models"] is None else frozenset(json.loads(values["models"])),
        expires_at=values["expires_at"],
    )
    return KeyRecord(values["id"], grant, values["created_at"], values["revoked_at"], values["digest"])

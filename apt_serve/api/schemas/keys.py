"""/admin/keys."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from apt_serve.access.identity import Scope
from apt_serve.access.key_store import KeyRecord
from apt_serve.access.keys import ApiKey
from apt_serve.api.schemas.base import RequestSchema, ResponseSchema, example

Name = Annotated[str, Field(min_length=1, max_length=128)]
ScopeName = Annotated[Scope, Field(strict=False)]


class KeyRequest(RequestSchema):
    """A key to make."""

    model_config = example(owner="alice", name="laptop", scopes=["inference"], expires_in_s=7776000)

    owner: Name = Field(description="Whom usage, limits and jobs are counted by.")
    name: Name = Field("default", description="Tells an owner's keys apart; two of a name may be live.")
    scopes: list[ScopeName] = Field([Scope.INFERENCE], min_length=1, max_length=3)
    models: Annotated[list[Name], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Models it may use; null: all."
    )
    tenant_class: Annotated[str, Field(min_length=1, max_length=64)] = Field("default", description="Class of limits.")
    expires_in_s: float | None = Field(None, gt=0, le=315360000, description="Null: it does not expire.")


class RotateRequest(RequestSchema):
    """A key to replace."""

    overlap_s: float = Field(86400, ge=0, le=31536000, description="How long the old key still works.")


class KeyInfo(ResponseSchema):
    """A key without its secret."""

    id: str
    owner: str
    name: str
    scopes: list[Scope]
    models: list[str] | None
    tenant_class: str
    created_at: float
    """Unix seconds, as all times here."""
    expires_at: float | None
    revoked_at: float | None
    is_live: bool

    @classmethod
    def of(cls, record: KeyRecord) -> Self:
        """As it is kept."""
        return cls(**_fields(record))


class NewKey(KeyInfo):
    """A key just made."""

    key: str
    """Its text, which nobody can read again."""

    @classmethod
    def made(cls, key: ApiKey, record: KeyRecord) -> Self:
        """A key and what is kept of it."""
        return cls(key=key.text, **_fields(record))


class KeyList(ResponseSchema):
    """Keys."""

    object: Literal["list"]
    data: list[KeyInfo]


def _fields(record: KeyRecord) -> dict[str, Any]:
    grant = record.grant
    return {
        "id": record.id,
        "owner": grant.owner,
        "name": grant.name,
        "scopes": sorted(grant.scopes),
        "models": None if grant.models is None else sorted(grant.models),
        "tenant_class": grant.tenant_class,
        "created_at": record.created_at,
        "expires_at": grant.expires_at,
        "revoked_at": record.revoked_at,
        "is_live": record.is_live(time.time()),
    }

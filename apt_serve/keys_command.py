"""`apt-serve keys`: API keys, in the records that the settings name; no server has to run."""

from __future__ import annotations

import argparse
import asyncio
import time
from datetime import UTC, datetime

from apt_core.errors import ConfigError
from apt_serve.access.authenticator import Authenticator
from apt_serve.access.identity import Scope
from apt_serve.access.key_store import KeyGrant, KeyRecord
from apt_serve.config import ServerConfig
from apt_serve.records.database import Database

DAY_S = 86400.0


def run(options: argparse.Namespace, config: ServerConfig) -> int:
    """Do what a parsed command line asks and print the result; a new key alone on its line.

    Raises:
        AptError: it cannot be done.
    """
    return asyncio.run(_run(options, config))


async def _run(options: argparse.Namespace, config: ServerConfig) -> int:
    database = Database(config.records)
    access = Authenticator(config.access, config.records, database)
    try:
        match options.action:
            case "create":
                key, _ = await access.create_key(_grant(options))
                print(key.text)
            case "rotate":
                key, _ = await access.rotate_key(options.id, options.overlap_days * DAY_S)
                print(key.text)
            case "revoke":
                print(_line(await access.revoke_key(options.id)))
            case "list":
                for record in await access.list_keys(options.owner):
                    print(_line(record))
    finally:
        await database.close()
    return 0


def _grant(options: argparse.Namespace) -> KeyGrant:
    if options.expires_in_days is not None and options.expires_in_days <= 0:
        raise ConfigError("must be above 0", field="--expires-in-days")
    return KeyGrant(
        options.owner,
        options.name,
        frozenset(map(Scope, options.scope or [Scope.INFERENCE])),
        frozenset(options.model) if options.model else None,
        options.tenant_class,
        None if options.expires_in_days is None else time.time() + options.expires_in_days * DAY_S,
    )


def _line(record: KeyRecord) -> str:
    grant = record.grant
    state = "live" if record.is_live(time.time()) else "expired" if record.revoked_at is None else "revoked"
    models = "all models" if grant.models is None else ",".join(sorted(grant.models))
    expiry = "never" if grant.expires_at is None else f"{datetime.fromtimestamp(grant.expires_at, UTC):%Y-%m-%d %H:%M}Z"
    scopes = ",".join(sorted(grant.scopes))
    return "  ".join((record.id, state, grant.owner, grant.name, scopes, models, grant.tenant_class, f"ends {expiry}"))

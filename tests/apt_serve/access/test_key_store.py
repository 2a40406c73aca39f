"""The table of API keys, and the pepper."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from apt_core.errors import ConfigError
from apt_serve.access.errors import KeyNotFoundError, TooManyKeysError
from apt_serve.access.identity import Scope
from apt_serve.access.key_store import KeyGrant, KeyStore
from apt_serve.access.keys import ApiKey, read_pepper
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database

PEPPER = b"p" * 32


@pytest.fixture
def run(records: RecordsConfig) -> Callable[[Callable[[KeyStore], Coroutine[Any, Any, Any]]], Any]:
    """Does something with a fresh store."""

    def run(work: Callable[[KeyStore], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            database = Database(records)
            try:
                return await work(KeyStore(database))
            finally:
                await database.close()

        return asyncio.run(main())

    return run


def test_a_key_is_kept_as_it_was_granted(run: Any) -> None:
    grant = KeyGrant("alice", "ci", frozenset({Scope.JOBS, Scope.ADMIN}), frozenset({"m"}), "gold", time.time() + 9)

    async def work(store: KeyStore) -> Any:
        key, _ = await store.create(grant, PEPPER)
        return key, await store.find(key.id)

    key, record = run(work)
    assert record.grant == grant
    assert key.has_digest(record.digest, PEPPER)
    assert not key.has_digest(record.digest, b"q" * 32)
    assert not ApiKey(key.id, ApiKey.make().secret).has_digest(record.digest, PEPPER)
    assert not ApiKey("aaaaaaaa", key.secret).has_digest(record.digest, PEPPER)
    assert ApiKey.parse(key.text) == key
    assert key.secret not in repr(key) + repr(record)


def test_two_live_keys_of_a_name_however_many_are_made_at_once(run: Any) -> None:
    async def work(store: KeyStore) -> Any:
        made = await asyncio.gather(*(store.create(KeyGrant("a"), PEPPER) for _ in range(6)), return_exceptions=True)
        await store.create(KeyGrant("a", "another name"), PEPPER)
        return made, await store.list("a")

    made, records = run(work)
    assert sum(isinstance(each, TooManyKeysError) for each in made) == 4
    assert len(records) == 3


def test_rotation_leaves_the_old_key_no_longer_than_it_had(run: Any) -> None:
    async def work(store: KeyStore) -> Any:
        soon = time.time() + 5
        key, _ = await store.create(KeyGrant("a", expires_at=soon), PEPPER)
        await store.rotate(key.id, PEPPER, 3600)
        old = await store.find(key.id)
        await store.revoke(key.id)
        with pytest.raises(KeyNotFoundError):
            await store.rotate(key.id, PEPPER, 3600)
        with pytest.raises(KeyNotFoundError):
            await store.revoke("aaaaaaaa")
        return soon, old

    soon, old = run(work)
    assert old.grant.expires_at == soon


def test_what_was_revoked_since(run: Any) -> None:
    async def work(store: KeyStore) -> Any:
        (first, _), (second, _) = [await store.create(KeyGrant("a"), PEPPER) for _ in range(2)]
        await store.create(KeyGrant("b"), PEPPER)
        await store.revoke(first.id)
        moment = (await store.revoke(second.id)).revoked_at
        await store.revoke(second.id)  # changes nothing
        return second.id, moment, await store.revoked_since(moment), await store.revoked_since(moment + 1)

    second, _, since, later = run(work)
    assert (since, later) == ({second}, frozenset())


def test_the_pepper_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_PEPPER", raising=False)
    folder = tmp_path / "records"
    pepper = read_pepper("TEST_PEPPER", folder)
    assert read_pepper("TEST_PEPPER", folder) == pepper
    [file] = folder.iterdir()
    assert (len(pepper), file.stat().st_mode & 0o777) == (64, 0o600)
    monkeypatch.setenv("TEST_PEPPER", "e" * 32)
    assert read_pepper("TEST_PEPPER", folder) == b"e" * 32
    monkeypatch.setenv("TEST_PEPPER", "short")
    with pytest.raises(ConfigError, match="32 bytes"):
        read_pepper("TEST_PEPPER", folder)

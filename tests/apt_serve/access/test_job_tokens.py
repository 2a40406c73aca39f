"""What a worker shows for the owner of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt_serve.access import job_tokens
from apt_serve.access.authenticator import Authenticator
from apt_serve.access.config import AccessConfig
from apt_serve.access.errors import AuthenticationError
from apt_serve.access.identity import Identity, Scope
from apt_serve.access.job_tokens import make_job_token, read_job_token
from apt_serve.access.keys import read_pepper
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database

PEPPER = b"p" * 32
ALICE = Identity("alice", frozenset(Scope), "key12345", frozenset({"a", "b"}), "gold", expires_at=1.0)
WORKING = Identity("alice", frozenset({Scope.INFERENCE}), None, frozenset({"a", "b"}), "gold", is_job=True)
"""What is left of her: nothing but inference."""


def test_it_admits_the_owners_requests_and_nothing_else() -> None:
    assert read_job_token(make_job_token(ALICE, PEPPER), PEPPER) == WORKING


async def test_the_server_knows_it_by_the_pepper_they_share(tmp_path: Path) -> None:
    records = RecordsConfig(folder=str(tmp_path))
    database = Database(records)
    access = Authenticator(AccessConfig(enabled=True), records, database)
    token = make_job_token(ALICE, read_pepper("UNSET", tmp_path))
    assert await access.authenticate(f"Bearer {token}") == WORKING
    with pytest.raises(AuthenticationError):
        await access.authenticate(f"Bearer {make_job_token(ALICE, PEPPER)}")
    await database.close()


def test_another_pepper_or_a_changed_token_is_refused() -> None:
    token = make_job_token(ALICE, PEPPER)
    other = make_job_token(Identity("bob", frozenset()), PEPPER)
    forged = token.rpartition(".")[0] + "." + other.rpartition(".")[2]
    for wrong in (forged, token[:-1], token + "0", token.removeprefix("aptjob."), "aptjob.", "aptjob.x.", "aptjob..é"):
        with pytest.raises(AuthenticationError):
            read_job_token(wrong, PEPPER)
    with pytest.raises(AuthenticationError):
        read_job_token(token, b"q" * 32)


def test_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_tokens, "LIFETIME_S", -31.0)
    with pytest.raises(AuthenticationError):
        read_job_token(make_job_token(ALICE, PEPPER), PEPPER)

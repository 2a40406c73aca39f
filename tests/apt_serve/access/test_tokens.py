"""Tokens: what a good one proves, and that nothing else proves anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from apt_core.errors import ConfigError
from apt_serve.access.config import TokenConfig, TokenKey
from apt_serve.access.errors import AuthenticationError
from apt_serve.access.identity import Scope
from apt_serve.access.tokens import TokenVerifier
from tests.apt_serve.access.signing import (
    AUDIENCE,
    ISSUER,
    SECRET,
    good_claims,
    hs256,
    public_bytes,
    rs256,
    unsigned,
    write_public_key,
)


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenVerifier:
    monkeypatch.setenv("TEST_TOKEN_SECRET", SECRET)
    keys = {
        "shared": TokenKey("HS256", secret_variable="TEST_TOKEN_SECRET"),
        "pair": TokenKey("RS256", public_key=str(write_public_key(tmp_path))),
    }
    return TokenVerifier(TokenConfig(issuer=ISSUER, audience=AUDIENCE, keys=keys))


@pytest.mark.parametrize("sign", [hs256, rs256])
def test_a_good_token_proves_its_subject(verifier: TokenVerifier, sign: Callable[..., str]) -> None:
    claims = good_claims(scope="inference openid", models=["small"], tenant_class="gold")
    identity = verifier.identity(sign(claims))
    assert (identity.owner, identity.scopes, identity.key_id) == ("alice", {Scope.INFERENCE}, None)
    assert (identity.models, identity.tenant_class) == ({"small"}, "gold")
    assert identity.expires_at == claims["exp"] + 30


def test_a_token_grants_no_more_than_the_settings_let_it(verifier: TokenVerifier) -> None:
    assert verifier.identity(hs256(good_claims(scope="admin jobs"))).scopes == {Scope.JOBS}
    assert verifier.identity(hs256(good_claims(scope=None))).scopes == frozenset()


def test_clocks_may_differ_by_the_leeway(verifier: TokenVerifier) -> None:
    now = int(time.time())
    assert verifier.identity(hs256(good_claims(iat=now - 60, exp=now - 10, nbf=now + 10))).owner == "alice"


NOW = int(time.time())
ATTACKS = {
    "unsigned, hs kid": lambda: unsigned(good_claims(), "shared"),
    "unsigned, rs kid": lambda: unsigned(good_claims(), "pair"),
    "another secret": lambda: hs256(good_claims(), key=b"x" * 48),
    "empty secret": lambda: hs256(good_claims(), key=b""),
    "signature cut": lambda: hs256(good_claims())[:-3],
    "signature left out": lambda: hs256(good_claims()).rpartition(".")[0] + ".",
    "claims changed": lambda: ".".join(
        (
            hs256(good_claims()).split(".")[0],
            hs256(good_claims(sub="bob")).split(".")[1],
            hs256(good_claims()).split(".")[2],
        )
    ),
    "hmac with the public key's PEM": lambda: hs256(good_claims(), key=public_bytes(Encoding.PEM), kid="pair"),
    "hmac with the public key's DER": lambda: hs256(good_claims(), key=public_bytes(Encoding.DER), kid="pair"),
    "algorithm of another key": lambda: rs256(good_claims(), kid="shared"),
    "unknown kid": lambda: hs256(good_claims(), kid="else"),
    "kid is a list": lambda: hs256(good_claims(), kid=["shared"]),
    "no kid": lambda: hs256(good_claims(), kid=None),
    "crit": lambda: hs256(good_claims(), crit=["exp"]),
    "empty crit": lambda: hs256(good_claims(), crit=[]),
    "expired": lambda: hs256(good_claims(iat=NOW - 200, exp=NOW - 100)),
    "not yet": lambda: hs256(good_claims(nbf=NOW + 3600)),
    "for somebody else": lambda: hs256(good_claims(aud="others")),
    "from somebody else": lambda: hs256(good_claims(iss="https://evil.example")),
    "exp Infinity": lambda: hs256(good_claims(exp=float("inf"))),
    "issued in the future": lambda: hs256(good_claims(iat=NOW + 3600, exp=NOW + 3700)),
    "iat -Infinity": lambda: hs256(good_claims(iat=float("-inf"))),
    "exp NaN": lambda: hs256(good_claims(exp=float("nan"))),
    "exp is text": lambda: hs256(good_claims(exp=str(NOW + 600))),
    "sub is a number": lambda: hs256(good_claims(sub=7)),
    "sub is empty": lambda: hs256(good_claims(sub="")),
    "scope is a list": lambda: hs256(good_claims(scope=["inference"])),
    "models are numbers": lambda: hs256(good_claims(models=[1])),
    "valid for years": lambda: hs256(good_claims(exp=NOW + 10**8)),
    "too large": lambda: hs256(good_claims(x="x" * 9000)),
    "five parts, as encrypted ones have": lambda: hs256(good_claims()) + ".a.b",
    "no token": lambda: "..",
    "claims are a list": lambda: hs256([good_claims()]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_what_is_no_good_token_proves_nobody(verifier: TokenVerifier, attack: Callable[[], str]) -> None:
    with pytest.raises(AuthenticationError):
        verifier.identity(attack())


@pytest.mark.parametrize("claim", ["exp", "iat", "sub", "aud", "iss"])
def test_no_claim_may_be_missing(verifier: TokenVerifier, claim: str) -> None:
    with pytest.raises(AuthenticationError):
        verifier.identity(hs256(good_claims(**{claim: None})))


def test_keys_that_cannot_work_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN_SECRET", "short")
    no_key = tmp_path / "no.pem"
    no_key.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for key in (
        TokenKey("HS256", secret_variable="TEST_TOKEN_SECRET"),
        TokenKey("RS256", public_key=str(no_key)),
        TokenKey("ES256", public_key=str(tmp_path / "missing.pem")),
        TokenKey("ES256", public_key=str(write_public_key(tmp_path))),
    ):
        with pytest.raises(ConfigError, match=r"access\.tokens\.keys\.a"):
            TokenVerifier(TokenConfig(issuer=ISSUER, audience=AUDIENCE, keys={"a": key}))
    with pytest.raises(ConfigError, match="issuer"):
        TokenConfig(keys={"a": key})
    with pytest.raises(ConfigError, match="public_key"):
        TokenKey("RS256", secret_variable="TEST_TOKEN_SECRET")

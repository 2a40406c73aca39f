"""Settings of access control."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from apt_core.errors import ConfigError
from apt_serve.access.identity import Scope

MIN_SECRET_BYTES = 32
Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512"]


@dataclass(frozen=True)
class TokenKey:
    """A key that an issuer signs with. Its algorithm is fixed here: that which a token names chooses nothing."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    algorithm: Algorithm
    secret_variable: str | None = None
    """HS*: environment variable that holds the secret, at least 32 bytes."""
    public_key: str | None = None
    """RS*, ES*: PEM file of the public key."""

    def __post_init__(self) -> None:
        given = self.secret_variable if self.algorithm.startswith("HS") else self.public_key
        if given is None or (self.secret_variable is not None and self.public_key is not None):
            raise ConfigError("HS* takes secret_variable; RS* and ES* take public_key", field="algorithm")

    def read(self, kid: str) -> str:
        """The secret or the PEM text.

        Raises:
            ConfigError: it is missing, too short, or the wrong kind of key.
        """
        where = f"access.tokens.keys.{kid}"
        if self.secret_variable is not None:
            secret = os.environ.get(self.secret_variable, "")
            if len(secret.encode()) < MIN_SECRET_BYTES:
                problem = f"{self.secret_variable} must hold at least {MIN_SECRET_BYTES} bytes"
                raise ConfigError(problem, field=f"{where}.secret_variable")
            return secret
        assert self.public_key is not None
        try:
            pem = Path(self.public_key).expanduser().read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", field=f"{where}.public_key") from error
        if "-----BEGIN PUBLIC KEY-----" not in pem:
            raise ConfigError("must be a PEM file with a PUBLIC KEY", field=f"{where}.public_key")
        return pem


@dataclass(frozen=True)
class TokenConfig:
    """Tokens (JWT) of an issuer of your own. None are taken without keys."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    issuer: str | None = None
    """What a token's iss must be."""
    audience: str | None = None
    """What a token's aud must be."""
    leeway_s: int = 30
    """How far the issuer's clock may be off."""
    max_lifetime_s: int = 86400
    """Tokens that are valid for longer are refused: a token cannot be revoked."""
    scopes: tuple[Scope, ...] = (Scope.INFERENCE, Scope.JOBS)
    """The most that a token's scope claim may grant: inference, jobs, admin."""
    keys: dict[str, TokenKey] = field(default_factory=dict)
    """By kid: {algorithm: RS256, public_key: /path.pem} or {algorithm: HS256, secret_variable: NAME}."""

    def __post_init__(self) -> None:
        if self.keys and not (self.issuer and self.audience):
            raise ConfigError("keys need an issuer and an audience", field="access.tokens.keys")
        if self.leeway_s < 0:
            raise ConfigError(f"must not be negative, got {self.leeway_s}", field="access.tokens.leeway_s")
        if self.max_lifetime_s <= 0:
            raise ConfigError(f"must be above 0, got {self.max_lifetime_s}", field="access.tokens.max_lifetime_s")


@dataclass(frozen=True)
class AccessConfig:
    """Who may use the server; see docs/access.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    enabled: bool = False
    """Refuse whoever has no API key or token. Without it everybody may generate and use jobs."""
    pepper_variable: str = "APT_KEY_PEPPER"
    """Environment variable with the secret that hashes of API keys are made with, at least 32 bytes; where it is not
    set, one is made once and kept in records.folder."""
    cache_s: float = 10.0
    """A key or token is looked up again after this long."""
    revocation_poll_s: float = 2.0
    """How often the records are asked which keys were revoked; what runs on them then ends."""
    public_metrics: bool = True
    """/metrics needs no key."""
    tokens: TokenConfig = field(default_factory=TokenConfig)

    def __post_init__(self) -> None:
        for name in ("cache_s", "revocation_poll_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=f"access.{name}")

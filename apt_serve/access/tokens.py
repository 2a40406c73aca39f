"""JSON Web Tokens (RFC 7519). The only file that imports python-jose, whose defaults accept far too much:

with ``algorithms`` left out, an HMAC made with a public key in DER; tokens without exp or aud; any ``crit``; and some
input ends in errors of other kinds than its own.
"""

from __future__ import annotations

import math
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jose import jwk, jwt

from apt_core.errors import ConfigError
from apt_serve.access.config import TokenConfig
from apt_serve.access.errors import INVALID, AuthenticationError
from apt_serve.access.identity import Identity

MAX_TOKEN_BYTES = 8192
_KINDS = {"RS": RSAPublicKey, "ES": EllipticCurvePublicKey}
_REQUIRED = ("exp", "iat", "sub", "aud", "iss")


class TokenVerifier:
    """Knows the issuer's keys.

    Raises:
        ConfigError: a key cannot be read.
    """

    def __init__(self, config: TokenConfig) -> None:
        self._config = config
        self._keys = {kid: key.read(kid) for kid, key in config.keys.items()}
        for kid, key in config.keys.items():
            _require_usable(kid, key.algorithm, self._keys[kid])

    def identity(self, token: str) -> Identity:
        """Whom a token proves.

        Raises:
            AuthenticationError: it proves nobody.
        """
        try:
            return self._identity(self._claims(token))
        except Exception:  # whatever it was, the token did it
            raise AuthenticationError(INVALID) from None

    def _claims(self, token: str) -> dict[str, Any]:
        if len(token) > MAX_TOKEN_BYTES or token.count(".") != 2:
            raise ValueError("no signed token")
        header = jwt.get_unverified_header(token)
        kid = header["kid"]
        key = self._config.keys[kid]
        if "crit" in header or header["alg"] != key.algorithm:
            raise ValueError("another kind of token")
        options = {f"require_{name}": True for name in _REQUIRED} | {"leeway": self._config.leeway_s}
        claims: dict[str, Any] = jwt.decode(
            token,
            self._keys[kid],
            algorithms=[key.algorithm],
            audience=self._config.audience,
            issuer=self._config.issuer,
            options=options,
        )
        return claims

    def _identity(self, claims: dict[str, Any]) -> Identity:
        issued, expires = _seconds(claims["iat"]), _seconds(claims["exp"])
        if issued > time.time() + self._config.leeway_s or expires - issued > self._config.max_lifetime_s:
            raise ValueError("not issued yet, or valid for too long")
        scopes = set(_text(claims.get("scope", "")).split())
        models = claims.get("models")
        return Identity(
            owner=_owner(claims["sub"]),
            scopes=frozenset(scope for scope in self._config.scopes if scope.value in scopes),
            models=None if models is None else frozenset(map(_text, models)),
            tenant_class=_text(claims.get("tenant_class", "default")),
            expires_at=expires + self._config.leeway_s,
        )


def _require_usable(kid: str, algorithm: str, key: str) -> None:
    """Refuse a key at the start that could not check a single signature."""
    try:
        jwk.construct(key, algorithm)
        if not algorithm.startswith("HS") and not isinstance(load_pem_public_key(key.encode()), _KINDS[algorithm[:2]]):
            raise TypeError("that is a key of another kind")
    except Exception as error:
        raise ConfigError(f"is no key of {algorithm}: {error}", field=f"access.tokens.keys.{kid}") from error


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no time")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _owner(value: object) -> str:
    owner = _text(value)
    # PostgreSQL has no texts with NUL or half a surrogate pair.
    if not 0 < len(owner) <= 128 or not owner.isprintable():
        raise ValueError("no owner")
    return owner

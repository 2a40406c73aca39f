"""From what a client shows to who it is: the one check of HTTP, WebSocket and gRPC."""

from __future__ import annotations

import hashlib
import secrets
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from apt_serve.access.config import AccessConfig
from apt_serve.access.errors import INVALID, AuthenticationError, PermissionDeniedError
from apt_serve.access.identity import LOCAL, Identity, Scope
from apt_serve.access.job_tokens import PREFIX, read_job_token
from apt_serve.access.key_store import KeyGrant, KeyRecord, KeyStore
from apt_serve.access.keys import ApiKey, read_pepper
from apt_serve.access.revocations import Revocations
from apt_serve.access.tokens import MAX_TOKEN_BYTES, TokenVerifier
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database

_MAX_CACHED = 4096
_ADMIN = Identity("admin", frozenset(Scope))


@dataclass(frozen=True, slots=True)
class _Cached:
    identity: Identity
    until: float
    """Unix seconds."""


class Authenticator:
    """Knows everybody who may come in.

    Args:
        admin_token: of the operator, who may do everything; None: there is none.

    Raises:
        ConfigError: access is enabled, and a token's key or the pepper cannot be read.
    """

    def __init__(
        self, config: AccessConfig, records: RecordsConfig, database: Database, admin_token: str | None = None
    ) -> None:
        self.is_enabled = config.enabled
        self._config = config
        self._records = records
        self._admin_token = None if admin_token is None else admin_token.encode()
        self._keys = KeyStore(database)
        self._tokens = TokenVerifier(config.tokens) if config.enabled else None
        self._pepper = read_pepper(config.pepper_variable, records.path) if config.enabled else None
        self._cache: dict[bytes, _Cached] = {}
        self._revocations = Revocations(self._keys, config.revocation_poll_s, self._forget)

    async def authenticate(self, authorization: str | None) -> Identity:
        """Who shows a value of the header (or gRPC metadata) ``authorization``.

        Without access control everybody is LOCAL, whatever they show; the admin token alone counts.

        Raises:
            AuthenticationError: nobody known. The same for all causes.
            RecordsError: the records do not answer, so nobody can tell.
        """
        scheme, _, bearer = (authorization or "").partition(" ")
        return await self.of_bearer(bearer.strip() if scheme.lower() == "bearer" else "")

    async def of_bearer(self, bearer: str) -> Identity:
        """The same of a key or token by itself."""
        if self._is_admin_token(bearer):
            return _ADMIN
        if not self.is_enabled:
            return LOCAL
        if not 0 < len(bearer) <= MAX_TOKEN_BYTES or not bearer.isascii():
            raise _nobody()
        if bearer.startswith(PREFIX):
            return read_job_token(bearer, self._own_pepper())
        digest, now = hashlib.sha256(bearer.encode()).digest(), time.time()
        cached = self._cache.get(digest)
        if cached is not None and now < cached.until:
            return cached.identity
        self._cache.pop(digest, None)
        identity = await self._look_up(bearer)
        self._remember(digest, identity, now)
        return identity

    def while_valid(self, identity: Identity, *, until_expiry: bool = False) -> AbstractAsyncContextManager[None]:
        """See ``Revocations.while_valid``."""
        if identity.key_id is None and not until_expiry:
            return nullcontext()  # nothing can end it
        return self._revocations.while_valid(identity, until_expiry=until_expiry)

    async def create_key(self, grant: KeyGrant) -> tuple[ApiKey, KeyRecord]:
        """See ``KeyStore.create``."""
        return await self._keys.create(grant, self._own_pepper())

    async def rotate_key(self, key_id: str, overlap_s: float) -> tuple[ApiKey, KeyRecord]:
        """See ``KeyStore.rotate``."""
        rotated = await self._keys.rotate(key_id, self._own_pepper(), overlap_s)
        self._forget(frozenset({key_id}))  # it expires sooner now
        return rotated

    async def revoke_key(self, key_id: str) -> KeyRecord:
        """See ``KeyStore.revoke``; what runs on it here ends at once, on other replicas at their next poll."""
        record = await self._keys.revoke(key_id)
        self._revocations.end({key_id})
        return record

    async def list_keys(self, owner: str | None = None) -> list[KeyRecord]:
        """See ``KeyStore.list``."""
        return await self._keys.list(owner)

    def start(self) -> None:
        """Begin to ask what was revoked, if there is access control."""
        if self.is_enabled:
            self._revocations.start()

    async def stop(self) -> None:
        """The end of ``start``."""
        await self._revocations.stop()

    def _is_admin_token(self, bearer: str) -> bool:
        return self._admin_token is not None and secrets.compare_digest(bearer.encode(), self._admin_token)

    async def _look_up(self, bearer: str) -> Identity:
        key = ApiKey.parse(bearer)
        if key is None:
            assert self._tokens is not None
            return self._tokens.identity(bearer)
        record = await self._keys.find(key.id)
        is_known = record is not None and key.has_digest(record.digest, self._own_pepper())
        if record is None or not is_known or not record.is_live(time.time()):
            raise _nobody()
        return record.identity

    def _remember(self, digest: bytes, identity: Identity, now: float) -> None:
        if len(self._cache) >= _MAX_CACHED:
            del self._cache[next(iter(self._cache))]  # the oldest
        until = min(now + self._config.cache_s, identity.expires_at or float("inf"))
        self._cache[digest] = _Cached(identity, until)

    def _forget(self, key_ids: frozenset[str]) -> None:
        if key_ids:
            self._cache = {k: each for k, each in self._cache.items() if each.identity.key_id not in key_ids}

    def _own_pepper(self) -> bytes:
        if self._pepper is None:  # keys may be made before access is switched on
            self._pepper = read_pepper(self._config.pepper_variable, self._records.path)
        return self._pepper


def require_scope(identity: Identity, scope: Scope) -> None:
    """Raises PermissionDeniedError where an identity lacks a scope."""
    if not identity.may(scope):
        raise PermissionDeniedError(f"This key or token lacks the scope {scope.value!r}.", code="insufficient_scope")


def require_model(identity: Identity, model: str) -> None:
    """Raises PermissionDeniedError where an identity may not use a model, whether or not there is such a model."""
    if not identity.may_use(model):
        message = f"This key or token may not use the model {model!r}."
        raise PermissionDeniedError(message, code="model_not_allowed", param="model")


def _nobody() -> AuthenticationError:
    return AuthenticationError(INVALID)

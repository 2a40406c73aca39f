"""What a worker of another process shows for the owner of a job: short-lived, and for inference alone.

Signed under the pepper, which server and workers share and the database does not hold.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from typing import Final

from apt_serve.access.errors import INVALID, AuthenticationError
from apt_serve.access.identity import Identity, Scope

PREFIX: Final = "aptjob."
LIFETIME_S: Final = 60.0
_LEEWAY_S: Final = 30.0
"""How far the clocks of worker and server may differ."""
_PURPOSE: Final = b"apt job token v1\0"
"""Keeps what is signed here apart from what the pepper is for otherwise."""


def make_job_token(identity: Identity, pepper: bytes) -> str:
    """A token that admits requests of an owner's job for the next minute."""
    models = None if identity.models is None else sorted(identity.models)
    claims = {"o": identity.owner, "m": models, "c": identity.tenant_class, "e": time.time() + LIFETIME_S}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
    return f"{PREFIX}{payload}.{_signature(payload, pepper)}"


def read_job_token(token: str, pepper: bytes) -> Identity:
    """Whom it is for.

    Raises:
        AuthenticationError: it is not one of ours, or no longer valid.
    """
    payload, _, signature = token.removeprefix(PREFIX).partition(".")
    if not token.startswith(PREFIX) or not hmac.compare_digest(
        signature.encode(), _signature(payload, pepper).encode()
    ):
        raise AuthenticationError(INVALID)
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload))
    except (ValueError, binascii.Error):
        raise AuthenticationError(INVALID) from None
    if claims["e"] < time.time() - _LEEWAY_S:
        raise AuthenticationError(INVALID)
    models = None if claims["m"] is None else frozenset(claims["m"])
    return Identity(claims["o"], frozenset({Scope.INFERENCE}), models=models, tenant_class=claims["c"], is_job=True)


def _signature(payload: str, pepper: bytes) -> str:
    return hmac.digest(pepper, _PURPOSE + payload.encode(), hashlib.sha256).hex()

"""Why somebody may not come in, whatever door they stand at."""

from __future__ import annotations

from apt_core.errors import AptError

INVALID = "The API key or token is missing or not valid; send it as Authorization: Bearer ..."
"""Said of every failure to prove who one is: which part was wrong helps an attacker alone."""


class AuthenticationError(AptError):
    """Nobody known: the key or token is missing, wrong, expired or revoked. The message tells a stranger nothing."""


class PermissionDeniedError(AptError):
    """Somebody known who may not do this.

    Args:
        message: what is lacking.
        code: error code on the wire.
        param: name of the request field at fault, where there is one.
    """

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class KeyNotFoundError(AptError):
    """There is no such API key."""


class TooManyKeysError(AptError):
    """An owner has as many live keys of a name as it may have."""

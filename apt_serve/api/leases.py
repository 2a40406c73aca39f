"""Leases on further models that requests hold until their answers have been sent."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_serve.models.slots import Lease

_STATE_KEY = "model_leases"


def leases_of(connection: HTTPConnection) -> list[Lease]:
    """What a request holds; ``LeaseMiddleware`` releases what is put here."""
    leases: list[Lease] = connection.scope["state"][_STATE_KEY]
    return leases


class LeaseMiddleware:
    """Releases a request's leases when its answer has been sent, or cannot be, whatever has gone wrong.

    A handler returns before its stream begins, so that it cannot do it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        leases: list[Lease] = []
        scope.setdefault("state", {})[_STATE_KEY] = leases
        try:
            await self._app(scope, receive, send)
        finally:
            for lease in leases:
                lease.release()

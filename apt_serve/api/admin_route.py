"""Routes for administrators."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from apt_serve.access.identity import Scope
from apt_serve.api.access import require_access
from apt_serve.api.json_route import JsonRoute

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class AdminRoute(APIRoute):
    """A route for whoever has the scope admin; nothing is read of anybody else's request but its header."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler behind the check."""
        return _for_admins(super().get_route_handler())


class AdminJsonRoute(JsonRoute):
    """The same with a JSON body."""

    def get_route_handler(self) -> Handler:
        """JsonRoute's handler behind the check."""
        return _for_admins(super().get_route_handler())


def _for_admins(handle: Handler) -> Handler:
    async def check(request: Request) -> Response:
        require_access(request, Scope.ADMIN)
        return await handle(request)

    return check

"""Who a request is from: found before its body is read, asked for by the handlers."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import Depends
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from apt_serve.access.authenticator import Authenticator, require_scope
from apt_serve.access.errors import INVALID, AuthenticationError
from apt_serve.access.identity import LOCAL, Identity
from apt_serve.access.identity import Scope as AccessScope
from apt_serve.api.errors import ApiError, as_api_error

PUBLIC_PATHS = frozenset({"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""For everybody, also with access control; and what lies below /static-offline-docs, which /docs is made of."""
PUBLIC_FOLDER = "/static-offline-docs/"
_SECRET_PARAMETERS = frozenset({"token", "access_token", "api_key", "apikey", "key", "authorization"})


class AccessMiddleware:
    """Puts an Identity into the scope of every request, or answers 401 before any of its body is read.

    A scope that has an identity already was made by this server itself. With access control a WebSocket may come
    without a header and name its token in the first message; its scope then has none.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator, public_metrics: bool) -> None:
        self._app = app
        self._authenticator = authenticator
        self._public = PUBLIC_PATHS | {"/metrics"} if public_metrics else PUBLIC_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] in ("http", "websocket"):
            state = scope.setdefault("state", {})
            if "identity" not in state and not self._is_open(scope):
                try:
                    state["identity"] = await self._identify(scope)
                except Exception as error:
                    response = as_api_error(error).response()
                    if scope["type"] == "http":
                        await response(scope, receive, send)
                    else:
                        await WebSocket(scope, receive, send).send_denial_response(response)
                    return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if not self._authenticator.is_enabled:
            return False
        if scope["type"] == "websocket":
            return not Headers(scope=scope).getlist("authorization") and not _names_a_secret(scope)
        path: str = scope["path"]
        is_public = path in self._public or path.startswith(PUBLIC_FOLDER)
        return is_public and scope["method"] in ("GET", "HEAD")

    async def _identify(self, scope: Scope) -> Identity:
        if self._authenticator.is_enabled and _names_a_secret(scope):
            # An address is written to logs and histories on its way, so what is in it is no secret any more.
            raise ApiError(
                401, "A key or token must not be in the URL.", type="authentication_error", code="key_in_url"
            )
        given = Headers(scope=scope).getlist("authorization")
        return await self._authenticator.authenticate(given[0] if len(given) == 1 else None)


def _names_a_secret(scope: Scope) -> bool:
    query = scope.get("query_string", b"")
    return bool(query) and any(
        name.lower() in _SECRET_PARAMETERS for name, _ in parse_qsl(query.decode("latin-1"), True)
    )


def identity_of(connection: HTTPConnection) -> Identity:
    """The caller that a connection was found to be from.

    Raises:
        AuthenticationError: it has shown nothing yet.
    """
    identity: Identity | None = connection.scope["state"].get("identity")
    if identity is None:
        raise AuthenticationError(INVALID)
    return identity


Caller = Annotated[Identity, Depends(identity_of)]


def needs(scope: AccessScope, *or_one_of: AccessScope) -> Any:
    """A dependency that lets only callers with a scope pass: ``APIRouter(dependencies=[needs(Scope.JOBS)])``."""

    def check(connection: HTTPConnection) -> None:
        if not any(identity_of(connection).may(other) for other in or_one_of):
            require_access(connection, scope)

    return Depends(check)


def require_access(connection: HTTPConnection, scope: AccessScope) -> None:
    """Let only callers with a scope pass.

    Raises:
        AuthenticationError: nobody known.
        PermissionDeniedError: it lacks the scope.
        ApiError: there is no access control, and this is for the admin token alone.
    """
    caller = identity_of(connection)
    if caller is LOCAL and not caller.may(scope):
        raise ApiError(
            401,
            "This needs the admin token: Authorization: Bearer ...",
            type="authentication_error",
            code="invalid_admin_token",
            headers={"WWW-Authenticate": "Bearer"},
        )
    require_scope(caller, scope)

"""The coarse limit of each address, before anything is read or known of a request; in the memory of this replica."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import RateLimitItemPerMinute
from slowapi import Limiter
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from apt_serve.api.errors import ApiError, rate_limited
from apt_serve.limits.config import LimitsConfig

_EXEMPT = frozenset({"/health", "/ready"})
"""Whoever watches the server must not be told that it is busy."""
_NAMESPACE = "address"
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AddressLimit:
    """Counts the requests of each address in the last minute.

    slowapi's own middlewares know no WebSockets, and its ASGI one repeats the response's start before every chunk of a
    stream (0.1.10): this asks its limiter. That keeps a moving window in memory and never waits.

    Args:
        config: with a limit for addresses.
    """

    def __init__(self, config: LimitsConfig) -> None:
        assert config.requests_per_minute_per_address is not None
        self._limit = RateLimitItemPerMinute(config.requests_per_minute_per_address)
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in config.trusted_proxies)
        self._limiter = Limiter(key_func=self._address, strategy="moving-window", storage_uri="memory://").limiter

    def refusal(self, scope: Scope) -> ApiError | None:
        """Count a request; what it is answered if that is one too many."""
        address = client_address(scope, self._proxies)
        if self._limiter.hit(self._limit, _NAMESPACE, address):
            return None
        reset_at = self._limiter.get_window_stats(self._limit, _NAMESPACE, address).reset_time
        seconds = max(1, math.ceil(reset_at - time.time()))
        message = (
            f"Rate limit reached for requests per minute of one address: limit {self._limit.amount}. "
            f"Try again in {seconds} s."
        )
        return rate_limited(message, {"Retry-After": str(seconds)})

    def _address(self, connection: HTTPConnection) -> str:
        return client_address(connection.scope, self._proxies)


class AddressLimitMiddleware:
    """Answers 429 to an address that has asked too often in the last minute."""

    def __init__(self, app: ASGIApp, config: LimitsConfig) -> None:
        self._app = app
        self._limit = AddressLimit(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        is_own = "identity" in scope.get("state", {})  # of a job, made in this process
        if scope["type"] not in ("http", "websocket") or scope["path"] in _EXEMPT or is_own:
            await self._app(scope, receive, send)
            return
        refusal = self._limit.refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        answer = refusal.response()
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(answer)
        else:
            await answer(scope, receive, send)


def client_address(scope: Scope, proxies: tuple[_Network, ...]) -> str:
    """Whom a connection is from: its other end or, as long as that is a trusted proxy, whom the proxy names.

    The last entry of X-Forwarded-For is what the nearest proxy has added; those before it may be the client's own. An
    IPv6 client may use all addresses of its /64, so that counts as one.
    """
    peer = scope.get("client")
    address = peer[0] if peer else ""
    forwarded = [part.strip() for line in Headers(scope=scope).getlist("x-forwarded-for") for part in line.split(",")]
    while forwarded and _is_within(address, proxies):
        address = forwarded.pop()
    return _network_of(address)


def _is_within(address: str, networks: tuple[_Network, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _network_of(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)

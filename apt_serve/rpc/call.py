"""One call from its arrival to its status: whom it is from, what is noted of it, how its errors are told."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message
from grpc import StatusCode

from apt_serve.access.authenticator import require_scope
from apt_serve.access.identity import Identity, Scope
from apt_serve.api.address_limit import AddressLimit
from apt_serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError
from apt_serve.api.state import ApiState
from apt_serve.rpc.errors import Metadata, Status, as_status
from apt_serve.rpc.register import Undecodable
from apt_serve.telemetry.exchange import Exchange

T = TypeVar("T")

METHOD = "GRPC"
"""Of calls in metrics, access log and traces, where HTTP requests have their own."""
REQUEST_ID = "x-request-id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Context(Protocol):
    """What grpc.aio's context and Ray Serve's have in common."""

    def invocation_metadata(self) -> Any:
        """The client's: pairs of a name in lower case and a value."""

    def peer(self) -> str:
        """The connection's other end, such as ipv4:127.0.0.1:5000."""

    def set_code(self, code: StatusCode) -> None:
        """The status the call ends with."""

    def set_details(self, details: str) -> None:
        """Its message."""

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """What is sent with the status, all at once. A list, which Serve adds its own to."""


class WritingContext(Context, Protocol):
    """That of a call that is answered with many messages."""

    async def write(self, message: Any) -> None:
        """Send a message; returns when the client's side has room for more."""


_NOBODY = Identity("", frozenset())


class Call:
    """What a handler needs besides its message."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self.caller = _NOBODY
        self.exchange = exchange
        self.limits: dict[str, str] = {}
        """Where the caller's limits stand, once something was taken."""
        self._context = context

    @property
    def request_id(self) -> str:
        """The client's, or one made here."""
        return self.exchange.request_id

    def send_trailers(self, more: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Say what is known by now; later words take the place of earlier ones.

        To be called before a message is handed over: Ray Serve takes what was set until then.
        """
        trailers: Metadata = [(REQUEST_ID, self.request_id)]
        if self.exchange.traceparent is not None:
            trailers.append(("traceparent", self.exchange.traceparent))
        given = dict(more)
        trailers += [(name.lower(), value) for name, value in self.limits.items() if name.lower() not in given]
        self._context.set_trailing_metadata([*trailers, *given.items()])

    def fail(self, status: Status) -> None:
        """End with an error."""
        self.exchange.status = status.http_status
        self._context.set_code(status.code)
        self._context.set_details(status.message)
        self.send_trailers(status.trailers)

    def wrote(self) -> None:
        """A message was handed over."""
        if self.exchange.first_byte_at is None:
            self.exchange.first_byte_at = time.monotonic()


class Calls:
    """Makes a Call of every call that comes.

    Args:
        state: of the application that HTTP requests come to.
    """

    def __init__(self, state: ApiState) -> None:
        self._state = state
        limits = state.config.limits
        self._addresses = AddressLimit(limits) if limits.requests_per_minute_per_address is not None else None

    async def run(
        self,
        route: str,
        request: Message | Undecodable,
        context: Context,
        handle: Callable[[Call], Awaitable[T]],
        names: Mapping[str, str] | None = None,
    ) -> T | None:
        """Handle a call; None where that failed, and then the context has the status.

        Args:
            route: the method's full name.
            request: its message; handle is asked only if it is one.
            context: of the transport.
            handle: its errors become the call's status.
            names: what the message calls the fields that errors may name.
        """
        metadata = _readable(context.invocation_metadata())
        offered = getattr(request, "request_id", "") if route.endswith(_NAMED) else ""
        exchange = Exchange(_request_id(offered, metadata), METHOD, _address(context), route)
        with self._state.observer.follow(exchange, metadata):
            call = Call(context, exchange)
            try:
                exchange.caller = call.caller = await self._admit(request, context, metadata, offered)
                answer = await handle(call)
            except asyncio.CancelledError:
                exchange.status = 504 if _is_overdue(context) else CLIENT_CLOSED_REQUEST
                raise
            except Exception as error:
                status = as_status(error, names)
                self._state.metrics.rejected(status.reason, exchange.model)
                call.fail(status)
                return None
            exchange.status = 200
            return answer

    async def _admit(
        self, request: Message | Undecodable, context: Context, metadata: Mapping[str, str], offered: str
    ) -> Identity:
        """Whom a call is from, if it may be handled at all.

        Raises:
            ApiError: it comes from an address that asked too often, or is too large, or its id is none.
            AuthenticationError, PermissionDeniedError: nobody known, or somebody who may not generate.
        """
        if self._addresses is not None:
            forwarded = metadata.get("x-forwarded-for", "").encode("latin-1", "replace")
            headers = [(b"x-forwarded-for", forwarded)] if forwarded else []
            refusal = self._addresses.refusal({"type": "http", "client": (_address(context), 0), "headers": headers})
            if refusal is not None:
                raise refusal
        shown = [value for name, value in context.invocation_metadata() if name == "authorization"]
        is_one = len(shown) == 1 and isinstance(shown[0], str)
        caller = await self._state.access.authenticate(shown[0] if is_one else None)
        require_scope(caller, Scope.INFERENCE)
        if isinstance(request, Undecodable):
            raise ApiError(400, f"The bytes are no such message: {request.problem}", code="invalid_message")
        max_bytes = self._state.config.api.max_body_bytes
        if request.ByteSize() > max_bytes:  # where the transport's own limit is another
            raise ApiError(413, f"The message is larger than {max_bytes} bytes.", code="request_too_large")
        if offered and not _SANE_REQUEST_ID.fullmatch(offered):
            message = "request_id: letters, digits and ._:/+=@- , at most 128"
            raise ApiError(400, message, param="request_id", code="invalid_value")
        return caller


_NAMED = ("/Generate", "/GenerateStream", "/Chat")
"""Methods whose request_id names the call itself."""


def _readable(metadata: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {name: value for name, value in metadata if isinstance(value, str)}


def _request_id(offered: str, metadata: Mapping[str, str]) -> str:
    for given in (offered, metadata.get(REQUEST_ID, "")):
        if _SANE_REQUEST_ID.fullmatch(given):
            return given
    return uuid.uuid4().hex


def _address(context: Context) -> str:
    """Of the connection's other end, without its port."""
    kind, _, rest = context.peer().partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]")


def _is_overdue(context: Context) -> bool:
    """Whether the client's deadline has passed; Ray Serve does not tell."""
    remaining = context.time_remaining() if hasattr(context, "time_remaining") else None
    return remaining is not None and remaining <= 0

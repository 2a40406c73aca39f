"""Routes that take a JSON body, read strictly: valid UTF-8, no NaN, no lone surrogates, bounded nesting."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from apt_serve.api.errors import ApiError


class JsonRoute(APIRoute):
    """A route whose body FastAPI validates only once it is known to be sound JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, over a stricter request."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            _require_json(request.headers.get("content-type", ""))
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_json


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body; Python's own parser would let NaN and lone surrogates through, which nothing can encode again."""
        return parse_json(await self.body())


def parse_json(data: bytes | str) -> Any:
    """Sound JSON as Python values.

    Raises:
        ApiError: it is not.
    """
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"This is not valid JSON: {error}", code="invalid_json") from None


def _require_json(content_type: str) -> None:
    # Browsers send other types across origins without asking first (CORS), so they must not be taken for JSON.
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json.", code="unsupported_media_type")

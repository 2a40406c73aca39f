"""What /openapi.json and /docs say beyond the schemas."""

from __future__ import annotations

from typing import Any, Final

from apt_serve.api.schemas.common import ErrorResponse

Responses = dict[int | str, dict[str, Any]]

_DESCRIPTIONS: Final = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key or token is missing or not valid.",
    403: "The key or token may not do this, or use this model; or the path is not one that may be loaded.",
    404: "No such model, key, file, batch or job.",
    409: "It cannot be done in the state that things are in, or an owner has too many keys.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "A limit is reached; try again after `Retry-After` seconds, if it is there.",
    500: "The engine failed; not the request's fault.",
    503: "Overloaded, starting or stopping; try again after `Retry-After` seconds.",
    504: "Not finished within the server's time limit.",
}


def errors(*statuses: int) -> Responses:
    """Error responses of a route."""
    return {status: {"model": ErrorResponse, "description": _DESCRIPTIONS[status]} for status in statuses}


def answer(description: str, media_type: str) -> Responses:
    """The success of a route that has no schema."""
    return {200: {"description": description, "content": {media_type: {}}}}


_STREAM: Final[Responses] = {
    200: {
        "description": "The whole answer or, with `stream`, server-sent events that end with `data: [DONE]`.",
        "content": {"text/event-stream": {}},
    }
}

BODY_ERRORS: Final = errors(400, 401, 403, 404, 413, 415)
"""Of a route that takes a JSON body."""

GENERATION_ERRORS: Final = _STREAM | errors(400, 401, 403, 404, 413, 415, 429, 500, 503, 504)
"""Of a route that generates."""

TITLE: Final = "APT"
DESCRIPTION: Final = """
A server for large language models. The `/v1` endpoints speak OpenAI's protocol, so OpenAI's clients work unchanged;
names that OpenAI lacks are vLLM's (`top_k`, `min_p`, `stop_token_ids`, ...). Tokens can also be streamed over a
WebSocket at `/ws/generate`, see docs/websocket.md.

Every error has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. Fields APT does not know are refused
by name, never silently dropped. Every response carries an `X-Request-ID`, the client's own if it sent one.
"""
TAGS: Final = [
    {"name": "OpenAI", "description": "OpenAI's protocol."},
    {"name": "Simple", "description": "The same in fewer words."},
    {"name": "Jobs", "description": "Work that outlives its request: files, batches and jobs."},
    {"name": "Tokenization", "description": "Texts to token ids and back."},
    {"name": "Operations", "description": "Health, readiness and metrics."},
]

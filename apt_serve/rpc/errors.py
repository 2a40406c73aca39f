"""Every error as gRPC says it: a status, its message, and details that programs can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from apt_core.errors import AptError
from apt_serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error

DOMAIN = "apt"
"""Of the reasons in google.rpc.ErrorInfo."""
DETAILS_KEY = "grpc-status-details-bin"
"""Where gRPC looks for google.rpc.Status."""
MAX_MESSAGE = 1024
"""Characters: metadata are limited to 8 KiB, and all of them may be three bytes on the wire."""

_CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    409: StatusCode.ALREADY_EXISTS,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_CLOSED_REQUEST: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
_TRAILERS = ("retry-after", "x-ratelimit-")
"""Headers of HTTP's answer that are metadata of gRPC's."""

Metadata = list[tuple[str, str | bytes]]


class GenerationCancelledError(AptError):
    """The caller named this generation in Cancel."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call failed."""

    code: StatusCode
    message: str
    trailers: Metadata
    http_status: int
    """Of the same error over HTTP, for logs and metrics."""
    reason: str
    """A label for metrics, out of a small set."""


def as_status(error: BaseException, names: Mapping[str, str] | None = None) -> Status:
    """What a client is told of an exception; one that nobody foresaw is logged and tells nothing of the inside.

    Args:
        error: anything.
        names: what the client calls the fields that the error may name.
    """
    if isinstance(error, GenerationCancelledError):
        answer = ApiError(CLIENT_CLOSED_REQUEST, str(error), code="cancelled")
    else:
        answer = as_api_error(error)
    code = _CODES.get(answer.status_code, StatusCode.INTERNAL)
    message = answer.message[:MAX_MESSAGE]
    headers = {name.lower(): value for name, value in (answer.headers or {}).items()}
    trailers: Metadata = [(name, value) for name, value in headers.items() if name.startswith(_TRAILERS)]
    details = _details(code, message, answer, headers.get("retry-after"), names or {})
    trailers.append((DETAILS_KEY, details.SerializeToString()))
    return Status(code, message, trailers, answer.status_code, answer.reason)


def _details(
    code: StatusCode, message: str, answer: ApiError, retry_after: str | None, names: Mapping[str, str]
) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=answer.reason.upper(), domain=DOMAIN))
    if answer.param is not None:
        first, dot, rest = answer.param[:MAX_MESSAGE].partition(".")
        field = names.get(first, first) + dot + rest
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(math.ceil(float(retry_after)))
        status.details.add().Pack(retry)
    return status

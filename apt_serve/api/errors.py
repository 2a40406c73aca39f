"""Every error as OpenAI writes it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from apt_core.errors import AptError, InvalidRequestError
from apt_serve.access.errors import AuthenticationError, KeyNotFoundError, PermissionDeniedError, TooManyKeysError
from apt_serve.api.schemas.common import ErrorBody, ErrorResponse
from apt_serve.engine.client import (
    EngineOverloadedError,
    EngineStoppedError,
    GenerationFailedError,
    WeightsReplacedError,
)
from apt_serve.limits.limiter import RateLimitedError
from apt_serve.models.errors import ModelBusyError, ModelInUseError, ModelLoadError, ModelTooLargeError
from apt_serve.records.database import RecordsError
from apt_serve.telemetry.exchange import CURRENT

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's status for a client that left before the answer; only logs see it."""


class ApiError(HTTPException):
    """An answer other than success. A subclass of HTTPException so that FastAPI lets it pass while it reads a body."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    @property
    def reason(self) -> str:
        """A label for metrics, out of a small set."""
        return self.code or self.type

    def body(self) -> ErrorResponse:
        """The error on the wire."""
        return ErrorResponse(error=ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code))

    def response(self) -> Response:
        """The error as an HTTP response."""
        return Response(self.body().to_json(), self.status_code, self.headers, media_type="application/json")


class RequestTimeoutError(Exception):
    """A request did not finish within the server's time limit."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request did not finish within {limit_s:g} seconds.")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception; one that nobody foresaw is logged and tells nothing of the inside."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case RequestValidationError():  # says first whether it was in the body or the query
            return _from_validation(error.errors(), first=1)
        case ValidationError():
            return _from_validation(error.errors())
        case RateLimitedError():
            return rate_limited(str(error), error.headers)
        case EngineOverloadedError():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(503, str(error), type="overloaded_error", code="engine_overloaded", headers=headers)
        case EngineStoppedError():
            headers = {"Retry-After": "1"}
            return ApiError(503, str(error), type="overloaded_error", code="engine_stopped", headers=headers)
        case WeightsReplacedError():
            headers = {"Retry-After": "1"}
            return ApiError(503, str(error), type="server_error", code="weights_replaced", headers=headers)
        case GenerationFailedError():
            return ApiError(500, str(error), type="server_error", code="engine_error")
        case ModelBusyError() | ModelLoadError() | ModelInUseError():
            return _from_models(error)
        case AuthenticationError() | PermissionDeniedError() | KeyNotFoundError() | TooManyKeysError():
            return _from_access(error)
        case RecordsError():
            headers = {"Retry-After": "1"}
            logger.error("%s", error)  # it may name hosts and folders, which are none of the client's business
            message = "The server's records are not available."
            return ApiError(503, message, type="server_error", code="records_unavailable", headers=headers)
        case RequestTimeoutError():
            return ApiError(504, str(error), type="timeout_error", code="request_timeout")
        case HTTPException():
            return _from_http(error)
    exchange = CURRENT.get()
    logger.error("request %s failed by a fault of the server's", exchange and exchange.request_id, exc_info=error)
    return ApiError(500, "The server failed to answer.", type="server_error", code="internal_error")


def rate_limited(message: str, headers: Mapping[str, str]) -> ApiError:
    """The answer to whoever has taken what it may take."""
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def model_not_found(name: str) -> ApiError:
    """The answer to a model name that is not served."""
    return ApiError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")


@contextmanager
def wire_names(names: Mapping[str, str]) -> Iterator[None]:
    """Let an InvalidRequestError raised inside name the field as the client wrote it."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param is not None and error.param in names:
            error.param = names[error.param]
        raise


def _from_access(error: AptError) -> ApiError:
    match error:
        case PermissionDeniedError():
            return ApiError(403, str(error), type="permission_error", param=error.param, code=error.code)
        case KeyNotFoundError():
            return ApiError(404, str(error), code="key_not_found")
        case TooManyKeysError():
            return ApiError(409, str(error), code="too_many_keys")
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, str(error), type="authentication_error", code="invalid_api_key", headers=headers)


def _from_models(error: AptError) -> ApiError:
    match error:
        case ModelBusyError():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            message, kind = str(error), "overloaded_error"
            return ApiError(503, message, type=kind, param="model", code="model_busy", headers=headers)
        case ModelLoadError():
            # Why may name files: that is for the log and /admin/models. How large it is may be told.
            message = f"The model {error.name!r} could not be loaded."
            if isinstance(error, ModelTooLargeError):
                message = str(error)
            return ApiError(503, message, type="server_error", param="model", code="model_load_failed")
    return ApiError(409, str(error), code="model_in_use")


def _from_http(error: HTTPException) -> ApiError:
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)


def _from_validation(errors: Sequence[Any], first: int = 0) -> ApiError:
    """The first error; its path from part ``first`` on, without union tags (in brackets) and pydantic's "[key]"."""
    error = errors[0]
    path = [str(part) for part in error["loc"][first:]]
    param = ".".join(part for part in path if part[:1] not in ("(", "[")) or None
    kind, message = error["type"], error["msg"]
    if param is None and kind in ("missing", "model_type", "model_attributes_type"):
        return ApiError(400, "The body must be a JSON object.", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field: {param}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param}: this field is required", param=param, code="missing_required_parameter")
    code = kind if kind == "unsupported_parameter" else "invalid_value"
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)

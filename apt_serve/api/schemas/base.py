"""The base of every request and response, and how a request refuses an option APT does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticOmit, core_schema
from starlette.responses import Response

_MAX_FIELDS = 256


class RequestSchema(BaseModel):
    """A body from a client: no coercion, no unknown fields, null means left out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, data: Any) -> Any:
        # Each unknown field costs an error of its own: a body full of them would hold up everybody.
        if isinstance(data, dict) and len(data) > _MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "Input should have at most {max} fields", {"max": _MAX_FIELDS})
        return data


class ResponseSchema(BaseModel):
    """A body to a client. Only fields that were set are written, so null is written where OpenAI writes it."""

    def to_json(self) -> bytes:
        """The body's bytes."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)

    def response(self) -> Response:
        """The body as an HTTP response."""
        return Response(self.to_json(), media_type="application/json")


def example(**body: Any) -> ConfigDict:
    """The body that /docs offers to try; without it, Swagger makes one up of all fields at once."""
    return ConfigDict(json_schema_extra={"examples": [body]})


@dataclass(frozen=True)
class Refuse:
    """Annotates a field of OpenAI's that APT does not have: any value is refused but null and the neutral ones."""

    reason: str
    """What the client reads."""
    neutral: tuple[Any, ...] = ()
    """Values that ask for nothing, which some clients always send."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        raise PydanticOmit  # not part of what we offer

    def _validate(self, value: Any) -> None:
        # Compared with their types: True == 1 and 0.0 == 0 in Python, but not on the wire.
        neutral = any(type(value) is type(known) and value == known for known in self.neutral)
        if value is not None and not neutral:
            raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": self.reason})

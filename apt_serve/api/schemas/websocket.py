"""Messages of /ws/generate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from apt_serve.api.schemas.base import RequestSchema, ResponseSchema
from apt_serve.api.schemas.chat import ChatTokenLogprob, Messages
from apt_serve.api.schemas.common import CacheSalt, ErrorBody, LogprobCount, SamplingFields, TokenIds, Usage
from apt_serve.engine.client import FinishReason

GenerationId = Annotated[str, Field(min_length=1, max_length=128)]


def _prompt_kind(prompt: Any) -> str | None:
    return "(text)" if isinstance(prompt, str) else "(tokens)" if isinstance(prompt, list) else None


Prompt = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[TokenIds, Tag("(tokens)")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string or a list of token ids",
    ),
]


class GenerateMessage(SamplingFields):
    """Client: start a generation, from exactly one of prompt and messages."""

    type: Literal["generate"]
    id: GenerationId
    model: str | None = None
    prompt: Prompt | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    logprobs: LogprobCount | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: CacheSalt | None = None


class CancelMessage(RequestSchema):
    """Client: end a generation."""

    type: Literal["cancel"]
    id: GenerationId


class AuthenticateMessage(RequestSchema):
    """Client: its API key or token, first of all messages, where it cannot send a header."""

    type: Literal["authenticate"]
    token: str = Field(min_length=1, max_length=8192, repr=False)


class PongMessage(RequestSchema):
    """Client: everything up to ping n was read."""

    type: Literal["pong"]
    n: int


ClientMessage = Annotated[
    Annotated[GenerateMessage, Tag("(generate)")]
    | Annotated[CancelMessage, Tag("(cancel)")]
    | Annotated[PongMessage, Tag("(pong)")]
    | Annotated[AuthenticateMessage, Tag("(authenticate)")],
    Discriminator(
        lambda message: f"({message.get('type')})" if isinstance(message, dict) else None,
        custom_error_type="message_type",
        custom_error_message="A message is a JSON object with a type: generate, cancel, pong or authenticate",
    ),
]


class StartMessage(ResponseSchema):
    """Server: the first tokens are there."""

    type: Literal["start"]
    id: str
    model: str
    created: int
    prompt_tokens: int
    weight_version: str


class TokensMessage(ResponseSchema):
    """Server: what is new of one choice."""

    type: Literal["tokens"]
    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[ChatTokenLogprob] | None = None


class FinishedChoice(ResponseSchema):
    """How a choice ended."""

    index: int
    finish_reason: FinishReason
    stop_reason: int | str | None


class FinishMessage(ResponseSchema):
    """Server: the generation is over; its id is free again."""

    type: Literal["finish"]
    id: str
    choices: list[FinishedChoice]
    usage: Usage


class ErrorMessage(ResponseSchema):
    """Server: a message was refused, or a generation failed."""

    type: Literal["error"]
    id: str | None
    error: ErrorBody


class PingMessage(ResponseSchema):
    """Server: answer with a pong once everything before this was read."""

    type: Literal["ping"]
    n: int

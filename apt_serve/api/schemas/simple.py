"""The small endpoints: /generate, models, tokenization, health."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apt_serve.api.schemas.base import RequestSchema, ResponseSchema, example
from apt_serve.api.schemas.chat import Messages
from apt_serve.api.schemas.common import TokenId


class GenerateRequest(RequestSchema):
    """Continue a text, the simplest way."""

    model_config = example(text="The capital of France is", max_length=16, temperature=0)

    model: str | None = None
    text: str
    max_length: int = Field(128, ge=1, description="Most tokens to generate.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most likely token.")


class GenerateResponse(ResponseSchema):
    """The continuation, without the text itself."""

    generated_text: str
    tokens: int
    """Tokens generated."""
    latency_ms: float
    """From the request's arrival to its last token."""
    weight_version: str


class ModelCard(ResponseSchema):
    """A served model, as OpenAI lists it."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    """Null while it is not loaded."""
    weight_version: str | None
    """Of the weights that new requests start on; null while it is not loaded."""
    loaded: bool
    """Or else its next request waits until it is."""


class ModelList(ResponseSchema):
    """All served models."""

    object: str
    data: list[ModelCard]


class ModelSummary(ResponseSchema):
    """A served model, for people."""

    name: str
    loaded: bool
    """What is null or empty is not known while it is not."""
    max_model_len: int | None
    weight_version: str | None
    vocab_size: int | None
    has_chat_template: bool | None
    capabilities: list[str]


class ModelSummaries(ResponseSchema):
    """All served models; requests that name none go to the first."""

    models: list[ModelSummary]


class TokenizeRequest(RequestSchema):
    """A text or a conversation to turn into token ids; exactly one of the two."""

    model_config = example(prompt="Hello")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's own prefix, such as BOS (default: true for prompt, false for messages)."
    )


class TokenizeResponse(ResponseSchema):
    """The token ids."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(RequestSchema):
    """Token ids to turn into text."""

    model_config = example(tokens=[1, 2, 3])

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True)]


class DetokenizeResponse(ResponseSchema):
    """The text, special tokens included."""

    prompt: str


class HealthResponse(ResponseSchema):
    """The server works."""

    status: str

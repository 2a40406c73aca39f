"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from apt_serve.api.schemas.base import Refuse, ResponseSchema, example
from apt_serve.api.schemas.common import GenerationFields, LogprobCount, TokenIds, Usage
from apt_serve.engine.client import FinishReason

MAX_PROMPTS = 1024
"""Prompts, and prompts times n, in one request."""


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "(text)"
    if not isinstance(prompt, list) or not prompt:
        return None
    return {str: "(texts)", int: "(tokens)", list: "(token lists)"}.get(type(prompt[0]))


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(tokens)")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(token lists)")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message=(
            "Input should be a string, or a non-empty list of strings, of token ids, or of lists of token ids"
        ),
    ),
]


class CompletionRequest(GenerationFields):
    """Continue one or several prompts."""

    model_config = example(prompt="The capital of France is", max_tokens=16, temperature=0)

    prompt: Prompt = Field(description="Text, texts, token ids, or lists of token ids.")
    max_tokens: int | None = Field(None, ge=0, description="Most tokens to generate (default 16); 0 only with echo.")
    echo: bool | None = Field(None, description="Put the prompt before the text; with logprobs, score it too.")
    logprobs: LogprobCount | None = Field(None, description="Log-probabilities of this many likely tokens.")
    add_special_tokens: bool | None = Field(
        None, description="Whether a text prompt gets the tokenizer's own prefix, such as BOS (default true)."
    )
    suffix: Annotated[Any, Refuse("suffix (insertion) is not supported", ("",))] = None
    best_of: Annotated[Any, Refuse("best_of is not supported; use n", (1,))] = None


class CompletionLogprobs(ResponseSchema):
    """One entry per token; the first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    """Where each token begins in the choice's text."""


class CompletionChoice(ResponseSchema):
    """One text, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop token id or stop string that ended the text, if one did."""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(ResponseSchema):
    """The answer, or one chunk of a streamed one: OpenAI uses the same shape for both."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    weight_version: str
    choices: list[CompletionChoice]
    usage: Usage | None = None

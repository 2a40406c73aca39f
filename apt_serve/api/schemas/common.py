"""Shapes that several endpoints share: errors, usage, sampling fields, stream options."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from apt_serve.api.schemas.base import RequestSchema, ResponseSchema
from apt_serve.engine.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams

MAX_STOP_STRINGS = 16
"""Stop strings one request may name; OpenAI allows 4."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(fail_fast=True),
]


class ErrorBody(ResponseSchema):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    """invalid_request_error, rate_limit_error, server_error, overloaded_error or timeout_error."""
    param: str | None
    """The request field at fault, dotted."""
    code: str | None


class ErrorResponse(ResponseSchema):
    """Every error of every endpoint."""

    error: ErrorBody


class PromptTokensDetails(ResponseSchema):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Tokens whose keys and values were found in the prefix cache."""


class Usage(ResponseSchema):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class StreamOptions(RequestSchema):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage so far with every chunk (vLLM).")
    include_obfuscation: bool | None = Field(None, description="Accepted and ignored: APT adds no padding.")


def _stop_kind(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("(list)")],
    Discriminator(
        _stop_kind,
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]
"""A union whose branches are tagged in brackets, so that an error's path can leave the tags out."""


class SamplingFields(RequestSchema):
    """How tokens are chosen and when generation ends. A field left out takes the checkpoint's own default."""

    n: int | None = Field(None, ge=1, le=MAX_N, description="Independent choices for each prompt (default 1).")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most likely token (default 1).")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling (default 1).")
    top_k: int | None = Field(None, ge=-1, description="Keep the k most likely tokens; 0 or -1 keeps all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Keep tokens this likely relative to the best.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Above 1 discourages repetition.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(None, description="Token id to a bias between -100 and 100.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed and request, same tokens.")
    stop: Stop | None = Field(None, description=f"Up to {MAX_STOP_STRINGS} strings at which generation ends.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the text before this many tokens.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out (default true).")

    def given(self) -> dict[str, Any]:
        """The SamplingParams fields that the client sent."""
        values = {name: getattr(self, name) for name in _SAMPLING_NAMES}
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(self.stop, str):
            given["stop"] = (self.stop,)
        elif self.stop is not None:
            given["stop"] = tuple(self.stop)
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return given


_SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams) if field.name in SamplingFields.model_fields)


CacheSalt = Annotated[
    str,
    Field(max_length=512, description="Share cached prefixes with requests of the same salt alone (vLLM)."),
]


class GenerationFields(SamplingFields):
    """What completions and chat completions share besides sampling."""

    model: str | None = Field(None, description="Name of a served model; left out, the default one.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="Lower is served earlier (vLLM).")
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = Field(None, description="Add prompt_token_ids and token_ids (vLLM).")
    user: str | None = Field(None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted and ignored: nothing is stored.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        None, description="Accepted and ignored."
    )
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored: every prefix is cached.")

    @property
    def choices_per_prompt(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

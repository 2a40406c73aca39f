"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from apt_serve.api.schemas.base import Refuse, RequestSchema, ResponseSchema, example
from apt_serve.api.schemas.common import GenerationFields, LogprobCount, Usage
from apt_serve.engine.client import FinishReason

_NO_TOOLS = "tool calls are not supported"
_NO_AUDIO = "audio is not supported"


class TextPart(RequestSchema):
    """A piece of text; pictures, sound and files are not supported."""

    type: Literal["text"]
    text: str


def _content_kind(content: Any) -> str | None:
    return "(text)" if isinstance(content, str) else "(parts)" if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class Message(RequestSchema):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is read as system.")
    content: Content
    name: str | None = Field(None, description="Accepted and ignored.")
    # What an assistant message of OpenAI's carries, so that an answer can be sent back as it came.
    refusal: Annotated[Any, Refuse("refusal is not supported")] = None
    annotations: Annotated[Any, Refuse("annotations are not supported", ([],))] = None
    audio: Annotated[Any, Refuse(_NO_AUDIO)] = None
    tool_calls: Annotated[Any, Refuse(_NO_TOOLS, ([],))] = None
    tool_call_id: Annotated[Any, Refuse(_NO_TOOLS)] = None
    function_call: Annotated[Any, Refuse(_NO_TOOLS)] = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ResponseFormat(RequestSchema):
    """Only plain text."""

    type: Literal["text"]
    json_schema: Annotated[Any, Refuse("structured output is not supported")] = None


class ChatCompletionRequest(GenerationFields):
    """Answer a conversation."""

    model_config = example(messages=[{"role": "user", "content": "Why is the sky blue?"}], max_completion_tokens=64)

    messages: Messages
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; left out, as many as the context length allows."
    )
    max_tokens: int | None = Field(None, ge=1, description="Older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log-probabilities of the generated tokens.")
    top_logprobs: LogprobCount | None = Field(None, description="Likely tokens per position; needs logprobs.")
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")
    tools: Annotated[Any, Refuse(_NO_TOOLS, ([],))] = None
    tool_choice: Annotated[Any, Refuse(_NO_TOOLS, ("none", "auto"))] = None
    functions: Annotated[Any, Refuse(_NO_TOOLS, ([],))] = None
    function_call: Annotated[Any, Refuse(_NO_TOOLS, ("none", "auto"))] = None
    modalities: Annotated[Any, Refuse("only the text modality is supported", (["text"],))] = None
    audio: Annotated[Any, Refuse(_NO_AUDIO)] = None
    prediction: Annotated[Any, Refuse("predicted outputs are not supported")] = None
    web_search_options: Annotated[Any, Refuse("web search is not supported")] = None
    reasoning_effort: Annotated[Any, Refuse("reasoning effort is not supported", ("none",))] = None
    verbosity: Annotated[Any, Refuse("verbosity is not supported")] = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatTopLogprob(ResponseSchema):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ResponseSchema):
    """The chosen token and the likely ones beside it."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(ResponseSchema):
    """One entry per generated token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(ResponseSchema):
    """The model's answer."""

    role: str
    content: str
    refusal: None = None


class ChatChoice(ResponseSchema):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseSchema):
    """The answer to a conversation."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    weight_version: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(ResponseSchema):
    """What is new of an answer."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(ResponseSchema):
    """What is new of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(ResponseSchema):
    """One event of a streamed answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    weight_version: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None

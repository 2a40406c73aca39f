"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apt_core.tokenizer import Tokenizer
from apt_serve.api.formatting import Envelope, present
from apt_serve.api.generation import ChoiceDelta
from apt_serve.api.logprobs import chat_logprobs
from apt_serve.api.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from apt_serve.api.schemas.common import Usage


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a client wants to see."""

    num_logprobs: int | None
    return_token_ids: bool


class ChatFormatter:
    """Formats one request's answer."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, options: ChatOptions) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._options = options
        self._started: set[int] = set()

    def start(self, weight_version: str) -> None:
        """See Formatter."""
        self._envelope = self._envelope.started(weight_version)

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> list[ChatCompletionChunk]:
        """The role before a choice's first text, the finish reason after its last."""
        choices: list[ChatChunkChoice] = []
        extras = self._prompt_ids() if not self._started else {}
        if delta.choice not in self._started:
            self._started.add(delta.choice)
            opening = ChatDelta(role="assistant", content="")
            choices.append(ChatChunkChoice(index=delta.choice, delta=opening, logprobs=None, finish_reason=None))
        if delta.output.text or delta.output.token_ids:
            choices.append(self._text_choice(delta))
        if delta.output.finish_reason is not None:
            choices.append(self._last_choice(delta))
        chunks = [self._chunk([choice], usage) for choice in choices]
        return [chunks[0].model_copy(update=extras), *chunks[1:]] if extras else chunks

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """No choices, the whole usage."""
        return self._chunk([], usage)

    def response(self, choices: Sequence[ChoiceDelta], usage: Usage) -> ChatCompletion:
        """All choices at once."""
        return ChatCompletion(
            **self._envelope.fields("chat.completion"),
            choices=[self._whole_choice(delta) for delta in choices],
            usage=usage,
            **self._prompt_ids(),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        fields = self._envelope.fields("chat.completion.chunk")
        return ChatCompletionChunk(**fields, choices=choices, **present(usage=usage))

    def _text_choice(self, delta: ChoiceDelta) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(content=delta.output.text),
            logprobs=self._logprobs(delta),
            finish_reason=None,
            **self._token_ids(delta),
        )

    def _last_choice(self, delta: ChoiceDelta) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(),
            logprobs=None,
            finish_reason=delta.output.finish_reason,
            stop_reason=delta.output.stop_reason,
        )

    def _whole_choice(self, delta: ChoiceDelta) -> ChatChoice:
        assert delta.output.finish_reason is not None, "the engine ended a choice without a reason"
        return ChatChoice(
            index=delta.choice,
            message=ChatMessage(role="assistant", content=delta.output.text, refusal=None),
            logprobs=self._logprobs(delta),
            finish_reason=delta.output.finish_reason,
            stop_reason=delta.output.stop_reason,
            **self._token_ids(delta),
        )

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        return chat_logprobs(self._tokenizer, delta.output.logprobs or (), self._options.num_logprobs)

    def _token_ids(self, delta: ChoiceDelta) -> dict[str, Any]:
        return {"token_ids": list(delta.output.token_ids)} if self._options.return_token_ids else {}

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._options.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._envelope.job.prompts[0].token_ids)}

"""Texts, token ids and conversations become prompts; sampling fields become SamplingParams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from apt_core.tokenizer import Tokenizer
from apt_serve.api.generation import Prompt
from apt_serve.api.schemas.chat import Message
from apt_serve.engine.client import ModelInfo
from apt_serve.engine.sampling_params import SamplingParams

_INLINE_CHARS = 4096
"""Longer texts are encoded on another thread, so that they do not hold up everybody's tokens."""


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of a text."""
    if len(text) <= _INLINE_CHARS:
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens))


async def text_prompts(
    model: ModelInfo, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, add_special_tokens: bool
) -> list[Prompt]:
    """The prompts of a completion request, in any of OpenAI's four shapes."""
    parts: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    return [await _text_prompt(model, part, add_special_tokens) for part in parts]


async def _text_prompt(model: ModelInfo, part: str | Sequence[int], add_special_tokens: bool) -> Prompt:
    if not isinstance(part, str):
        return Prompt(tuple(part), None)
    return Prompt(await encode(model.tokenizer, part, add_special_tokens=add_special_tokens), part)


async def chat_prompt(model: ModelInfo, messages: Sequence[Message]) -> Prompt:
    """The prompt a conversation stands for; the chat template writes the special tokens itself."""
    text = chat_text(model, messages)
    return Prompt(await encode(model.tokenizer, text, add_special_tokens=False), text)


def chat_text(model: ModelInfo, messages: Sequence[Message]) -> str:
    """The text a conversation stands for."""
    return model.tokenizer.apply_chat_template([message.for_template() for message in messages])


def sampling_params(model: ModelInfo, given: Mapping[str, Any], **others: Any) -> SamplingParams:
    """What the client sent, over the checkpoint's own defaults.

    Raises:
        InvalidRequestError: values that do not go together.
    """
    return SamplingParams(**{**model.default_sampling, **given, **others})

"""Log-probabilities in OpenAI's two layouts: parallel lists for completions, a list of objects for chat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from apt_core.tokenizer import Tokenizer
from apt_serve.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob
from apt_serve.api.schemas.completions import CompletionLogprobs
from apt_serve.engine.client import Logprob, TokenLogprobs


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text; part of a character is written as OpenAI does, ``bytes:\xe2\x82``, to stay distinct."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
    """The layout of chat completions."""
    return ChatLogprobs(content=[_chat_entry(tokenizer, entry, num_top) for entry in entries], refusal=None)


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> ChatTokenLogprob:
    def described(logprob: Logprob) -> ChatTopLogprob:
        data = tokenizer.token_bytes(logprob.token_id)
        return ChatTopLogprob(token=data.decode(errors="replace"), logprob=logprob.logprob, bytes=list(data))

    chosen = described(entry.chosen)
    top = [described(logprob) for logprob in entry.top[:num_top]]
    return ChatTokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)


class CompletionLogprobsWriter:
    """The layout of completions for one choice; keeps count of where in the text each token begins."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._invisible = tokenizer.special_ids if skip_special_tokens else frozenset()
        # Incremental: the bytes of one character may be spread over several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """An echoed prompt's tokens; the first has no log-probability, since nothing precedes it."""
        return self._layout(token_ids, entries)

    def output(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Generated tokens."""
        return self._layout([entry.chosen.token_id for entry in entries], entries)

    def _layout(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[token_text(self._tokenizer, token_id) for token_id in token_ids],
            token_logprobs=[entry.chosen.logprob if entry else None for entry in entries],
            top_logprobs=[self._top(entry) for entry in entries],
            text_offset=[self._begin(token_id) for token_id in token_ids],
        )

    def _top(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        if entry is None:
            return None
        # OpenAI's dictionary holds the chosen token too, even if it is not among the most likely ones.
        shown = (*entry.top[: self._num_top], entry.chosen)
        return {token_text(self._tokenizer, logprob.token_id): logprob.logprob for logprob in shown}

    def _begin(self, token_id: int) -> int:
        begin = self._offset
        if token_id not in self._invisible:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return begin


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Two stretches of the same text."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=(first.top_logprobs or []) + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )

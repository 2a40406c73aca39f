"""Token ids to text as they come, at a cost per token that does not grow with the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from apt_core.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NUM_CONTEXT_TOKENS = 5
"""Prompt tokens before the output: whether a word begins with a space depends on what stands before it."""
_NUM_HELD = 3
"""Most U+FFFD at the end that may yet become one character: UTF-8 has at most three bytes before the last one."""
_MAX_WINDOW = 16
_MAX_UNDECIDED_WINDOW = 64
"""Window length at which it is cut even if no character has ended in it."""


class IncrementalDetokenizer:
    """Text of an output that grows by tokens; never splits a character.

    A window of the latest tokens is decoded anew with each push. It starts where a character starts, and with at least
    one token whose text is out already, since a decoder may treat the first token in its own way. What is new is the
    text beyond what was sent, less the U+FFFD at its end that later bytes may complete.

    Args:
        tokenizer: decodes.
        prompt_token_ids: what the output continues.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        spoken = (token for token in reversed(prompt_token_ids) if token not in self._skipped)
        self._window = list(islice(spoken, _NUM_CONTEXT_TOKENS))[::-1]
        text = self._decode()
        self._num_sent = len(text)
        self._open_prompt = text if text.endswith(_REPLACEMENT) else ""
        """The context, while it may end within a character that the output completes."""
        self._next_start = 0
        """Where the window may start next: the last but one place at which a character ended."""
        self._last_end = 0 if self._open_prompt else len(self._window)
        """The last place in the window at which a character ended."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add, as far as it is settled."""
        size = len(self._window)
        self._window.extend(token for token in token_ids if token not in self._skipped)
        if len(self._window) == size:
            return ""
        text = self._decode()
        settled = _settled_length(text)
        if self._open_prompt:
            self._num_sent = _common_length(self._open_prompt, text)
        new = text[self._num_sent : settled]
        self._num_sent = max(self._num_sent, settled)
        if new:
            self._open_prompt = ""
        if new and settled == len(text):
            self._next_start, self._last_end = self._last_end, len(self._window)
        if len(self._window) > _MAX_WINDOW:
            self._shrink(len(text))
        return new

    def flush(self) -> str:
        """What is still held back; a character that never became complete is U+FFFD."""
        new = self._decode()[self._num_sent :]
        self._num_sent += len(new)
        return new

    def _shrink(self, text_length: int) -> None:
        cut = self._next_start
        if len(self._window) > _MAX_UNDECIDED_WINDOW:
            # Nothing but invalid bytes for long: what is held lies in the last few tokens, wherever the cut falls.
            cut = max(cut, len(self._window) - _MAX_WINDOW)
        if cut == 0:
            return
        self._open_prompt = ""
        del self._window[:cut]
        self._next_start = 0
        self._last_end = max(self._last_end - cut, 0)
        self._num_sent += len(self._decode()) - text_length

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


def _common_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _settled_length(text: str) -> int:
    """How much of a text no later byte can change."""
    if not text.endswith(_REPLACEMENT):
        return len(text)
    return max(len(text.rstrip(_REPLACEMENT)), len(text) - _NUM_HELD)

"""Token ids to text as they come, at a cost per token that does not grow with the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from apt_core.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NUM_CONTEXT_TOKENS = 5
"""Prompt tokens before the output: whether a word begins with a space depends on what stands before it."""
_MAX_CHARACTER_TOKENS = 12
"""More tokens than any character has, even with the context before it: beyond so many the bytes are invalid."""
_NUM_HELD = 3
"""U+FFFD held back among invalid bytes: UTF-8 has at most three bytes before a character's last one."""
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
        self._last_end = len(self._window)
        """The last place in the window at which a character ended."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add, as far as it is settled."""
        # One by one, so that every place at which a character ends is seen.
        return "".join(self._push(token) for token in token_ids if token not in self._skipped)

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        settled = self._settled_length(text)
        if self._open_prompt:
            self._num_sent = _common_length(self._open_prompt, text)
        new = text[self._num_sent : settled]
        self._num_sent = max(self._num_sent, settled)
        if new:
            self._open_prompt = ""
        if new and settled == len(text):
            self._next_start, self._last_end = self._last_end, len(self._window)
            if len(self._window) > _MAX_WINDOW:
                self._cut(self._next_start, num_held=0)
        elif len(self._window) > _MAX_UNDECIDED_WINDOW:
            # Nothing but invalid bytes for long: what is held lies in the last few tokens, wherever the cut falls.
            self._cut(len(self._window) - _MAX_WINDOW, num_held=len(text) - self._num_sent)
        return new

    def flush(self) -> str:
        """What is still held back; a character that never became complete is U+FFFD."""
        new = self._decode()[self._num_sent :]
        self._num_sent += len(new)
        return new

    def _cut(self, start: int, num_held: int) -> None:
        """Let the window start later; of its text so many characters at the end are not sent yet."""
        del self._window[:start]
        self._next_start = 0
        self._last_end = max(self._last_end - start, 0)
        self._num_sent = len(self._decode()) - num_held
        self._open_prompt = ""

    def _settled_length(self, text: str) -> int:
        """How much of the window's text no later byte can change."""
        if not text.endswith(_REPLACEMENT):
            return len(text)
        if len(self._window) - self._last_end > _MAX_CHARACTER_TOKENS:
            return len(text) - _NUM_HELD
        # Some decoders replace a whole run of bytes until its last character is complete, not just that character.
        return len(text.rstrip(_REPLACEMENT))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


def _common_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

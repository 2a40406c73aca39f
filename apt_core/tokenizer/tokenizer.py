"""The Tokenizer protocol: what the engine and the API need of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which are left out of generated text."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. With add_special_tokens the tokenizer's own prefix (such as BOS) is added.

        A text that spells a special token gets that token, as in transformers: a rendered chat template relies on it.
        """

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """What ``encode`` gives for each of several texts, faster."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token stands for, which may be part of a character."""

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render messages (role, content) as the prompt text the model was trained on.

        Raises:
            InvalidRequestError: the checkpoint has no template, or the template refuses the messages.
        """

"""The Tokenizer protocol over a Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from apt_core.errors import CheckpointError, InvalidRequestError
from apt_core.tokenizer.chat_template import ChatTemplate
from apt_core.tokenizer.token_bytes import byte_speller


class HFTokenizer:
    """A tokenizer of the ``tokenizers`` library, with the checkpoint's chat template.

    Text that spells a special token is encoded as that token, as transformers does.

    Args:
        tokenizer: taken over; its truncation and padding are switched off.
        chat_template: None where the checkpoint has none.
        file: where the tokenizer came from, for errors.

    Raises:
        CheckpointError: the vocabulary is neither byte-level nor sentencepiece-like.
    """

    def __init__(self, tokenizer: RustTokenizer, *, chat_template: ChatTemplate | None, file: str) -> None:
        speller = byte_speller(tokenizer)
        if speller is None:
            raise CheckpointError("expected a ByteLevel, ByteFallback or Metaspace decoder", file=file, field="decoder")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._speller = speller
        self._chat_template = chat_template
        self._bytes = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens that are marked special."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. With add_special_tokens the tokenizer's own prefix (such as BOS) is added.

        Raises:
            InvalidRequestError: the text holds half of a surrogate pair, which JSON can spell and UTF-8 cannot.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequestError("the text is not valid Unicode: it has a lone surrogate", param=None) from None

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, on several threads and outside Python's lock.

        Raises:
            InvalidRequestError: a text holds half of a surrogate pair.
        """
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequestError("a text is not valid Unicode: it has a lone surrogate", param=None) from None
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD, ids without a token are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token stands for; none for an id that has no token (a padded vocabulary)."""
        spelled = self._bytes.get(token_id)
        if spelled is None:
            token = self._tokenizer.id_to_token(token_id)
            spelled = b"" if token is None else self._speller(token)
            self._bytes[token_id] = spelled
        return spelled

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render messages as prompt text, to be encoded with ``add_special_tokens=False``.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template, so it cannot take messages; send a prompt to /v1/completions",
                param="messages",
            )
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

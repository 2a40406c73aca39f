"""A tokenizer whose tokens are bytes, and a few special ones: exact, and rich in split characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from apt_core.errors import InvalidRequestError

SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(256, 256 + len(SPECIALS))
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


class ByteTokenizer:
    vocab_size = 256 + len(SPECIALS)
    special_ids = frozenset(range(256, vocab_size))
    has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        for part in _SPECIAL.split(text):
            ids += [256 + SPECIALS.index(part)] if part in SPECIALS else list(part.encode())
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else SPECIALS[token_id - 256].encode()

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        if any(message["role"] == "system" for message in messages[1:]):
            raise InvalidRequestError("the system message must come first", param="messages")
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")

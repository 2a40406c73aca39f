"""The bytes that a vocabulary entry stands for, in the two spellings that Hugging Face vocabularies use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_speller(tokenizer: Tokenizer) -> Callable[[str], bytes] | None:
    """How entries of this tokenizer's vocabulary spell bytes, or None where its decoder is of an unknown kind."""
    kinds = set(_decoder_kinds(tokenizer))
    if "ByteLevel" in kinds:
        return byte_level_bytes
    if "ByteFallback" in kinds:
        return byte_fallback_bytes
    return metaspace_bytes if "Metaspace" in kinds else None


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token: one character of GPT-2's alphabet stands for each byte.

    A token with a character outside the alphabet stands for itself, as in tokenizers' ByteLevel decoder.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def byte_fallback_bytes(token: str) -> bytes:
    """Bytes of a sentencepiece token: ``<0xXX>`` stands for a single byte."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return metaspace_bytes(token)


def metaspace_bytes(token: str) -> bytes:
    """Bytes of a sentencepiece token without byte fallback: a low block stands for the space."""
    return token.replace(_SPACE, " ").encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet (openai/gpt-2 encoder.py, bytes_to_unicode): printable Latin-1 bytes stand for themselves, the
    others for characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _decoder_kinds(tokenizer: Tokenizer) -> Iterator[str]:
    decoder: Any = tokenizer.decoder
    if decoder is None:
        return
    state = json.loads(decoder.__getstate__())
    for part in (state, *state.get("decoders", ())):
        yield part["type"]

"""The tokenizer inside a GGUF restated as tokenizer.json and tokenizer_config.json.

Each pre-tokenizer is built as in the tokenizer.json of the models it stems from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from apt_core.document import Document
from apt_core.errors import CheckpointError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Of enum llama_token_type; the others are ordinary vocabulary."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _Family:
    """What a value of tokenizer.ggml.pre stands for."""

    pre_tokenizer: Callable[[], Any]
    ignore_merges: bool = False
    """Whether a word that is in the vocabulary is one token, even if no merges lead to it."""
    uses_nfc: bool = False
    adds_bos: bool = False
    """Where the file does not say (llama.cpp src/llama-vocab.cpp)."""


def _split(words: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_FAMILIES = {
    "gpt-2": _Family(_gpt2),
    "smollm": _Family(_smollm),
    "llama-bpe": _Family(lambda: _split(_LLAMA3_WORDS), ignore_merges=True, adds_bos=True),
    "qwen2": _Family(lambda: _split(_QWEN2_WORDS), uses_nfc=True),
}


def tokenizer_json(metadata: Document) -> str:
    """The tokenizer.json of a GGUF's tokenizer.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not read, or damaged.
    """
    family = _family(metadata)
    tokens: list[str] = metadata.items("tokenizer.ggml.tokens")
    kinds = metadata.items("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise metadata.error("tokenizer.ggml.token_type", f"{len(kinds)} entries for {len(tokens)} tokens")
    tokenizer = Tokenizer(_bpe(metadata, tokens, kinds, family))
    if family.uses_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, tokens, family)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return tokenizer.to_str()


def tokenizer_config(metadata: Document) -> dict[str, Any]:
    """The tokenizer_config.json: names of special tokens, and the chat template."""
    tokens = metadata.items("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config: dict[str, Any] = {
        f"{name}_token": tokens[_token_id(metadata, kind, len(tokens))]
        for kind, name in names.items()
        if metadata.has(f"tokenizer.ggml.{kind}_token_id")
    }
    if metadata.has("tokenizer.chat_template"):
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return config


def _family(metadata: Document) -> _Family:
    model = metadata.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise _unread(metadata, "tokenizer.ggml.model", model)
    pre = metadata.text("tokenizer.ggml.pre", "default")
    if pre not in _FAMILIES:
        raise _unread(metadata, "tokenizer.ggml.pre", pre)
    return _FAMILIES[pre]


def _unread(metadata: Document, key: str, value: str) -> CheckpointError:
    return metadata.error(
        key, f"tokenizers of kind {value!r} are not read from GGUF; give the model's tokenizer.json by `tokenizer:`"
    )


def _bpe(metadata: Document, tokens: list[str], kinds: list[int], family: _Family) -> Any:
    """Special tokens stay in the vocabulary, which gives them their ids; unused ids are left without a token."""
    vocabulary = {
        token: token_id for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED
    }
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.items("tokenizer.ggml.merges")]
    try:
        return BPE(vocab=vocabulary, merges=merges, ignore_merges=family.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise metadata.error("tokenizer.ggml.merges", f"do not fit the vocabulary ({error})") from None


def _post_processor(metadata: Document, tokens: list[str], family: _Family) -> Any:
    """Adds BOS and EOS as the file asks."""
    added = {
        "bos": metadata.boolean("tokenizer.ggml.add_bos_token", family.adds_bos),
        "eos": metadata.boolean("tokenizer.ggml.add_eos_token", False),
    }
    ids = {kind: _token_id(metadata, kind, len(tokens)) for kind, is_added in added.items() if is_added}
    special = {kind: tokens[token_id] for kind, token_id in ids.items()}
    template = [*([special["bos"]] if added["bos"] else []), "$A", *([special["eos"]] if added["eos"] else [])]
    return processors.TemplateProcessing(
        single=template, special_tokens=[(tokens[token_id], token_id) for token_id in sorted(set(ids.values()))]
    )


def _token_id(metadata: Document, kind: str, num_tokens: int) -> int:
    key = f"tokenizer.ggml.{kind}_token_id"
    token_id = metadata.integer(key, minimum=0)
    if token_id >= num_tokens:
        raise metadata.error(key, f"{token_id} is beyond the vocabulary of {num_tokens} tokens")
    return token_id

"""Tokenizers inside GGUF files, against tokenizers built independently as Hugging Face's are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers.models.qwen2 import tokenization_qwen2

from apt_core.checkpoint.gguf_file import open_gguf
from apt_core.checkpoint.gguf_tokenizer import tokenizer_config, tokenizer_json
from apt_core.document import Document
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.tiny import SPECIAL, add_tokenizer, bpe_parts, byte_level_bpe, finish

# As in the tokenizer.json of Llama 3: up to three digits are one word.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "I'LL they'll WE'VE it's 'tis o'clock",
    "1234567890 12 3.14159 1,000,000 ١٢٣ ½",
    "tabs\tand\r\nnewlines\n\n\n  \n end",
    "Zażółć gęślą jaźń Größe naïve",
    "e\N{COMBINING ACUTE ACCENT} composed é \N{ANGSTROM SIGN}",
    "日本語のテキスト русский العربية हिन्दी",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji \U0001f1e9\U0001f1ea",
    "def f(x):\n    return x**2  # !!??\n",
    "<|im_start|>user\nhi<|im_end|><|im_end|> <|im_ start|>",
    "\x00\x01 control \x7f",
    "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}spaces",
    "the quickbrown foxes",
]


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def hugging_face_tokenizer(pre: str) -> Tokenizer:
    """The small vocabulary with the pre-tokenizer of a family."""
    state = json.loads(byte_level_bpe().to_str())["model"]
    model = BPE(state["vocab"], [tuple(merge) for merge in state["merges"]], ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": lambda: split(LLAMA3_REGEX),
        "qwen2": lambda: split(tokenization_qwen2.PRETOKENIZE_REGEX),
    }[pre]()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def gguf_metadata(
    path: Path, *, pre: str = "gpt-2", keys: dict[str, Any] | None = None, **types: TokenType
) -> Document:
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, byte_level_bpe(), pre=pre, **types)
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    finish(writer)
    return open_gguf(path).metadata


def gguf_tokenizer(path: Path, **arguments: Any) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(gguf_metadata(path, **arguments)))


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a GGUF, and Hugging Face's."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return gguf_tokenizer(path, pre=request.param), hugging_face_tokenizer(request.param)


@pytest.mark.parametrize("text", TRICKY)
def test_ids_are_those_of_hugging_faces_tokenizer(text: str, pair: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = pair

    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_hugging_faces_tokenizer_for_any_text(text: str, pair: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = pair

    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


def test_llama_bpe_takes_whole_words_of_the_vocabulary_whatever_the_merges(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(tmp_path / "m.gguf", pre="llama-bpe", zyx=TokenType.NORMAL)
    other = gguf_tokenizer(tmp_path / "n.gguf", pre="qwen2", zyx=TokenType.NORMAL)

    assert tokenizer.encode("zyx", add_special_tokens=False).tokens == ["zyx"]
    assert other.encode("zyx", add_special_tokens=False).tokens == ["z", "y", "x"]


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    types = {"<tool>": TokenType.USER_DEFINED, "<ctl>": TokenType.CONTROL, "plain": TokenType.NORMAL}
    tokenizer = gguf_tokenizer(tmp_path / "m.gguf", **types)

    encoding = tokenizer.encode("a<tool>b<ctl>", add_special_tokens=False)

    assert encoding.tokens == ["a", "<tool>", "b", "<ctl>"]
    assert encoding.ids[1::2] == [400, 401]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "a<tool>b"
    assert {t.content for t in tokenizer.get_added_tokens_decoder().values()} == {*SPECIAL, "<tool>", "<ctl>"}


def test_unused_ids_have_no_token_and_shift_nothing(tmp_path: Path) -> None:
    types = {"[PAD400]": TokenType.UNUSED, "<late>": TokenType.CONTROL}
    tokenizer = gguf_tokenizer(tmp_path / "m.gguf", **types)

    assert tokenizer.id_to_token(400) is None
    assert tokenizer.token_to_id("<late>") == 401


BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("pre", "keys", "before", "after"),
    [
        ("gpt-2", {}, [], []),
        ("gpt-2", {"add_bos_token": True}, [BOS], []),
        ("gpt-2", {"add_eos_token": True}, [], [EOS]),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
        ("llama-bpe", {}, [BOS], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
    ],
)
def test_bos_and_eos_are_added_as_the_file_asks(
    pre: str, keys: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    tokenizer = gguf_tokenizer(tmp_path / "m.gguf", pre=pre, keys=keys)
    plain = tokenizer.encode("hello", add_special_tokens=False).ids

    assert tokenizer.encode("hello").ids == [*before, *plain, *after]


def test_tokenizer_config_names_special_tokens_and_the_template(tmp_path: Path) -> None:
    metadata = gguf_metadata(tmp_path / "m.gguf", keys={"padding_token_id": 0, "unknown_token_id": 0})

    config = tokenizer_config(metadata)

    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == "<|im_end|>"
    assert config["pad_token"] == config["unk_token"] == "<|endoftext|>"
    assert config["chat_template"].startswith("{% for")


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model", "`tokenizer:`"),
        ({"pre": "viking"}, "tokenizer.ggml.pre", "`tokenizer:`"),
        ({"pre": None}, "tokenizer.ggml.pre", "`tokenizer:`"),
        ({"model": None}, "tokenizer.ggml.model", "missing"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type", "1 entries"),
        ({"merges": ["Ġ nowhere"]}, "tokenizer.ggml.merges", "do not fit"),
        ({"merges": ["onepart"]}, "tokenizer.ggml.merges", "do not fit"),
        ({"add_bos_token": True, "bos_token_id": 4000}, "tokenizer.ggml.bos_token_id", "beyond"),
        ({"add_bos_token": True, "bos_token_id": None}, "tokenizer.ggml.bos_token_id", "missing"),
        ({"add_eos_token": "yes"}, "tokenizer.ggml.add_eos_token", "true or false"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(changes: dict[str, Any], field: str, words: str) -> None:
    tokens, merges = bpe_parts(byte_level_bpe())
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "token_type": [1] * len(tokens)}
    keys = {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}

    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        tokenizer_json(Document(keys, "m.gguf"))

    assert (caught.value.file, caught.value.field) == ("m.gguf", field)

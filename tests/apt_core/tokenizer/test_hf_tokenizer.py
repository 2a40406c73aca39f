"""HFTokenizer over the kinds of vocabulary it meets, with transformers as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from apt_core.errors import CheckpointError, InvalidRequestError
from apt_core.tokenizer import HFTokenizer, build_tokenizer, read_tokenizer_files
from tests.apt_core.checkpoint.tiny import byte_level_bpe

TRAINED = byte_level_bpe()
BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}


def sentencepiece(**options: Any) -> RustTokenizer:
    """As Llama 2's tokenizer.json: byte fallback, a low block for the space, BOS in front."""
    words = ["▁", "h", "i", "▁h", "hi", "▁hi", "é"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES | {word: 259 + i for i, word in enumerate(words)}
    merges = [("▁", "h"), ("h", "i"), ("▁h", "i")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = RustTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def wrap(tokenizer: RustTokenizer) -> HFTokenizer:
    return HFTokenizer(tokenizer, chat_template=None, file="tokenizer.json")


def folder_with(folder: Path, tokenizer: RustTokenizer, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("text", ["hi", "hi hi", " hi", "</s>hi", "日", "é hi\n", ""])
def test_sentencepiece_ids_and_text_are_those_of_transformers(text: str) -> None:
    ours = wrap(sentencepiece())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=sentencepiece())

    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = ours.encode(text)
    for skip in (True, False):
        theirs_text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == theirs_text


def test_bytes_of_sentencepiece_tokens() -> None:
    tokenizer = wrap(sentencepiece())

    assert tokenizer.token_bytes(BYTES["<0xE6>"]) == b"\xe6"
    assert [tokenizer.token_bytes(token_id) for token_id in (0, 1, 2)] == [b"<unk>", b"<s>", b"</s>"]
    assert [tokenizer.token_bytes(token_id) for token_id in range(262, 266)] == [b" h", b"hi", b" hi", "é".encode()]
    ids = tokenizer.encode("日", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " 日".encode()


def test_without_byte_fallback_a_byte_token_is_plain_text() -> None:
    tokenizer = RustTokenizer(models.BPE({"<0x41>": 0, "▁a": 1}, []))
    tokenizer.decoder = decoders.Metaspace()

    assert [wrap(tokenizer).token_bytes(token_id) for token_id in (0, 1)] == [b"<0x41>", b" a"]


def byte_level(vocabulary: dict[str, int]) -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_byte_level_alphabet_covers_every_byte() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = wrap(byte_level({character: i for i, character in enumerate(alphabet)}))

    assert {tokenizer.token_bytes(token_id) for token_id in range(256)} == {bytes([byte]) for byte in range(256)}
    for text in ("a b", "\t\n\x7f\xa0", "日本"):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_a_byte_level_vocabulary(text: str) -> None:
    tokenizer = wrap(TRAINED)
    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_added_tokens_spell_themselves_even_with_letters_of_the_byte_alphabet() -> None:
    tokenizer = byte_level({"a": 0})
    tokenizer.add_tokens([AddedToken("Ġé日", normalized=False)])

    assert wrap(tokenizer).token_bytes(1) == "Ġé日".encode()


def test_a_vocabulary_entry_outside_the_alphabet_stands_for_itself() -> None:
    assert wrap(byte_level({"日": 0})).token_bytes(0) == "日".encode()


def test_ids_without_a_token_are_empty() -> None:
    tokenizer = wrap(byte_level({"a": 0, "b": 5}))

    assert tokenizer.vocab_size == 6
    assert (tokenizer.token_bytes(3), tokenizer.token_bytes(600)) == (b"", b"")
    assert tokenizer.decode([0, 3, 5, 600]) == "ab"


def test_only_special_added_tokens_are_special() -> None:
    tokenizer = byte_level({"a": 0})
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<tool>"])
    ours = wrap(tokenizer)

    assert ours.special_ids == {1}
    assert ours.decode(ours.encode("<s>a<tool>")) == "a<tool>"


def test_stored_truncation_and_padding_do_not_apply() -> None:
    tokenizer = byte_level({"a": 0})
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=10)

    assert wrap(tokenizer).encode("aaaa") == [0, 0, 0, 0]


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    tokenizer = byte_level({"a": 0})
    tokenizer.decoder = decoders.WordPiece()

    with pytest.raises(CheckpointError) as caught:
        wrap(tokenizer)

    assert (caught.value.file, caught.value.field) == ("tokenizer.json", "decoder")


def test_tokens_that_only_tokenizer_config_lists_are_added(tmp_path: Path) -> None:
    listed = {
        "2": {"content": "<late>", "special": True, "normalized": False},
        "1": {"content": "<early>", "special": False, "normalized": False},
        "0": {"content": "a", "special": False},
    }
    folder = folder_with(tmp_path, byte_level({"a": 0}), added_tokens_decoder=listed)

    tokenizer = build_tokenizer(read_tokenizer_files(folder))

    assert tokenizer.encode("a<late><early>") == [0, 2, 1]
    assert tokenizer.special_ids == {2}


@pytest.mark.parametrize("spelling", ["text", "object", "special_tokens_map"])
def test_the_template_sees_special_tokens_however_they_are_spelled(spelling: str, tmp_path: Path) -> None:
    bos: Any = {"content": "<s>", "lstrip": False} if spelling == "object" else "<s>"
    config: dict[str, Any] = {"chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    folder = folder_with(
        tmp_path, sentencepiece(), **config, **({} if spelling == "special_tokens_map" else {"bos_token": bos})
    )
    if spelling == "special_tokens_map":
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos}))

    tokenizer = build_tokenizer(read_tokenizer_files(folder))

    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>x"


def test_without_a_template_messages_are_refused() -> None:
    tokenizer = wrap(sentencepiece())

    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"

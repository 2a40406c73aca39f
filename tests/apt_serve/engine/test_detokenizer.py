from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from apt_core.checkpoint import open_checkpoint
from apt_core.tokenizer import HFTokenizer, Tokenizer
from apt_core.tokenizer.token_bytes import byte_level_bytes
from apt_serve.engine.detokenizer import IncrementalDetokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PIECES = ["a", " b", "é", "e\u0301", "你", "好", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "नि", REPLACEMENT, "\n", "\x00"]
texts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30).map("".join)


def byte_tokenizer(*, is_sentencepiece: bool = False) -> Tokenizer:
    """One token a byte, in either of the two spellings."""
    if is_sentencepiece:
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁word": 256, "▁": 257, "x": 258}
        tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = [chr(code) for code in range(0x200) if len(byte_level_bytes(chr(code))) == 1]
        vocab = {character: byte_level_bytes(character)[0] for character in alphabet}
        tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return HFTokenizer(tokenizer, chat_template=None, file="test")


BYTES = byte_tokenizer()
SENTENCEPIECE = byte_tokenizer(is_sentencepiece=True)
END = max(BYTES.special_ids)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_checkpoint("smollm2-135m-instruct").tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool = True) -> list[str]:
    """The text of each single token, and what flushing adds."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push((token,)) for token in output), detokenizer.flush()]


def in_context(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool = True) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode([*prompt, *output], skip_special_tokens=skip)[len(before) :]


def test_the_byte_tokenizer_spells_every_byte() -> None:
    assert b"".join(map(BYTES.token_bytes, range(256))) == bytes(range(256))


def test_a_character_comes_out_whole_with_its_last_byte() -> None:
    assert pieces(BYTES, [65], list("é🙂".encode())) == ["", "é", "", "", "", "🙂", ""]


def test_a_character_that_never_became_complete_is_replaced_at_the_end() -> None:
    assert pieces(BYTES, [65], list("a🙂".encode())[:-1]) == ["a", "", "", "", REPLACEMENT]


def test_an_invalid_byte_is_replaced_once_what_follows_shows_it() -> None:
    assert pieces(BYTES, [65], [0xF0, 0x41]) == ["", f"{REPLACEMENT}A", ""]


def test_a_real_replacement_character_comes_out_with_what_follows() -> None:
    assert pieces(BYTES, [65], list(f"{REPLACEMENT}a".encode())) == ["", "", "", f"{REPLACEMENT}a", ""]


def test_the_first_word_keeps_its_space() -> None:
    assert pieces(SENTENCEPIECE, [256], [256, 256]) == [" word", " word", ""]


def test_only_special_tokens_before_it_make_a_word_the_first() -> None:
    special = max(SENTENCEPIECE.special_ids)
    assert pieces(SENTENCEPIECE, [special], [256, 256]) == ["word", " word", ""]


def test_special_tokens_leave_the_context_as_it_was() -> None:
    special = max(SENTENCEPIECE.special_ids)
    assert "".join(pieces(SENTENCEPIECE, [256], [256, *[special] * 100, 256])) == " word word"


def test_special_tokens_are_left_out_or_spelled_out() -> None:
    assert pieces(BYTES, [65], [66, END, 67]) == ["B", "", "C", ""]
    assert pieces(BYTES, [65], [66, END, 67], skip=False) == ["B", "<end>", "C", ""]


def test_a_character_begun_by_the_prompt_is_completed_by_the_output() -> None:
    first, *rest = "é".encode()
    assert pieces(BYTES, [65, first], [*rest, 66]) == ["é", "B", ""]
    assert pieces(SENTENCEPIECE, [258, first], [*rest, 258]) == ["é", "x", ""]


def test_an_invalid_end_of_the_prompt_is_not_repeated() -> None:
    assert pieces(BYTES, [65, 0xF0], [66, 67]) == ["B", "C", ""]
    assert pieces(BYTES, [65, 0xF0], [0x9F]) == ["", ""]
    assert pieces(BYTES, [65, *REPLACEMENT.encode()], [66]) == ["B", ""]


def test_the_window_stays_bounded_whatever_comes() -> None:
    for output in ([0x80] * 500, list("你".encode()) * 200, [65] * 500, [END] * 500, [0xF0, 0x9F] * 250):
        detokenizer = IncrementalDetokenizer(BYTES, [65] * 1000, True)
        text = ""
        for token in output:
            text += detokenizer.push((token,))
            assert len(detokenizer._window) <= 64
        assert text + detokenizer.flush() == in_context(BYTES, [65], output)


def test_text_of_invalid_bytes_does_not_wait_for_the_end() -> None:
    for num_valid in range(40):
        found = pieces(BYTES, [65], [*[66] * num_valid, *[0x80] * 20])[:-1]
        assert "".join(found[num_valid:]) == REPLACEMENT * 17


def test_sentencepiece_bytes_come_out_as_characters() -> None:
    text = "你🙂" * 50
    assert pieces(SENTENCEPIECE, [258], list(text.encode()))[:8] == ["", "", "你", "", "", "", "🙂", ""]
    assert "".join(pieces(SENTENCEPIECE, [258], list(text.encode()))) == text


@given(texts, texts)
def test_valid_text_comes_out_unchanged_in_whole_characters(before: str, text: str) -> None:
    found = pieces(BYTES, list(before.encode()), list(text.encode()))
    assert "".join(found) == text
    assert sum(piece.count(REPLACEMENT) for piece in found) == text.count(REPLACEMENT)


@given(st.binary(max_size=20), st.binary(max_size=120))
@example(b"", b"\x80" * 100)
@example(b"", b"\xf0" * 70 + "🙂".encode() + b"\x80" * 70 + "é".encode())
@settings(max_examples=300)
def test_any_bytes_come_out_as_decoding_them_at_once(before: bytes, output: bytes) -> None:
    prompt = [*before, 65]
    assert "".join(pieces(BYTES, prompt, list(output))) == in_context(BYTES, prompt, list(output))


@given(texts, st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_how_many_tokens_come_at_once_does_not_matter(text: str, sizes: list[int]) -> None:
    output, detokenizer, found = list(text.encode()), IncrementalDetokenizer(BYTES, [65], True), ""
    while output:
        for size in sizes:
            found += detokenizer.push(output[:size])
            del output[:size]
    assert found + detokenizer.flush() == text


@given(texts.filter(lambda text: "\x00" not in text), texts)
def test_sentencepiece_text_comes_out_unchanged(text: str, before: str) -> None:
    prompt = [258, *before.encode(), 258]
    assert "".join(pieces(SENTENCEPIECE, prompt, list(text.encode()))) == text


@given(before=texts, text=texts)
@settings(deadline=None)
def test_text_of_a_real_tokenizer_comes_out_as_decoding_it_at_once(smollm2: Tokenizer, before: str, text: str) -> None:
    prompt, output = smollm2.encode(before), smollm2.encode(text)
    found = pieces(smollm2, prompt, output, skip=False)
    assert "".join(found) == in_context(smollm2, prompt, output, skip=False)


@given(data=st.data())
@settings(deadline=None)
def test_any_tokens_of_a_real_tokenizer_come_out_as_decoding_them_at_once(
    smollm2: Tokenizer, data: st.DataObject
) -> None:
    tokens = st.lists(st.integers(0, smollm2.vocab_size - 1), max_size=80)
    prompt, output = [*data.draw(tokens), *smollm2.encode(".")], data.draw(tokens)
    skip = data.draw(st.booleans())
    assert "".join(pieces(smollm2, prompt, output, skip=skip)) == in_context(smollm2, prompt, output, skip=skip)

"""The tokenizer of the embedded model: known ids, and laws that hold for every text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apt_core.errors import InvalidRequestError
from apt_core.tokenizer import Tokenizer

IM_START, IM_END = 1, 2


def test_special_tokens_are_the_first_seventeen(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.special_ids == frozenset(range(17))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", [b"Hello", b" world"]),
        ("in 2024", [b"in", b" ", b"2", b"0", b"2", b"4"]),
        ("<|im_start|>user\n", [b"<|im_start|>", b"user", b"\n"]),
        ("hi<|im_end|>", [b"hi", b"<|im_end|>"]),
        ("", []),
    ],
)
def test_text_is_cut_into_the_expected_pieces(text: str, pieces: list[bytes], smollm2: Tokenizer) -> None:
    assert [smollm2.token_bytes(token_id) for token_id in smollm2.encode(text)] == pieces


def test_nothing_is_put_before_a_text(smollm2: Tokenizer) -> None:
    assert smollm2.encode("hello") == smollm2.encode("hello", add_special_tokens=False)


def test_special_tokens_are_left_out_of_decoded_text_unless_asked_for(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>hi<|im_end|>")

    assert (ids[0], ids[-1]) == (IM_START, IM_END)
    assert smollm2.decode(ids) == "hi"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def is_spellable(text: str, tokenizer: Tokenizer) -> bool:
    """SmolLM2's vocabulary lacks a token for some control characters and for bytes of planes that no text uses."""
    singles = {tokenizer.token_bytes(token_id) for token_id in range(17, 300)}
    return all(bytes([byte]) in singles for byte in text.encode())


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(text: str, smollm2: Tokenizer) -> None:
    assume(is_spellable(text, smollm2))

    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


@settings(deadline=None)
@given(text=st.text())
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(text: str, smollm2: Tokenizer) -> None:
    assume(is_spellable(text, smollm2))
    ids = smollm2.encode(text)

    assert b"".join(smollm2.token_bytes(token_id) for token_id in ids) == text.encode()


@settings(deadline=None)
@given(ids=st.lists(st.integers(17, 49151), max_size=20))
def test_the_bytes_of_any_tokens_are_what_they_decode_to(ids: list[int], smollm2: Tokenizer) -> None:
    spelled = b"".join(smollm2.token_bytes(token_id) for token_id in ids)

    assert spelled.decode(errors="replace") == smollm2.decode(ids)


def test_half_a_character_decodes_to_the_replacement_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("\N{GRINNING CAT FACE WITH SMILING EYES}")
    assert len(ids) > 1

    assert smollm2.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_a_lone_surrogate_is_the_requests_fault(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm2.encode("half \ud83d a pair")


def test_the_chat_template_writes_the_prompt_that_the_model_knows(smollm2: Tokenizer) -> None:
    prompt = smollm2.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )

    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )

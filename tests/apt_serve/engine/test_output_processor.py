from __future__ import annotations

from collections.abc import Sequence as Tokens
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_serve.engine.client import GenerationOutput, Logprob, TokenLogprobs
from apt_serve.engine.output_processor import OutputProcessor
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import SequenceOutput

EOS = 256
PROMPT = list(b"Say: ")
_ids = count()


class ByteTokenizer:
    """One token a byte, and one special token that ends the text."""

    vocab_size = 257
    special_ids = frozenset({EOS})
    has_chat_template = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Tokens[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(b"" if skip_special_tokens and i == EOS else self.token_bytes(i) for i in ids).decode(
            errors="replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def apply_chat_template(self, messages: Tokens[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        raise NotImplementedError


@pytest.fixture
def processor() -> OutputProcessor:
    return make_processor()


def make_processor() -> OutputProcessor:
    return OutputProcessor(ByteTokenizer(), frozenset({EOS}))


def start(
    processor: OutputProcessor, *, max_tokens: int = 100, prompt: list[int] = PROMPT, index: int = 0, **sampling: Any
) -> Sequence:
    """A sequence whose prompt is computed."""
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    seq = Sequence(f"seq-{next(_ids)}", list(prompt), len(prompt), params, seed=0, max_tokens=max_tokens, index=index)
    processor.start(seq)
    return seq


def push(
    processor: OutputProcessor, seq: Sequence, tokens: Tokens[int], *, computed: int | None = None, **fields: Any
) -> GenerationOutput | None:
    """Process these tokens, which were sampled when so many were computed; if not said, all that were there."""
    computed = seq.num_tokens if computed is None else computed
    seq.token_ids.extend(tokens)
    return processor.process(seq, SequenceOutput(seq.seq_id, tuple(tokens), computed, **fields))


def generate(processor: OutputProcessor, seq: Sequence, tokens: Tokens[int]) -> list[GenerationOutput]:
    """One token a step, until the sequence ends."""
    outputs: list[GenerationOutput] = []
    for token in tokens:
        output = push(processor, seq, [token])
        assert output is not None
        outputs.append(output)
        if output.finish_reason:
            break
    return outputs


def text_of(outputs: list[GenerationOutput]) -> str:
    return "".join(output.text for output in outputs)


def logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(Logprob(token_id, -1.0), ())


def test_each_token_is_a_delta_of_its_choice(processor: OutputProcessor) -> None:
    seq = start(processor, index=3)
    seq.num_cached_tokens = 4
    outputs = generate(processor, seq, b"hi")
    assert [(o.index, o.text, o.token_ids, o.finish_reason, o.num_cached_tokens) for o in outputs] == [
        (3, "h", (104,), None, 4),
        (3, "i", (105,), None, 4),
    ]


def test_a_chunk_of_the_prompt_gives_no_delta(processor: OutputProcessor) -> None:
    assert push(processor, start(processor), []) is None


def test_a_token_without_text_yet_is_a_delta_too(processor: OutputProcessor) -> None:
    outputs = generate(processor, start(processor), "é".encode())
    assert [(o.text, len(o.token_ids)) for o in outputs] == [("", 1), ("é", 1)]


def test_the_end_of_sequence_token_ends_it_unseen(processor: OutputProcessor) -> None:
    for skip in (True, False):
        outputs = generate(processor, start(processor, skip_special_tokens=skip), [*b"hi", EOS, *b"no"])
        assert text_of(outputs) == "hi"
        assert (outputs[-1].token_ids, outputs[-1].finish_reason, outputs[-1].stop_reason) == ((EOS,), "stop", None)


def test_ignore_eos_goes_on(processor: OutputProcessor) -> None:
    outputs = generate(processor, start(processor, ignore_eos=True), [EOS, *b"hi"])
    assert text_of(outputs) == "hi" and outputs[-1].finish_reason is None


def test_an_ignored_end_of_sequence_may_still_be_a_stop_token(processor: OutputProcessor) -> None:
    outputs = generate(processor, start(processor, ignore_eos=True, stop_token_ids=(EOS,)), [*b"hi", EOS])
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", EOS)


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi!")])
def test_a_stop_token_ends_it_and_is_seen_only_if_asked(processor: OutputProcessor, include: bool, text: str) -> None:
    seq = start(processor, stop_token_ids=(33,), include_stop_str_in_output=include)
    outputs = generate(processor, seq, b"hi!no")
    assert text_of(outputs) == text
    assert (outputs[-1].token_ids, outputs[-1].finish_reason, outputs[-1].stop_reason) == ((33,), "stop", 33)


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xEND")])
def test_a_stop_string_ends_it_and_is_seen_only_if_asked(processor: OutputProcessor, include: bool, text: str) -> None:
    outputs = generate(processor, start(processor, stop=("END",), include_stop_str_in_output=include), b"xENDno")
    assert text_of(outputs) == text
    assert (outputs[-1].token_ids, outputs[-1].finish_reason, outputs[-1].stop_reason) == ((68,), "stop", "END")


def test_the_prompt_is_not_searched_for_stop_strings(processor: OutputProcessor) -> None:
    outputs = generate(processor, start(processor, stop=(" h",)), b"hi")
    assert text_of(outputs) == "hi"


@pytest.mark.parametrize("last", [[EOS], [33], []])
def test_text_that_was_held_back_comes_when_it_ends_otherwise(processor: OutputProcessor, last: list[int]) -> None:
    seq = start(processor, stop=("END",), stop_token_ids=(33,), max_tokens=3 if not last else 100)
    outputs = generate(processor, seq, [*b"xEN", *last])
    assert text_of(outputs) == "xEN"
    assert outputs[-1].finish_reason == ("stop" if last else "length")


def test_an_incomplete_character_at_the_end_is_replaced(processor: OutputProcessor) -> None:
    assert text_of(generate(processor, start(processor, max_tokens=2), b"x\xf0")) == "x\N{REPLACEMENT CHARACTER}"


def test_most_tokens_end_it(processor: OutputProcessor) -> None:
    outputs = generate(processor, start(processor, max_tokens=2), b"hi!")
    assert text_of(outputs) == "hi"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("length", None)


def test_a_stop_on_the_last_token_is_a_stop(processor: OutputProcessor) -> None:
    assert generate(processor, start(processor, max_tokens=1), [EOS])[-1].finish_reason == "stop"
    assert generate(processor, start(processor, max_tokens=1, stop=("x",)), b"x")[-1].finish_reason == "stop"


def test_no_stop_counts_before_min_tokens(processor: OutputProcessor) -> None:
    tokens = [EOS, *b"!x", *b"x"]
    seq = start(processor, min_tokens=4, stop=("x",), stop_token_ids=(33,))
    outputs = generate(processor, seq, tokens)
    assert [o.finish_reason for o in outputs] == [None, None, None, "stop"]
    assert text_of(outputs) == "!x"


def test_a_stop_counts_at_min_tokens(processor: OutputProcessor) -> None:
    assert len(generate(processor, start(processor, min_tokens=2), [65, EOS])) == 2


def test_accepted_tokens_behind_the_end_are_dropped(processor: OutputProcessor) -> None:
    logprobs = tuple(logprob(token) for token in b"aENDb")
    output = push(processor, start(processor, stop=("END",), logprobs=0), b"aENDb", logprobs=logprobs)
    assert output is not None
    assert (output.text, output.token_ids, output.logprobs) == ("a", tuple(b"aEND"), logprobs[:4])
    for tokens, kept in (([65, EOS, 66], 2), ([65, 66, 67], 2)):
        output = push(processor, start(processor, max_tokens=2), tokens)
        assert output is not None and output.token_ids == tuple(tokens[:kept]) and output.finish_reason


def test_scoring_a_prompt_ends_once_it_is_computed(processor: OutputProcessor) -> None:
    seq = start(processor, max_tokens=0)
    seq.num_computed_tokens = len(PROMPT)  # the prompt's last chunk is under way
    assert push(processor, seq, [], computed=3) is None
    output = push(processor, seq, [], computed=len(PROMPT))
    assert output is not None
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
    assert len(processor) == 0


def test_prompt_logprobs_of_all_chunks_come_with_the_first_delta(processor: OutputProcessor) -> None:
    entries = [logprob(token) for token in PROMPT]
    seq = start(processor, prompt_logprobs=0)
    for computed, new in ((2, entries[1:3]), (4, entries[3:5])):
        assert push(processor, seq, [], computed=computed, prompt_logprobs=tuple(new)) is None
    first = push(processor, seq, [65], computed=5, prompt_logprobs=())
    second = push(processor, seq, [66])
    assert first is not None and first.prompt_logprobs == (None, *entries[1:])
    assert second is not None and second.prompt_logprobs is None


def test_prompt_logprobs_survive_a_preemption(processor: OutputProcessor) -> None:
    entries = [logprob(token) for token in PROMPT]
    seq = start(processor, prompt_logprobs=0, max_tokens=0)
    push(processor, seq, [], computed=3, prompt_logprobs=tuple(entries[1:4]))
    push(processor, seq, [], computed=2, prompt_logprobs=tuple(entries[1:3]))  # preempted, and begun again
    output = push(processor, seq, [], computed=5, prompt_logprobs=tuple(entries[3:]))
    assert output is not None and output.prompt_logprobs == (None, *entries[1:])


def test_prompt_logprobs_that_were_delivered_are_not_delivered_again(processor: OutputProcessor) -> None:
    seq = start(processor, prompt_logprobs=0, prompt=[65, 66])
    first = push(processor, seq, [67], prompt_logprobs=(logprob(66),))
    assert first is not None and first.prompt_logprobs == (None, logprob(66))
    # preempted, and computed again with its output
    again = push(processor, seq, [68], computed=3, prompt_logprobs=(logprob(66),))
    assert again is not None and again.prompt_logprobs is None


def test_a_prompt_of_one_token_has_one_empty_entry(processor: OutputProcessor) -> None:
    output = push(processor, start(processor, prompt_logprobs=0, prompt=[65], max_tokens=0), [], prompt_logprobs=())
    assert output is not None and output.prompt_logprobs == (None,)


def test_only_the_first_choice_carries_prompt_logprobs(processor: OutputProcessor) -> None:
    output = push(processor, start(processor, prompt_logprobs=0, index=1), [65], prompt_logprobs=())
    assert output is not None and output.prompt_logprobs is None


def test_abort_gives_what_was_held_back_and_forgets(processor: OutputProcessor) -> None:
    seq = start(processor, stop=("END",))
    generate(processor, seq, b"xE\xf0")
    output = processor.abort(seq)
    assert (output.text, output.token_ids, output.finish_reason) == ("E\N{REPLACEMENT CHARACTER}", (), "abort")
    assert len(processor) == 0


def test_nothing_is_kept_of_finished_and_aborted_sequences(processor: OutputProcessor) -> None:
    finished, aborted = start(processor), start(processor)
    generate(processor, finished, [EOS])
    processor.abort(aborted)
    assert len(processor) == 0


@given(
    text=st.text("abé🙂", max_size=20),
    stops=st.lists(st.text("abé🙂", min_size=1, max_size=3), max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 4), min_size=1),
    max_tokens=st.integers(1, 60),
    min_tokens=st.integers(0, 5),
    include=st.booleans(),
)
def test_text_ends_where_searching_it_byte_by_byte_would(
    text: str, stops: tuple[str, ...], sizes: list[int], max_tokens: int, min_tokens: int, include: bool
) -> None:
    processor, tokens = make_processor(), [*text.encode(), EOS]
    min_tokens = min(min_tokens, max_tokens)
    seq = start(processor, max_tokens=max_tokens, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include)
    expected = end_of(tokens, stops, max_tokens, min_tokens, include)
    outputs: list[GenerationOutput] = []
    step = 0
    while tokens and not (outputs and outputs[-1].finish_reason):
        size = sizes[step % len(sizes)]
        output = push(processor, seq, tokens[:size])
        assert output is not None
        outputs.append(output)
        del tokens[:size]
        step += 1
    if not outputs[-1].finish_reason:
        outputs.append(processor.abort(seq))
    assert (text_of(outputs), sum(len(o.token_ids) for o in outputs), outputs[-1].stop_reason) == expected


def end_of(
    tokens: list[int], stops: tuple[str, ...], max_tokens: int, min_tokens: int, include: bool
) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string of a generation, from the whole text of every number of tokens."""
    seen = ""
    for size in range(1, len(tokens) + 1):
        complete = bytes(t for t in tokens[:size] if t != EOS).decode(errors="ignore")
        for end in range(len(seen) + 1, len(complete) + 1):
            ending = [stop for stop in stops if complete[:end].endswith(stop)]
            if ending and size >= min_tokens:
                stop = max(ending, key=len)
                return complete[: end if include else end - len(stop)], size, stop
        seen = complete
        if (tokens[size - 1] == EOS and size >= min_tokens) or size == max_tokens:
            return bytes(t for t in tokens[:size] if t != EOS).decode(errors="replace"), size, None
    return seen, len(tokens), None

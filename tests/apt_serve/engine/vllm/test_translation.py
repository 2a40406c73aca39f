"""Sequences in vLLM's words and back. None of it needs vLLM: its outputs are stood in for."""

from __future__ import annotations

from typing import Any

import pytest

from apt_serve.engine.client import Logprob, TokenLogprobs
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.vllm.translation import finish_reason, sampling_arguments, sequence_output
from tests.apt_serve.engine.vllm.fake import Completion, Output, Rank

EOS = frozenset({2, 9})


def sequence(prompt: tuple[int, ...] = (4, 5, 6), *, max_tokens: int = 10, seed: int = 1, **given: Any) -> Sequence:
    return Sequence("s", list(prompt), len(prompt), SamplingParams(**given), seed=seed, max_tokens=max_tokens)


def arguments(**given: Any) -> dict[str, Any]:
    return sampling_arguments(sequence(**given), EOS)


def test_what_has_the_same_name_is_passed_on() -> None:
    same = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "min_tokens": 2,
        "logprobs": 3,
        "prompt_logprobs": 0,
    }
    given = arguments(**same, logit_bias={7: -1.5})
    assert {name: given[name] for name in same} == same
    assert given["logit_bias"] == {7: -1.5}
    assert given["max_tokens"] == 10
    assert given["detokenize"] is False


def test_what_asks_for_nothing_is_left_out() -> None:
    given = arguments(top_k=-1)
    assert (given["logit_bias"], given["seed"], given["top_k"], given["logprobs"]) == (None, None, 0, None)


def test_a_temperature_that_means_greedy_is_zero() -> None:
    assert arguments(temperature=1e-6)["temperature"] == 0.0


def test_generations_end_at_the_models_tokens_and_the_clients() -> None:
    assert arguments(stop_token_ids=(7,))["stop_token_ids"] == [2, 7, 9]
    given = arguments(stop_token_ids=(7,), ignore_eos=True)
    assert (given["stop_token_ids"], given["ignore_eos"]) == ([7], True)


@pytest.mark.parametrize(("seed", "passed"), [(5, 5), (-1, 2**63 - 1), (2**63, 0), (-(2**63), 0)])
def test_a_seed_is_one_that_vllm_takes(seed: int, passed: int) -> None:
    assert sampling_arguments(sequence(seed=seed), EOS)["seed"] is None
    seq = Sequence("s", [1], 1, SamplingParams(seed=3), seed=seed, max_tokens=1)
    assert sampling_arguments(seq, EOS)["seed"] == passed


def test_a_prompt_is_scored_by_generating_a_token_that_is_dropped() -> None:
    seq = sequence(max_tokens=0, prompt_logprobs=0, logprobs=0)
    assert sampling_arguments(seq, EOS)["max_tokens"] == 1
    entries = [None, {5: Rank(-0.5, 1)}, {6: Rank(-0.25, 1)}]
    output = Output([Completion([8], [{8: Rank(-1.0, 1)}], "length")], prompt_logprobs=entries)
    result = sequence_output(seq, output)
    assert (result.token_ids, result.logprobs) == ((), ())
    assert result.prompt_logprobs == (
        TokenLogprobs(Logprob(5, -0.5), ()),
        TokenLogprobs(Logprob(6, -0.25), ()),
    )
    assert result.num_computed_tokens == 3


def test_the_chosen_token_and_the_best_ones_best_first() -> None:
    entry = {8: Rank(-3.0, 17), 1: Rank(-0.5, 1), 3: Rank(-0.75, 2)}
    likely = {1: Rank(-0.5, 1), 3: Rank(-0.75, 2)}
    result = sequence_output(sequence(logprobs=2), Output([Completion([8, 1], [entry, likely])], num_cached_tokens=2))
    best = (Logprob(1, -0.5), Logprob(3, -0.75))
    assert result.logprobs == (TokenLogprobs(Logprob(8, -3.0), best), TokenLogprobs(Logprob(1, -0.5), best))
    assert result.token_ids == (8, 1)


def test_no_logprobs_unless_asked_for() -> None:
    seq = sequence()
    result = sequence_output(seq, Output([Completion([8])], num_cached_tokens=2))
    assert (result.logprobs, result.prompt_logprobs) == (None, None)
    assert (result.num_computed_tokens, seq.num_cached_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(None, None), ("stop", "stop"), ("length", "length"), ("abort", "abort"), ("error", "error"), ("new", "error")],
)
def test_reasons(theirs: str | None, ours: str | None) -> None:
    assert finish_reason(Output([Completion([8], finish_reason=theirs)])) == ours  # type: ignore[arg-type]

"""Greedy answers of vLLM and of the native engine on the same weights in float32: the same tokens, texts and ends."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from apt_serve.engine.client import TokenLogprobs
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM, PromptResult

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a land far away,",
    "1, 2, 3, 4,",
    "Der Rhein ist",
)


def complete(http: httpx.Client, prompt: str | list[int], **body: Any) -> list[dict[str, Any]]:
    sent = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "return_token_ids": True} | body
    response = http.post("/v1/completions", json=sent)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def expected(native: LLM, prompt: str | list[int], **sampling: Any) -> PromptResult:
    return native.generate(prompt, SamplingParams(**({"temperature": 0, "max_tokens": 24} | sampling)))[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain(http: httpx.Client, native: LLM, prompt: str) -> None:
    [choice] = complete(http, prompt)
    assert choice["token_ids"] == expected(native, prompt).token_ids


def token(native: LLM, text: str) -> int:
    [token_id] = native.tokenizer.encode(text, add_special_tokens=False)
    return token_id


def part_of_a_character(native: LLM) -> int:
    """A token whose bytes begin a character that it does not complete."""
    wave = native.tokenizer.encode("\N{WATER WAVE}", add_special_tokens=False)
    assert len(wave) > 1
    return wave[0]


CASES: dict[str, dict[str, Any]] = {
    "stop string": {"stop": ["Paris", "is P"]},
    "stop string that is shown": {"stop": [" Paris."], "include_stop_str_in_output": True},
    "stop string that two tokens make": {"stop": ["s.\n"]},
    "stop string not before min_tokens": {"stop": ["\n"], "min_tokens": 4},
    "stop token": {"stop_token_ids": [" Paris"]},
    "stop token that is shown": {"stop_token_ids": [" Paris"], "include_stop_str_in_output": True},
    "stop token not before min_tokens": {"stop_token_ids": [" Paris"], "min_tokens": 3},
    "end of sequence": {"logit_bias": {"<|im_end|>": 100}},
    "end of sequence that would be shown": {
        "logit_bias": {"<|im_end|>": 100},
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    },
    "end of sequence ignored": {"logit_bias": {"<|im_end|>": 100}, "ignore_eos": True, "max_tokens": 3},
    "end of sequence ignored and shown": {
        "logit_bias": {"<|im_end|>": 100},
        "ignore_eos": True,
        "max_tokens": 3,
        "skip_special_tokens": False,
    },
    "end of sequence not before min_tokens": {"logit_bias": {"<|im_end|>": 100}, "min_tokens": 5},
    "bytes that never become a character": {"logit_bias": {"part": 100}, "max_tokens": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "logit bias": {"logit_bias": {" Paris": -100, " London": 5}},
    "several greedy choices": {"n": 3},
    "only scored": {"max_tokens": 0, "echo": True},
}


@pytest.mark.parametrize("case", CASES)
def test_what_shapes_and_ends_an_answer(http: httpx.Client, native: LLM, case: str) -> None:
    def known(name: str) -> int:
        return part_of_a_character(native) if name == "part" else token(native, name)

    prompt, body = PROMPTS[0], dict(CASES[case])
    sampling = body.copy()
    if "stop_token_ids" in body:
        body["stop_token_ids"] = [known(name) for name in body["stop_token_ids"]]
        sampling["stop_token_ids"] = tuple(body["stop_token_ids"])
    if "logit_bias" in body:
        sampling["logit_bias"] = {known(name): bias for name, bias in body["logit_bias"].items()}
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling["logit_bias"].items()}
    if "stop" in body:
        sampling["stop"] = tuple(body["stop"])
    begin = prompt if sampling.pop("echo", False) else ""
    result = expected(native, prompt, **sampling)
    answers = complete(http, prompt, **body)
    assert len(answers) == len(result.completions)
    for answer, completion in zip(answers, result.completions, strict=True):
        assert answer["text"] == begin + completion.text
        assert answer["token_ids"] == completion.token_ids
        assert answer["finish_reason"] == completion.finish_reason
        assert answer["stop_reason"] == completion.stop_reason


def test_log_probabilities(http: httpx.Client, native: LLM) -> None:
    prompt = PROMPTS[2]
    [choice] = complete(http, prompt, logprobs=3, echo=True)
    result = expected(native, prompt, logprobs=3, prompt_logprobs=3)
    entries = [*(result.prompt_logprobs or []), *(result.completions[0].logprobs or [])]
    given = choice["logprobs"]
    assert given["token_logprobs"][0] is None and entries[0] is None
    for logprob, top, entry in zip(given["token_logprobs"][1:], given["top_logprobs"][1:], entries[1:], strict=True):
        assert isinstance(entry, TokenLogprobs)
        assert logprob == pytest.approx(entry.chosen.logprob, abs=1e-3)
        # By value: of two tokens that are about equally likely either may come first.
        wanted = sorted((t.logprob for t in {t.token_id: t for t in (*entry.top, entry.chosen)}.values()), reverse=True)
        assert sorted(top.values(), reverse=True) == pytest.approx(wanted, abs=1e-3)


def test_log_probabilities_are_those_before_temperature_and_penalties(http: httpx.Client) -> None:
    plain = complete(http, PROMPTS[0], max_tokens=1, logprobs=2)[0]["logprobs"]["top_logprobs"][0]
    changed = complete(
        http, PROMPTS[0], max_tokens=1, logprobs=2, temperature=0.5, repetition_penalty=1.5, seed=1, top_k=1
    )[0]["logprobs"]["top_logprobs"][0]
    shared = plain.keys() & changed.keys()
    assert len(shared) >= 2
    assert all(changed[name] == pytest.approx(plain[name], abs=1e-3) for name in shared)


def test_a_prompt_is_found_in_the_prefix_cache(http: httpx.Client) -> None:
    prompt = list(range(1000, 1300))
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    cached = [
        http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached[0] == 0
    assert 100 < cached[1] < 300


def test_choices_of_a_seed_repeat_and_differ_from_one_another(http: httpx.Client) -> None:
    body = {"temperature": 1.0, "seed": -1, "n": 3, "max_tokens": 16}
    first, second = complete(http, PROMPTS[2], **body), complete(http, PROMPTS[2], **body)
    assert [choice["token_ids"] for choice in first] == [choice["token_ids"] for choice in second]
    assert len({tuple(choice["token_ids"]) for choice in first}) == 3

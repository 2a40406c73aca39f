"""The contract of /v1/completions, on any server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from apt_serve.engine.client import Capability
from tests.apt_serve.api.conftest import Endpoint


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"max_tokens": 4, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end with [DONE]."""
    response = http.post(path, json={"max_tokens": 4, "temperature": 0, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_body(http: httpx.Client, endpoint: Endpoint) -> None:
    answer = complete(http, prompt="Hello")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == endpoint.model
    [choice] = answer["choices"]
    assert choice["index"] == 0
    assert choice["text"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    assert "token_ids" not in choice


def test_default_max_tokens_is_16(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "Hello", "ignore_eos": True})
    assert response.json()["usage"]["completion_tokens"] == 16


def test_prompts_in_every_shape_give_the_same_text(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"]
    text = complete(http, prompt="Hello there")["choices"][0]["text"]
    for prompt in (["Hello there"], ids, [ids]):
        assert complete(http, prompt=prompt)["choices"][0]["text"] == text
    both = complete(http, prompt=[ids, ids])
    assert [choice["text"] for choice in both["choices"]] == [text, text]


def test_choices_are_numbered_prompt_by_prompt(http: httpx.Client) -> None:
    answer = complete(http, prompt=["One", "Two"], n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in answer["choices"]] == ["One", "One", "Two", "Two"]
    assert answer["usage"]["completion_tokens"] == 16


def test_stream_says_the_same_as_the_whole_answer(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": ["Café", "Two"], "n": 2, "echo": True, "logprobs": 2, "return_token_ids": True}
    body["seed"], body["temperature"], body["max_tokens"] = 3, 1.0, 24
    whole = complete(http, **body)["choices"]
    for choice in whole:
        parts = [c for chunk in events(http, **body) for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [name for part in parts for name in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [at for part in parts for at in part["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_stream_usage(http: httpx.Client) -> None:
    assert all("usage" not in chunk for chunk in events(http, prompt="Hello"))
    *chunks, last = events(http, prompt="Hello", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(chunk["choices"] for chunk in chunks)
    chunks = events(http, prompt="Hello", stream_options={"continuous_usage_stats": True})
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)


def test_logprobs_layout(http: httpx.Client, endpoint: Endpoint) -> None:
    if Capability.LOGPROBS not in endpoint.capabilities:
        pytest.skip("the engine has no logprobs")
    [choice] = complete(http, prompt="Hello", logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {4}
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob <= 0
        assert 3 <= len(top) <= 4
    assert logprobs["text_offset"][0] == 0


def test_echo_scores_the_prompt(http: httpx.Client, endpoint: Endpoint) -> None:
    if Capability.PROMPT_LOGPROBS not in endpoint.capabilities:
        pytest.skip("the engine has no prompt logprobs")
    answer = complete(http, prompt="Hello there", echo=True, logprobs=1, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == "Hello there"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    longer = complete(http, prompt="Hello there", echo=True, logprobs=1, max_tokens=2)["choices"][0]["logprobs"]
    assert longer["token_logprobs"][1:-2] == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-3)


def test_echo_of_token_ids_is_their_text(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"]
    [choice] = complete(http, prompt=ids, echo=True)["choices"]
    assert choice["text"].startswith("Hello there")


def test_stop_string_is_cut(http: httpx.Client) -> None:
    text = complete(http, prompt="Hello", max_tokens=12)["choices"][0]["text"]
    stop = next(character for character in text[1:] if character.isalpha())
    [choice] = complete(http, prompt="Hello", max_tokens=12, stop=[stop])["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_seed_repeats(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "Hello", "temperature": 1.0, "max_tokens": 12, "n": 2}
    first, second = complete(http, **body, seed=1), complete(http, **body, seed=1)
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in second["choices"]]


def test_null_means_left_out(http: httpx.Client) -> None:
    nulls = dict.fromkeys(
        ("n", "stop", "seed", "logprobs", "logit_bias", "stream", "stream_options", "suffix", "user", "top_k", "echo")
    )
    assert complete(http, prompt="Hello", **nulls) is not None


def test_neutral_values_and_ignored_fields(http: httpx.Client) -> None:
    ignored = {"best_of": 1, "suffix": "", "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert complete(http, prompt="Hello", **ignored) is not None

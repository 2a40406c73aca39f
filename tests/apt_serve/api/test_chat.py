"""The contract of /v1/chat/completions, on any server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.apt_serve.api.test_completions import events

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    sent = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, **body}
    response = http.post("/v1/chat/completions", json=sent)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_body(http: httpx.Client) -> None:
    answer = chat(http)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["system_fingerprint"]
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


def test_developer_is_system_and_parts_are_joined(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    first, second = chat(http), chat(http, messages=same)
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
    assert first["choices"][0]["message"] == second["choices"][0]["message"]


def test_the_prompt_is_the_template(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    answer = chat(http, return_token_ids=True)
    assert answer["prompt_token_ids"] == tokens
    assert len(answer["choices"][0]["token_ids"]) == 4


def test_an_answer_can_be_sent_back(http: httpx.Client) -> None:
    message = chat(http)["choices"][0]["message"] | {"annotations": [], "tool_calls": None, "audio": None}
    chat(http, messages=[*MESSAGES, message, {"role": "user", "content": "More"}])


def test_both_names_of_the_limit(http: httpx.Client) -> None:
    for limits in ({"max_tokens": None, "max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}):
        assert chat(http, **limits)["usage"]["completion_tokens"] == 2


def test_logprobs_layout(http: httpx.Client) -> None:
    [choice] = chat(http, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
    [choice] = chat(http, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_stream(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "n": 2, "logprobs": True, "seed": 5, "temperature": 1.0}
    whole = chat(http, **body)["choices"]
    chunks = events(http, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert chunks.pop()["usage"]["completion_tokens"] == 8
    for choice in whole:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert parts[-1]["delta"] == {}
        assert parts[-1]["finish_reason"] == "length"
        assert all(part["finish_reason"] is None for part in parts[:-1])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        entries = [e for p in parts if p["logprobs"] for e in p["logprobs"]["content"]]
        given, wanted = [e.pop("logprob") for e in entries], [e.pop("logprob") for e in choice["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert given == pytest.approx(wanted, abs=1e-4)  # not every engine sums the same whatever shares the batch


def test_neutral_values_and_ignored_fields(http: httpx.Client) -> None:
    chat(
        http,
        tools=[],
        tool_choice="none",
        functions=None,
        response_format={"type": "text"},
        modalities=["text"],
        parallel_tool_calls=True,
        user="u",
        metadata={},
        store=True,
        safety_identifier="s",
        prompt_cache_key="k",
    )

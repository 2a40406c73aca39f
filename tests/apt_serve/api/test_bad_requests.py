"""Whatever a client sends, it gets a 4xx in OpenAI's shape that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}


def assert_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt.0"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt.0"),
        (COMPLETIONS, {"prompt": [10**30]}, "prompt.0"),
        (COMPLETIONS, {"prompt": [2**31 - 1]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 2000}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1000, "n": 2}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ["b"]]}, "prompt.1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "a", "n": 129}, "n"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": True}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": 5}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["b"] * 17}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [10**8]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias.-1"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias.1"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": 2.1}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": 10**400}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
        (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "a", "seed": 2**64}, "seed"),
        (COMPLETIONS, {"prompt": "a", "priority": 2**40}, "priority"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"nope": 1}}, "stream_options.nope"),
        (COMPLETIONS, {"prompt": "a", "guided_json": {}}, "guided_json"),
        (COMPLETIONS, {"prompt": "a", "model": 5}, "model"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": ["hi"]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        (CHAT, {"messages": [USER | {"tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (CHAT, {"messages": [USER | {"nope": 1}]}, "messages.0.nope"),
        (CHAT, {"messages": [USER], "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": [USER], "logprobs": 2}, "logprobs"),
        (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": [USER], "functions": [{}]}, "functions"),
        (CHAT, {"messages": [USER], "modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"messages": [USER], "audio": {}}, "audio"),
        (CHAT, {"messages": [USER], "prediction": {}}, "prediction"),
        (CHAT, {"messages": [USER], "web_search_options": {}}, "web_search_options"),
        (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}, "response_format.type"),
        (CHAT, {"messages": [USER], "echo": True}, "echo"),
        ("/generate", {}, "text"),
        ("/generate", {"text": "x", "max_length": 0}, "max_length"),
        ("/generate", {"text": "x", "temperature": 3}, "temperature"),
        ("/generate", {"text": "x", "top_p": 1}, "top_p"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ],
)
def test_param_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert_error(http.post(path, json=body), 400, param)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nope",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b"[]",
        b"null",
        b'"text"',
        b"5",
    ],
)
def test_bodies_that_are_no_sound_json_objects(http: httpx.Client, content: bytes) -> None:
    response = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert_error(response, 400)


def test_many_errors_cost_little(http: httpx.Client) -> None:
    body = {"prompt": [[1]] + [["a"]] * 1000} | {f"unknown{number}": 1 for number in range(10_000)}
    assert len(assert_error(http.post(COMPLETIONS, json=body), 400)) < 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types(http: httpx.Client, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert_error(response, 415, code="unsupported_media_type")


def test_charset_in_content_type(http: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert http.post(COMPLETIONS, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})])
def test_unknown_model(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert_error(http.post(path, json=body | {"model": "gpt-99"}), 404, "model", "model_not_found")
    assert_error(http.get("/v1/models/gpt-99"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a b " * 20_000}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "a b " * 20_000]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 20_000}]}, "messages"),
        ("/generate", {"text": "a b " * 20_000}, "text"),
    ],
)
def test_too_long(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert_error(http.post(path, json=body), 400, param, "context_length_exceeded")


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert_error(http.get("/nope"), 404, code="not_found")
    assert_error(http.post("/v1/completions/", json={"prompt": "a"}), 404)
    assert_error(http.get(COMPLETIONS), 405, code="method_not_allowed")
    assert_error(http.delete("/v1/models"), 405)
    assert "Embeddings" in assert_error(http.post("/v1/embeddings", json={}), 404, code="not_available")


def test_unsupported_is_told_from_unknown(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [USER]}
    assert_error(http.post(CHAT, json=body | {"tools": [{}]}), 400, "tools", "unsupported_parameter")
    assert_error(http.post(CHAT, json=body | {"toolz": [{}]}), 400, "toolz", "unknown_parameter")

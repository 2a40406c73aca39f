"""The small endpoints, on any server."""

from __future__ import annotations

import re

import httpx

from tests.apt_serve.api.conftest import Endpoint


def test_generate(http: httpx.Client) -> None:
    answer = http.post("/generate", json={"text": "Hello", "max_length": 5, "temperature": 0}).json()
    assert answer["generated_text"]
    assert answer["tokens"] == 5
    assert answer["latency_ms"] > 0


def test_models(http: httpx.Client, endpoint: Endpoint) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert card["id"] == endpoint.model
    assert http.get(f"/v1/models/{endpoint.model}").json() == card
    [summary] = http.get("/models").json()["models"]
    assert summary["name"] == endpoint.model
    assert summary["max_model_len"] == card["max_model_len"] > 0


def test_tokenize_and_back(http: httpx.Client) -> None:
    body = {"prompt": "Hello café 🌊", "add_special_tokens": False}
    answer = http.post("/tokenize", json=body).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] > 0
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello café 🌊"}


def test_long_texts_are_tokenized_too(http: httpx.Client) -> None:
    text = "word " * 5000
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200


def test_documentation(http: httpx.Client) -> None:
    assert "swagger" in http.get("/docs").text.lower()
    schema = http.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/generate", "/models", "/health"} <= set(
        schema["paths"]
    )
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert "messages" in fields
    assert "tools" not in fields


def test_the_documentation_page_needs_no_other_server(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert assets and not [asset for asset in assets if "//" in asset]
    assert all(http.get(asset).status_code == 200 for asset in assets)

"""OpenAI's own client understands every answer, and raises the exceptions its users expect."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.apt_serve.api.conftest import Endpoint, ScriptedServer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI, endpoint: Endpoint) -> None:
    answer = client.completions.create(model=endpoint.model, prompt="Hello", max_tokens=4, logprobs=2, temperature=0)
    [choice] = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 4
    assert answer.usage is not None and answer.usage.completion_tokens == 4


def test_completion_stream(client: openai.OpenAI, endpoint: Endpoint) -> None:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**body).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**body, stream=True)) == whole


def test_chat(client: openai.OpenAI, endpoint: Endpoint) -> None:
    answer = client.chat.completions.create(
        model=endpoint.model, messages=HELLO, max_completion_tokens=4, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == 8
    again = client.chat.completions.create(model=endpoint.model, messages=HELLO, max_tokens=4, n=2, seed=1)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_chat_stream_with_usage(client: openai.OpenAI, endpoint: Endpoint) -> None:
    stream = client.chat.completions.create(
        model=endpoint.model, messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage is not None and last.usage.completion_tokens == 4


def test_chat_stream_helper(client: openai.OpenAI, endpoint: Endpoint) -> None:
    with client.chat.completions.stream(model=endpoint.model, messages=HELLO, max_tokens=4) as stream:
        final = [event for event in stream][-1]
    assert final.type in ("content.done", "chunk")


def test_models(client: openai.OpenAI, endpoint: Endpoint) -> None:
    assert [model.id for model in client.models.list()] == [endpoint.model]
    assert client.models.retrieve(endpoint.model).id == endpoint.model


def test_client_errors(client: openai.OpenAI, endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=endpoint.model, messages=HELLO, temperature=5)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-99", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=endpoint.model, input="Hello")


def test_server_errors(scripted: ScriptedServer) -> None:
    client = openai.OpenAI(base_url=f"{scripted.base_url}/v1", api_key="none", max_retries=0)
    scripted.engine.script.is_overloaded = True
    with client, pytest.raises(openai.InternalServerError) as overloaded:
        client.chat.completions.create(model="scripted", messages=HELLO)
    assert overloaded.value.status_code == 503
    assert overloaded.value.code == "engine_overloaded"


def test_failure_midway_raises(scripted: ScriptedServer) -> None:
    scripted.engine.script.fail_after = 3
    with openai.OpenAI(base_url=f"{scripted.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="scripted", prompt="Hello", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)

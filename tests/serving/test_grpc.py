"""The real model behind Ray Serve's gRPC proxy: what the proxy passes on, and what it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from apt_serve.rpc.inference_pb2 import (
    FINISH_REASON_LENGTH,
    CancelRequest,
    ChatRequest,
    GenerateRequest,
    Generation,
    ListModelsRequest,
    Message,
    Sampling,
    TokenIds,
)
from apt_serve.rpc.inference_pb2_grpc import InferenceStub
from tests.apt_serve.api.conftest import Endpoint
from tests.apt_serve.rpc.live_grpc import details, trailers
from tests.serving.test_serve_app import gauges, until_idle, until_running

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FRANCE = "The capital of France is"
SHORT = GenerateRequest(text=FRANCE, sampling=Sampling(max_tokens=8, temperature=0))


def long(request_id: str = "") -> GenerateRequest:
    sampling = Sampling(max_tokens=1500, temperature=0, ignore_eos=True)
    return GenerateRequest(text="Once upon a time", sampling=sampling, request_id=request_id)


@pytest.fixture
async def channel(serve_app: Endpoint) -> AsyncIterator[grpc.aio.Channel]:
    assert serve_app.grpc_address
    async with grpc.aio.insecure_channel(serve_app.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return InferenceStub(channel)


@pytest.fixture
async def client(serve_app: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=serve_app.base_url, timeout=300) as client:
        yield client


async def text_of(messages: AsyncIterator[Generation]) -> str:
    return "".join([choice.text async for message in messages for choice in message.choices])


async def test_an_answer_is_that_of_http_whole_and_streamed(stub: Any, client: httpx.AsyncClient) -> None:
    body = {"prompt": FRANCE, "max_tokens": 8, "temperature": 0}
    expected = (await client.post("/v1/completions", json=body)).json()
    call = stub.Generate(SHORT, metadata=(("x-request-id", "mine-1"),))
    answer = await call
    [choice] = answer.choices
    assert choice.text == expected["choices"][0]["text"]
    assert (choice.finish_reason, answer.usage.completion_tokens) == (FINISH_REASON_LENGTH, 8)
    assert answer.request_id == "mine-1"
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"
    streamed = stub.GenerateStream(SHORT)
    parts = [message async for message in streamed]
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert parts[-1].usage.completion_tokens == 8
    assert await streamed.code() == grpc.StatusCode.OK
    assert dict(await streamed.trailing_metadata())["x-request-id"] == parts[0].request_id


@pytest.mark.parametrize("stream", [False, True])
async def test_chat(stub: Any, stream: bool) -> None:
    messages = [Message(role="user", content="What is the capital of France?")]
    chat = ChatRequest(messages=messages, sampling=Sampling(max_tokens=12, temperature=0), stream=stream)
    assert "Paris" in await text_of(stub.Chat(chat))


async def test_models_are_listed(stub: Any, serve_app: Endpoint) -> None:
    answer = await stub.ListModels(ListModelsRequest())
    assert [model.name for model in answer.models] == [serve_app.model]


@pytest.mark.parametrize("way", ["generate", "stream", "chat"])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_a_client_that_leaves_frees_everything(stub: Any, client: httpx.AsyncClient, way: str, end: str) -> None:
    await until_idle(client)
    timeout = 1.5 if end == "deadline" else None
    messages = [Message(role="user", content="Tell a story.")]
    chat = ChatRequest(messages=messages, sampling=long().sampling, stream=True)
    calls = {
        "generate": lambda: stub.Generate(long(), timeout=timeout),
        "stream": lambda: stub.GenerateStream(long(), timeout=timeout),
        "chat": lambda: stub.Chat(chat, timeout=timeout),
    }
    call = calls[way]()
    if way != "generate":
        await anext(aiter(call))
    await until_running(client)
    if end == "cancel":
        call.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call if way == "generate" else await text_of(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await until_idle(client) < 10.0


async def test_a_connection_that_breaks_frees_everything(serve_app: Endpoint, client: httpx.AsyncClient) -> None:
    async with grpc.aio.insecure_channel(serve_app.grpc_address) as channel:
        streams = [InferenceStub(channel).GenerateStream(long()) for _ in range(8)]
        for stream in streams:
            await anext(aiter(stream))
        assert (await gauges(client))["apt:num_requests_running"] == 8
    assert await until_idle(client) < 10.0


async def test_cancel_by_name(stub: Any, client: httpx.AsyncClient) -> None:
    stream = stub.GenerateStream(long("mine"))
    first = await anext(aiter(stream))
    assert first.request_id == "mine"
    await stub.Cancel(CancelRequest(request_id="mine"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await text_of(stream)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert await until_idle(client) < 10.0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(CancelRequest(request_id="mine"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_errors_keep_their_status_details_and_metadata(stub: Any, channel: grpc.aio.Channel) -> None:
    wrong = [
        (GenerateRequest(text="a", sampling=Sampling(top_p=2)), grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p"),
        (GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (GenerateRequest(token_ids=TokenIds(ids=[10**9])), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (GenerateRequest(text="a" * 30_000), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (GenerateRequest(text="a", model="nothing"), grpc.StatusCode.NOT_FOUND, "model"),
        (GenerateRequest(text="x" * 5_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    ]
    for request, code, field in wrong:
        for call in (stub.Generate(request), stub.GenerateStream(request)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call if isinstance(call, grpc.aio.UnaryUnaryCall) else await text_of(call)
            assert caught.value.code() == code
            assert details(caught.value)[1] == field
            assert trailers(caught.value)["x-request-id"]
    for method in ("Generate", "ListModels"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/apt.v1.Inference/{method}")(b"\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/apt.v1.Inference/Embed")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_sixteen_streams_get_what_each_gets_alone(stub: Any) -> None:
    requests = [
        GenerateRequest(text=f"The number {number} is", sampling=Sampling(max_tokens=12, temperature=0))
        for number in range(16)
    ]
    together = await asyncio.gather(*(text_of(stub.GenerateStream(request)) for request in requests))
    assert together == [await text_of(stub.GenerateStream(request)) for request in requests]


async def test_health(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "apt.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    began = time.monotonic()
    watch.cancel()
    assert time.monotonic() - began < 5


def test_reflection(serve_app: Endpoint) -> None:
    with grpc.insecure_channel(serve_app.grpc_address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"apt.v1.Inference", "grpc.health.v1.Health"} <= names

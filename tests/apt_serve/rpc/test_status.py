"""What a call ends with when something goes wrong, and that generations end with their calls."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from apt_core.errors import ConfigError
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.records.config import RecordsConfig
from apt_serve.rpc.inference_pb2 import (
    CancelRequest,
    ChatRequest,
    GenerateRequest,
    Generation,
    ListModelsRequest,
    Message,
    Sampling,
)
from apt_serve.rpc.inference_pb2_grpc import InferenceStub
from apt_serve.rpc.listen import listening
from tests.apt_serve.api.conftest import CONFIG
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.rpc.live_grpc import LiveGrpc, details, trailers

LONG = Sampling(max_tokens=3000, temperature=0)


def long(request_id: str = "") -> GenerateRequest:
    return GenerateRequest(text="a", sampling=LONG, request_id=request_id)


def failure(live: LiveGrpc, way: str, request: GenerateRequest | None = None) -> grpc.RpcError:
    request = request or GenerateRequest(text="a")
    with pytest.raises(grpc.RpcError) as caught:
        if way == "generate":
            live.stub.Generate(request)
        elif way == "stream":
            list(live.stub.GenerateStream(request))
        else:
            list(live.stub.Chat(ChatRequest(messages=[Message(role="user", content="a")], stream=way == "chat stream")))
    return caught.value


WAYS = pytest.mark.parametrize("way", ["generate", "stream", "chat", "chat stream"])


@WAYS
def test_an_overloaded_engine_is_unavailable_and_says_when_to_ask_again(live: LiveGrpc, way: str) -> None:
    live.engine.script.is_overloaded = True
    error = failure(live, way)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert details(error) == ("ENGINE_OVERLOADED", None, 3)
    assert trailers(error)["retry-after"] == "3"
    assert trailers(error)["x-request-id"]


@WAYS
def test_a_draining_server_is_unavailable(live: LiveGrpc, way: str) -> None:
    live.engine.script.is_stopped = True
    error = failure(live, way)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert details(error) == ("ENGINE_STOPPED", None, 1)


@WAYS
def test_an_engine_that_fails_midway_is_an_internal_error(live: LiveGrpc, way: str) -> None:
    live.engine.script.fail_after = 3
    error = failure(live, way)
    assert error.code() == grpc.StatusCode.INTERNAL
    assert details(error)[0] == "ENGINE_ERROR"


@WAYS
def test_an_error_that_nobody_foresaw_tells_nothing_of_the_inside(live: LiveGrpc, way: str) -> None:
    live.engine.script.breaks_at_once = True
    error = failure(live, way)
    assert error.code() == grpc.StatusCode.INTERNAL
    assert error.details() == "The server failed to answer."
    assert "secret" not in str(trailers(error)) and "Traceback" not in str(error)


def test_tokens_before_a_failure_are_kept(live: LiveGrpc) -> None:
    live.engine.script.fail_after = 20
    live.engine.script.token_delay_s = 0.005
    seen: list[Generation] = []
    with pytest.raises(grpc.RpcError) as caught:
        for message in live.stub.GenerateStream(long()):
            seen.append(message)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert seen and not seen[-1].choices[0].finish_reason


def test_the_servers_own_time_limit(tmp_path: Path) -> None:
    config = ServerConfig(api=ApiConfig(request_timeout_s=0.3), records=RecordsConfig(folder=str(tmp_path)))
    with LiveGrpc(config) as live:
        live.engine.script.token_delay_s = 0.01
        error = failure(live, "stream", long())
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert details(error)[0] == "REQUEST_TIMEOUT"
        wait_until(lambda: not live.engine.running)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_clients_deadline_ends_the_generation(live: LiveGrpc, way: str) -> None:
    live.engine.script.token_delay_s = 0.01
    with pytest.raises(grpc.RpcError) as caught:
        if way == "generate":
            live.stub.Generate(long(), timeout=0.3)
        else:
            list(live.stub.GenerateStream(long(), timeout=0.3))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: not live.engine.running, 5)
    assert len(live.engine.aborted) == 1


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("moment", ["before the first token", "in the middle"])
def test_a_call_that_is_cancelled_aborts_in_the_engine(live: LiveGrpc, way: str, moment: str) -> None:
    live.engine.script.first_delay_s = 30 if moment == "before the first token" else 0
    live.engine.script.token_delay_s = 0.005
    made = live.engine.num_tokens_made
    call = live.stub.Generate.future(long()) if way == "generate" else live.stub.GenerateStream(long())
    wait_until(lambda: live.engine.running and (moment != "in the middle" or live.engine.num_tokens_made > made + 3))
    call.cancel()
    wait_until(lambda: not live.engine.running, 5)
    assert len(live.engine.aborted) == 1


def test_a_connection_that_breaks_aborts_all_its_calls(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.005

    channel = grpc.insecure_channel(live.address, options=[("grpc.use_local_subchannel_pool", 1)])
    streams = [InferenceStub(channel).GenerateStream(long()) for _ in range(8)]
    for stream in streams:
        next(stream)
    assert len(live.engine.running) == 8
    channel.close()
    wait_until(lambda: not live.engine.running, 5)
    assert len(live.engine.aborted) == 8


def test_a_reader_that_stops_slows_nobody_and_is_given_up(tmp_path: Path) -> None:
    """Its messages wait in flow control; the engine's deltas merge meanwhile."""
    api = ApiConfig(websocket_patience_s=0.5)
    with LiveGrpc(ServerConfig(api=api, records=RecordsConfig(folder=str(tmp_path)))) as live:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1024)]
        with grpc.insecure_channel(live.address, options=options) as channel:
            stub = InferenceStub(channel)
            sampling = Sampling(max_tokens=3900, temperature=0, logprobs=20, n=16)
            live.engine.script.token_delay_s = 0.001
            stream = stub.GenerateStream(GenerateRequest(text="a", sampling=sampling))
            next(stream)
            began = time.monotonic()
            assert live.stub.Generate(GenerateRequest(text="b")).usage.completion_tokens == 16
            assert time.monotonic() - began < 10
            wait_until(lambda: not live.engine.running, 60)
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert details(caught.value)[0] == "CLIENT_TOO_SLOW"


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_cancel_ends_ones_own_generation_by_its_name(live: LiveGrpc, way: str) -> None:
    live.engine.script.token_delay_s = 0.005
    method = live.stub.Generate.future if way == "generate" else live.stub.GenerateStream
    call = method(long(f"mine-{way}"))
    wait_until(lambda: live.engine.running)
    live.stub.Cancel(CancelRequest(request_id=f"mine-{way}"))
    with pytest.raises(grpc.RpcError) as caught:
        call.result() if way == "generate" else list(call)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert details(caught.value)[0] == "CANCELLED"
    wait_until(lambda: not live.engine.running, 5)
    assert len(live.engine.aborted) == 1
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Cancel(CancelRequest(request_id=f"mine-{way}"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_cancel_takes_the_id_that_an_answer_carries(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.005
    call = live.stub.GenerateStream(long())
    first = next(call)
    live.stub.Cancel(CancelRequest(request_id=first.request_id))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("request_id", ["", "nobody's", "x" * 5000, "é\n"])
def test_cancelling_what_does_not_run_is_not_found(live: LiveGrpc, request_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Cancel(CancelRequest(request_id=request_id))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert details(caught.value) == ("GENERATION_NOT_FOUND", "request_id", None)


def test_a_name_is_free_again_when_its_generation_is_over(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.005
    call = live.stub.GenerateStream(long("once"))
    next(call)
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Generate(long("once"))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert details(caught.value) == ("REQUEST_ID_IN_USE", "request_id", None)
    call.cancel()
    wait_until(lambda: not live.engine.running)
    short = GenerateRequest(text="a", sampling=Sampling(max_tokens=1), request_id="once")
    assert live.stub.Generate(short).request_id == "once"
    assert live.stub.Generate(short).request_id == "once"


def test_a_message_that_is_too_large(live: LiveGrpc) -> None:
    size = CONFIG.api.max_body_bytes
    error = failure(live, "generate", GenerateRequest(text="a" * (size + 1)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure(live, "stream", GenerateRequest(text="a" * (size - 100))).code() == (
        grpc.StatusCode.INVALID_ARGUMENT
    )


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x0a"])
@pytest.mark.parametrize("method", ["Generate", "Cancel"])
def test_bytes_that_are_no_message(live: LiveGrpc, method: str, data: bytes) -> None:
    call = live.channel.unary_unary(f"/apt.v1.Inference/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(data)
    if method == "Cancel" and data[0] == 0x12:  # a field that it does not know
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    else:
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "Traceback" not in str(caught.value.details())


def test_a_method_that_is_none(live: LiveGrpc) -> None:
    for path in ("/apt.v1.Inference/Embed", "/apt.v2.Inference/Generate"):
        with pytest.raises(grpc.RpcError) as caught:
            live.channel.unary_unary(path)(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_calls_beyond_what_is_bounded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_serve.rpc.listen.CONNECTION_HEADROOM", 0)
    model = replace(ServerConfig().model, max_num_seqs=2, max_waiting_requests=1)
    config = ServerConfig(model=model, records=RecordsConfig(folder=str(tmp_path)))
    with LiveGrpc(config) as live:
        live.engine.script.token_delay_s = 0.01
        streams = [live.stub.GenerateStream(long()) for _ in range(3)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            live.stub.ListModels(ListModelsRequest())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in streams:
            stream.cancel()


def test_two_servers_do_not_share_a_port(live: LiveGrpc, tmp_path: Path) -> None:

    host, port = live.address.split(":")

    async def second() -> None:
        async with listening(live._services, CONFIG, host, int(port)):
            pass

    with pytest.raises(ConfigError, match="cannot listen"):
        asyncio.run(second())


def test_a_hundred_random_disconnects_leave_nothing_behind(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.002
    calls = [live.stub.GenerateStream(long()) for _ in range(100)]
    threads = [threading.Timer(0.003 * number, call.cancel) for number, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not live.engine.running, 10)
    assert not live._services.running._ends

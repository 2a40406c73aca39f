"""The server under uvicorn alone, stopped by signals while requests run."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from apt_core.errors import CheckpointError
from apt_serve import server, standalone
from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.engine.metrics import NullMetrics
from apt_serve.rpc.inference_pb2 import FINISH_REASON_LENGTH, GenerateRequest, Sampling
from apt_serve.rpc.inference_pb2_grpc import InferenceStub
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine


class DrainingEngine(ScriptedEngine):
    """Waits for its requests at the end, as the real one does."""

    async def stop(self, grace_s: float = 0.0) -> None:
        await super().stop(grace_s)
        async with asyncio.timeout(grace_s):
            while self.running:
                await asyncio.sleep(0.01)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEngine]:
    """The engine of every server made in a test. Loggers are put back as they were."""
    loggers = [logging.getLogger(name) for name in ("apt_core", "apt_kernels", "apt_serve")]
    before = [(logger, logger.level, logger.handlers, logger.propagate) for logger in loggers]
    scripted = DrainingEngine(NullMetrics())
    monkeypatch.setattr(server, "make_engine", lambda config, metrics: scripted)
    yield scripted
    for logger, level, handlers, propagate in before:
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


@pytest.fixture
def http() -> HttpOptions:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return HttpOptions(port=probe.getsockname()[1])


@pytest.fixture
def grpc_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def run_beside(
    config: ServerConfig, http: HttpOptions, client: Callable[[], None], grpc_options: GrpcOptions = NO_GRPC
) -> None:
    """Run the server here, where signals arrive, and a client of it on a thread once it is ready."""
    failures: list[BaseException] = []

    def watched() -> None:
        try:
            client()
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watched)
    standalone.run(config, http, thread.start, grpc_options)
    thread.join()
    if failures:
        raise failures[0]


def stream(http: HttpOptions, max_tokens: int) -> str:
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True}
    return httpx.post(f"{http.url}/v1/completions", json=body, timeout=30).text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_ends_as_it_should_and_new_requests_get_503(
    engine: ScriptedEngine, http: HttpOptions, number: signal.Signals
) -> None:
    engine.script.token_delay_s = 0.02

    def client() -> None:
        answers: list[str] = []
        reader = threading.Thread(target=lambda: answers.append(stream(http, 50)))
        reader.start()
        wait_until(lambda: engine.num_tokens_made > 3)
        os.kill(os.getpid(), number)
        wait_until(lambda: engine.script.is_stopped)
        refused = httpx.post(f"{http.url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{http.url}/ready").status_code == 503
        reader.join()
        lines = [line for line in answers[0].splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

    run_beside(ServerConfig(), http, client)
    assert engine.stopped_with_grace_s == ServerConfig().api.shutdown_grace_s


def test_a_second_signal_does_not_wait(
    engine: ScriptedEngine, http: HttpOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script.token_delay_s = 0.02
    codes: list[int] = []
    monkeypatch.setattr(standalone.os, "_exit", codes.append)

    def client() -> None:
        reader = threading.Thread(target=stream, args=(http, 50))
        reader.start()
        wait_until(lambda: engine.num_tokens_made > 3)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: engine.script.is_stopped)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: bool(codes))
        reader.join()

    run_beside(ServerConfig(), http, client)
    assert codes == [128 + signal.SIGTERM]


def test_what_loading_raises_is_what_run_raises(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    async def fail() -> None:
        raise CheckpointError("is missing", file="model.safetensors")

    monkeypatch.setattr(engine, "start", fail)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: is missing$"):
        standalone.run(ServerConfig(), HttpOptions(), lambda: None)


async def test_a_problem_is_a_dead_or_hanging_engine_of_a_ready_server(engine: ScriptedEngine) -> None:
    subject = server.Server(ServerConfig())
    engine.script.is_alive = False
    assert subject.problem() is None, "it has not started"
    await subject.start()
    assert subject.problem() == "the engine is dead"
    engine.script.is_alive, engine.script.is_stalled = True, True
    assert subject.problem() == "requests run but no step has completed for 99 s"
    engine.script.is_stalled = False
    assert subject.problem() is None
    await subject.stop()
    engine.script.is_alive = False
    assert subject.problem() is None, "it was told to stop"


def test_grpc_drains_with_http(engine: ScriptedEngine, http: HttpOptions, grpc_port: int) -> None:
    engine.script.token_delay_s = 0.02
    sampling = Sampling(max_tokens=50, temperature=0)

    def client() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            stub, health = InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            call = stub.GenerateStream(GenerateRequest(text="a", sampling=sampling))
            next(call)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: engine.script.is_stopped)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(GenerateRequest(text="a", sampling=sampling))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            last = list(call)[-1]
            assert last.usage.completion_tokens == 50
            assert last.choices[0].finish_reason == FINISH_REASON_LENGTH

    run_beside(ServerConfig(), http, client, GrpcOptions().at(grpc_port))


def test_without_a_port_there_is_no_grpc(engine: ScriptedEngine, http: HttpOptions) -> None:
    def client() -> None:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", GrpcOptions().port)) != 0
        os.kill(os.getpid(), signal.SIGTERM)

    run_beside(ServerConfig(), http, client)

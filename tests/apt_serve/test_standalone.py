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

import httpx
import pytest

from apt_core.errors import CheckpointError
from apt_serve import server, standalone
from apt_serve.config import ServerConfig
from apt_serve.config_file import HttpOptions
from apt_serve.engine.metrics import NullMetrics
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


def run_beside(config: ServerConfig, http: HttpOptions, client: Callable[[], None]) -> None:
    """Run the server here, where signals arrive, and a client of it on a thread once it is ready."""
    failures: list[BaseException] = []

    def watched() -> None:
        try:
            client()
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watched)
    standalone.run(config, http, thread.start)
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

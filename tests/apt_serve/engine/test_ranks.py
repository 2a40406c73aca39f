"""Ranks that end, hang or cannot load: the engine ends with an account of it, and no process is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from apt_core.errors import ConfigError
from apt_core.parallel import Communicator
from apt_serve.engine import load, ranks
from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.client import EngineStoppedError, GenerationFailedError, GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import Engine
from apt_serve.engine.executor import EngineBrokenError, Executor
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import StepInput, StepOutput
from apt_serve.llm import LLM
from tests.apt_core.checkpoint.tiny import save_folder

ROOT = Path(__file__).parents[3]
TINY: dict[str, Any] = {"tensor_parallel_size": 2, "num_threads": 1, "num_kv_blocks": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    save_folder(path)
    return path


@pytest.fixture
async def serving(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    """A parameter is stall_timeout_s."""
    engine = AsyncEngine(EngineConfig(source=str(folder), stall_timeout_s=getattr(request, "param", 60.0), **TINY))
    await engine.start()
    yield engine
    await engine.stop()
    assert workers() == []


def workers() -> list[psutil.Process]:
    """Processes of ranks, of this process."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


async def generate(engine: AsyncEngine, on_token: Callable[[], None] = lambda: None, max_tokens: int = 80) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    async for _ in engine.generate(GenerationRequest("r", (5, 6, 7), sampling)):
        on_token()


def test_heads_that_ranks_would_cut_are_refused_before_any_process_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(ranks._Worker, "start", start)
    with pytest.raises(ConfigError) as caught:
        Engine(EngineConfig(tensor_parallel_size=2))
    assert str(caught.value) == (
        "tensor_parallel_size: 2 ranks cannot share the model's num_attention_heads (9) and num_key_value_heads (3)"
    )


async def test_a_worker_killed_midway(serving: AsyncEngine) -> None:
    (worker,) = workers()
    started = time.monotonic()
    with pytest.raises(GenerationFailedError, match=rf"rank 1 \(process {worker.pid}\) was killed by SIGKILL"):
        await generate(serving, lambda: os.kill(worker.pid, signal.SIGKILL))
    assert time.monotonic() - started < 40  # not the 60 s of a stall
    assert not serving.stats().is_alive
    with pytest.raises(EngineStoppedError, match="rank 1"):
        await generate(serving)


@pytest.mark.parametrize("serving", [2.0], indirect=True)
async def test_a_worker_that_hangs(serving: AsyncEngine) -> None:
    (worker,) = workers()
    started = time.monotonic()
    with pytest.raises(
        GenerationFailedError,
        match=rf"longer than stall_timeout_s.*\nrank 1 \(process {worker.pid}\) does not answer",
    ):
        await generate(serving, lambda: os.kill(worker.pid, signal.SIGSTOP))
    assert time.monotonic() - started < 40
    assert not serving.stats().is_alive


async def test_a_worker_killed_while_there_is_nothing_to_do(serving: AsyncEngine) -> None:
    (worker,) = workers()
    worker.kill()
    async with asyncio.timeout(60):
        while serving.stats().is_alive:
            await asyncio.sleep(0.05)
    with pytest.raises(GenerationFailedError, match="rank 1"):
        await generate(serving)


async def test_signals_of_a_terminal_leave_draining_to_rank_0(serving: AsyncEngine) -> None:
    (worker,) = workers()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    await generate(serving, max_tokens=5)


def test_a_worker_that_cannot_load_says_why_at_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 loads another checkpoint than its worker, which finds none."""
    monkeypatch.setattr(load, "_load_rank_of", no_such_model)
    with pytest.raises(EngineBrokenError, match=r"(?s)^rank 1 failed:\nTraceback.*FileNotFoundError: no such model"):
        Engine(EngineConfig(source=str(folder), **TINY))
    assert workers() == []


def no_such_model(config: EngineConfig, communicator: object) -> None:
    raise FileNotFoundError("no such model")


class Broken:
    """A worker's executor whose third step does something else."""

    def __init__(self, executor: Executor[Any], act: Callable[[], None]) -> None:
        self._executor, self._act, self._num_steps = executor, act, 0
        self.max_steps_in_flight = executor.max_steps_in_flight

    def launch(self, step: StepInput) -> Any:
        self._num_steps += 1
        if self._num_steps == 3:
            self._act()
        return self._executor.launch(step)

    def collect(self, handle: Any) -> StepOutput:
        return self._executor.collect(handle)


def raising(config: EngineConfig, communicator: Communicator) -> Any:
    return Broken(load._load_rank_of(config, communicator), run_out_of_memory)


def hanging(config: EngineConfig, communicator: Communicator) -> Any:
    return Broken(load._load_rank_of(config, communicator), wait_for_nothing)


def run_out_of_memory() -> None:
    raise MemoryError("injected")


def wait_for_nothing() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(
    ("build", "account"),
    [
        (raising, r"(?s)^rank 1 failed:\nTraceback.*MemoryError: injected"),
        (hanging, r"(?s)^a step has taken longer.*rank 1 \(process \d+\) is here:\n.*in wait_for_nothing"),
    ],
)
def test_the_account_has_the_traceback_of_the_rank_at_fault(
    build: Any, account: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_load_rank_of", build)
    llm = LLM(str(folder), stall_timeout_s=2.0, **TINY)
    with pytest.raises(EngineBrokenError, match=account):
        llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    with pytest.raises(EngineBrokenError, match=account):
        llm.generate([5, 6, 7])
    llm.engine.close()
    assert workers() == []


def test_rank_0_that_cannot_load_ends_the_others(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^kv_cache_gib: needs a KV cache"):
        Engine(EngineConfig(source=str(folder), kv_cache_gib=10**6, **(TINY | {"num_kv_blocks": None})))
    assert workers() == []


def test_an_engine_that_is_dropped_ends_its_ranks(folder: Path) -> None:
    llm = LLM(str(folder), **TINY)
    assert len(workers()) == 1
    del llm
    assert workers() == []


SCRIPT = """
import sys, psutil
from apt_serve.llm import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, num_kv_blocks=16, num_threads=1)
    children = psutil.Process().children()
    print(*(child.pid for child in children if "spawn_main" in " ".join(child.cmdline())), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["exit", "SIGKILL"])
def test_ranks_end_with_the_process_that_started_them(end: str, folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        if end == "SIGKILL":
            process.kill()
        _, errors = process.communicate("\n", timeout=60)
        worker.wait(timeout=60)
        assert process.returncode == (0 if end == "exit" else -signal.SIGKILL)
        assert end == "SIGKILL" or "Error" not in errors

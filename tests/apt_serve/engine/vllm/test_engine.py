"""The engine around vLLM: streams, aborts, overload, faults, shutdown, metrics. vLLM itself is stood in for."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from apt_core.errors import ConfigError, InvalidRequestError
from apt_serve.engine.client import (
    EngineOverloadedError,
    EngineStoppedError,
    GenerationFailedError,
    GenerationOutput,
    GenerationRequest,
)
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.metrics import FinishRecord, StepRecord
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.vllm import VllmEngine, engine
from apt_serve.engine.vllm.load import EngineStartError
from tests.apt_serve.engine.vllm.fake import TEXT, FakeLlm, fake_vllm

PROMPT = (1, 2, 3)
CONFIG = EngineConfig(engine="vllm", stall_timeout_s=0.05)
Start = Callable[..., Awaitable[VllmEngine]]


@dataclass
class Sink:
    steps: list[StepRecord] = field(default_factory=list)
    ends: list[FinishRecord] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def finished(self, record: FinishRecord) -> None:
        self.ends.append(record)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch, sink: Sink) -> AsyncIterator[Start]:
    """Starts a VllmEngine over a stand-in."""
    started: list[VllmEngine] = []
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMClientError = Refused  # type: ignore[attr-defined]
    exceptions.GracefulHTTPError = Full  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    async def start(llm: FakeLlm, **settings: Any) -> VllmEngine:
        monkeypatch.setattr(engine, "load", lambda config, recorder: fake_vllm(llm, **settings))
        made = VllmEngine(CONFIG, sink)
        await made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        await made.stop()


class Refused(Exception):
    parameter = "logprobs"


class Full(Exception):
    pass


def request(**sampling: Any) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(**({"max_tokens": 6} | sampling)))


async def collect(made: VllmEngine, **sampling: Any) -> list[GenerationOutput]:
    return [output async for output in made.generate(request(**sampling))]


def text(outputs: list[GenerationOutput], index: int = 0) -> str:
    return "".join(output.text for output in outputs if output.index == index)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_generation(start: Start) -> None:
    made = await start(FakeLlm())
    outputs = await collect(made)
    assert text(outputs) == TEXT[:6].decode()
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert outputs[0].num_cached_tokens == 1


async def test_choices_are_requests_of_their_own(start: Start) -> None:
    made = await start(FakeLlm())
    outputs = await collect(made, n=3)
    assert [text(outputs, index) for index in range(3)] == [TEXT[i : i + 6].decode() for i in range(3)]


async def test_a_stop_string_ends_vllms_request_too(start: Start) -> None:
    llm = FakeLlm()
    made = await start(llm)
    outputs = await collect(made, stop=("upon",), max_tokens=30)
    assert (text(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason) == ("Once ", "stop", "upon")
    await until(lambda: not llm.running)
    assert made.stats().num_running == made.stats().num_waiting == 0


async def test_only_scoring_generates_nothing(start: Start, sink: Sink) -> None:
    made = await start(FakeLlm())
    [output] = await collect(made, max_tokens=0)
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
    assert sink.ends[0].num_generated_tokens == 0


@pytest.mark.parametrize("num_read", [0, 1])
async def test_closing_aborts(start: Start, sink: Sink, num_read: int) -> None:
    llm = FakeLlm(delay_s=0.005)
    made = await start(llm)
    async with aclosing(made.generate(request(n=2, max_tokens=50))) as outputs:
        for _ in range(num_read):
            await anext(outputs)
    assert not llm.running
    assert made.stats().num_waiting == 0
    assert [record.reason for record in sink.ends] == ["abort"] * (2 * bool(num_read))


async def test_a_reader_that_is_cancelled_at_once_takes_no_place(start: Start, sink: Sink) -> None:
    made = await start(FakeLlm(), max_num_choices=2)
    for _ in range(5):
        reader = asyncio.create_task(collect(made, n=2))
        await asyncio.sleep(0)  # its tasks exist now, and have not run
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    assert len(await collect(made)) == 6
    assert [record.reason for record in sink.ends].count("abort") == 10


async def test_too_many_are_refused_and_places_come_back(start: Start) -> None:
    llm = FakeLlm(delay_s=0.005)
    made = await start(llm, max_num_choices=3)
    async with aclosing(made.generate(request(n=2, max_tokens=50))) as outputs:
        await anext(outputs)
        with pytest.raises(EngineOverloadedError) as caught:
            await collect(made, n=2)
        assert caught.value.retry_after_s >= 1
        assert len(await collect(made)) == 6
    assert len(await collect(made, n=3)) == 18


async def test_what_could_never_be_served_is_refused(start: Start) -> None:
    made = await start(FakeLlm())
    with pytest.raises(InvalidRequestError, match="at most 8"):
        await collect(made, n=9)
    full = GenerationRequest("r", tuple(range(1, 65)), SamplingParams(max_tokens=0))
    with pytest.raises(InvalidRequestError, match="at most 63 tokens"):
        made.check(full)


async def test_a_failure_is_its_requests_alone(start: Start, sink: Sink) -> None:
    llm = FakeLlm(delay_s=0.002)
    made = await start(llm)
    async with aclosing(made.generate(request(max_tokens=60))) as outputs:
        await anext(outputs)
        llm.error = RuntimeError("secret")
        with pytest.raises(GenerationFailedError) as caught:
            while True:
                await anext(outputs)
    assert "secret" not in str(caught.value)
    llm.error = None
    assert len(await collect(made)) == 6
    assert [record.reason for record in sink.ends] == ["error", "length"]


@pytest.mark.parametrize(("error", "kind"), [(Refused("no"), InvalidRequestError), (Full("no"), EngineOverloadedError)])
async def test_what_vllm_refuses_is_no_fault(start: Start, error: Exception, kind: type[Exception]) -> None:
    made = await start(FakeLlm(error=error))
    with pytest.raises(kind) as caught:
        await collect(made)
    assert getattr(caught.value, "param", "logprobs") == "logprobs"


async def test_a_dead_engine_takes_nothing(start: Start) -> None:
    llm = FakeLlm()
    made = await start(llm)
    assert made.stats().is_alive
    llm.errored = True
    assert not made.stats().is_alive
    with pytest.raises(EngineStoppedError):
        await collect(made)


async def test_an_engine_that_dies_at_its_first_request_has_not_started(start: Start) -> None:
    llm = FakeLlm(error=ValueError("out of memory"))
    await start(llm)  # what only fails may still serve other requests
    llm.errored = True
    with pytest.raises(EngineStartError, match="first request"):
        await start(llm)
    assert llm.num_shutdowns == 1


@pytest.mark.parametrize(("reason", "kind"), [("error", GenerationFailedError), ("abort", None)])
async def test_a_reason_that_only_vllm_knows(start: Start, reason: str, kind: type[Exception] | None) -> None:
    made = await start(FakeLlm(ends_with=reason))
    if kind is not None:
        with pytest.raises(kind):
            await collect(made)
    else:
        outputs = await collect(made)
        assert (text(outputs), outputs[-1].finish_reason) == ("O", "abort")
    assert made.stats().num_waiting == 0


async def test_stopping_lets_requests_finish_within_the_grace_period(start: Start) -> None:
    llm = FakeLlm(delay_s=0.002)
    made = await start(llm)
    reader = asyncio.create_task(collect(made, max_tokens=20))
    await until(lambda: llm.running)
    await made.stop(grace_s=5)
    assert len(await reader) == 20
    assert llm.num_shutdowns == 1
    with pytest.raises(EngineStoppedError):
        await collect(made)
    await made.stop()
    assert llm.num_shutdowns == 1
    assert not made.stats().is_alive
    assert made.model.name == "m"


async def test_stopping_aborts_what_is_left_even_if_it_has_not_begun(start: Start) -> None:
    llm = FakeLlm(delay_s=0.002)
    made = await start(llm)
    running = asyncio.create_task(collect(made, max_tokens=60))
    await until(lambda: llm.running)
    new = asyncio.create_task(collect(made, max_tokens=60))
    await asyncio.sleep(0)
    await made.stop()
    assert (await running)[-1].finish_reason == "abort"
    assert [output.finish_reason for output in await new] == ["abort"]


async def test_a_stall_is_told_from_rest(start: Start) -> None:
    llm = FakeLlm(delay_s=0.1)
    made = await start(llm)
    await asyncio.sleep(0.06)
    assert not made.stats().is_stalled
    reader = asyncio.create_task(collect(made, max_tokens=1))
    await asyncio.sleep(0.06)
    assert made.stats().is_stalled
    assert made.stats().seconds_since_progress > 0.05
    made._recorder.record(None, None)
    assert not made.stats().is_stalled
    await reader


def scheduler(**given: Any) -> SimpleNamespace:
    cache = SimpleNamespace(queries=7, hits=2)
    return SimpleNamespace(**({"num_running_reqs": 1, "kv_cache_usage": 0.25, "prefix_cache_stats": cache} | given))


def iteration() -> SimpleNamespace:
    computed = SimpleNamespace(computed=5)
    return SimpleNamespace(
        num_generation_tokens=4, time_to_first_tokens_iter=[0.1], prompt_token_stats=computed, num_preempted_reqs=3
    )


async def test_gauges_are_vllms(start: Start) -> None:
    llm = FakeLlm(delay_s=0.005)
    made = await start(llm)
    async with aclosing(made.generate(request(n=3, max_tokens=50))) as outputs:
        await anext(outputs)
        made._recorder.record(scheduler(num_running_reqs=2), None)
        stats = made.stats()
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        assert (stats.num_kv_blocks, stats.num_kv_blocks_used) == (100, 25)
        made._recorder.record(scheduler(num_running_reqs=1, kv_cache_usage=0.75), None, engine_idx=1)
        assert (made.stats().num_running, made.stats().num_kv_blocks_used) == (3, 50)
    stats = made.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used) == (0, 0, 0)


async def test_steps_and_ends_add_up(start: Start, sink: Sink) -> None:
    made = await start(FakeLlm())
    await collect(made, n=2)
    made._recorder.record(scheduler(), iteration())
    made._recorder.record(None, None)
    assert sink.steps == []  # the step's readers come first
    await asyncio.sleep(0)
    first, second = sink.steps
    assert first.num_prompt_tokens == 3
    assert first.num_generated_tokens == 12
    assert (first.num_computed_tokens, first.num_preemptions) == (8, 3)
    assert (first.prefix_cache_queries, first.prefix_cache_hits) == (7, 2)
    assert first.queue_times_s == (0.5, 0.5)
    assert (len(first.times_to_first_token_s), len(first.inter_token_latencies_s)) == (2, 10)
    assert (second.num_prompt_tokens, second.num_generated_tokens, second.num_computed_tokens) == (0, 0, 0)
    assert [(end.reason, end.num_prompt_tokens, end.num_generated_tokens) for end in sink.ends] == [
        ("length", 3, 6),
        ("length", 0, 6),
    ]


def test_a_missing_package_is_a_setting_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^engine: vLLM is not installed: `pip install vllm`") as caught:
        VllmEngine(CONFIG)
    assert caught.value.field == "engine"

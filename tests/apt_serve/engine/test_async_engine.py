"""The engine's thread beside the event loop: streams, aborts, overload, faults, shutdown."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from apt_core.errors import ConfigError, InvalidRequestError
from apt_serve.engine import async_engine
from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.client import (
    EngineOverloadedError,
    EngineStoppedError,
    GenerationFailedError,
    GenerationRequest,
)
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.sampling_params import SamplingParams
from tests.apt_serve.engine.test_engine import PROMPT, Faulty
from tests.apt_serve.engine.tiny_engine import naive_greedy, tiny_engine


class Slow(Faulty):
    """An executor whose steps take a while, so that a test can act between them."""

    def launch(self, step):
        time.sleep(0.005)
        return super().launch(step)


@pytest.fixture
async def start(monkeypatch):
    """Starts an AsyncEngine over the tiny model."""
    started = []

    async def start(executor=Slow, **settings):
        inner = tiny_engine(executor=executor, **settings)
        monkeypatch.setattr(async_engine, "Engine", lambda config, metrics: inner)
        known = {k: v for k, v in settings.items() if k in EngineConfig.__dataclass_fields__ and k != "num_kv_blocks"}
        config = EngineConfig(**({"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32} | known))
        engine = AsyncEngine(config)
        await engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        await engine.stop()


def request(prompt=PROMPT, **sampling):
    sampling = {"temperature": 0, "ignore_eos": True} | sampling
    return GenerationRequest("r", tuple(prompt), SamplingParams(**sampling))


async def collect(engine, *args, **sampling):
    """{choice: tokens} of a whole generation."""
    tokens = {}
    async for output in engine.generate(request(*args, **sampling)):
        tokens.setdefault(output.index, []).extend(output.token_ids)
    return tokens


async def idle(engine):
    """Wait until the engine holds nothing."""
    async with asyncio.timeout(60):
        while True:
            stats = engine.stats()
            if stats.num_running == stats.num_waiting == stats.num_kv_blocks_used == 0:
                return
            await asyncio.sleep(0.002)


async def test_concurrent_streams_get_what_each_would_get_alone(start):
    engine = await start()
    prompts = [PROMPT[i : i + 8] for i in range(20)]
    streams = await asyncio.gather(*(collect(engine, prompt, max_tokens=10) for prompt in prompts))
    for prompt, tokens in zip(prompts, streams, strict=True):
        assert tokens == {0: naive_greedy(prompt, 10, stops_at_eos=False)}
    await idle(engine)


async def test_all_choices_come_through_one_stream(start):
    engine = await start()
    tokens = await collect(engine, n=3, temperature=1.0, seed=1, max_tokens=6)
    assert sorted(tokens) == [0, 1, 2] and all(len(t) == 6 for t in tokens.values())


@pytest.mark.parametrize("num_outputs", [0, 1, 5])
async def test_closing_a_stream_frees_everything(start, num_outputs):
    steps = threading.Semaphore(0)

    class Held(Faulty):
        """An executor that computes as many steps as it is allowed to."""

        def launch(self, step):
            steps.acquire()
            return super().launch(step)

    engine = await start(executor=Held)
    stream = engine.generate(request(max_tokens=50, n=2, temperature=1.0))
    reading = asyncio.create_task(anext(stream))
    try:
        await asyncio.sleep(0)
        for _ in range(num_outputs):
            while not reading.done():
                steps.release()
                await asyncio.wait((reading,), timeout=0.02)
            reading = asyncio.create_task(anext(stream))
        engine_stats = engine.stats()
        assert engine_stats.num_running + engine_stats.num_waiting == 2
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.aclose()
        steps.release(2)  # one may be about to be computed; 50 tokens would take many more
        await idle(engine)
    finally:
        steps.release(1000)


async def test_three_hundred_aborts_at_random_moments_leak_nothing(start):
    engine = await start(executor=None)

    async def abandon(i):
        stream = engine.generate(request(PROMPT[i % 30 :], max_tokens=40))
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(i % 7 * 0.003)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.aclose()

    for first in range(0, 300, 20):
        await asyncio.gather(*(abandon(i) for i in range(first, first + 20)))
    await idle(engine)
    assert engine._mailboxes == {}
    assert len(engine._engine._outputs) == 0
    assert await collect(engine, max_tokens=3) == {0: naive_greedy(PROMPT, 3, stops_at_eos=False)}


async def test_a_reader_that_does_not_read_holds_one_merged_delta(start):
    engine = await start()
    stream = engine.generate(request(max_tokens=40))
    first = await anext(stream)
    async with asyncio.timeout(60):
        while engine.stats().num_running:
            await asyncio.sleep(0.005)
    rest = [output async for output in stream]
    assert len(rest) == 1
    assert [*first.token_ids, *rest[0].token_ids] == naive_greedy(PROMPT, 40, stops_at_eos=False)


async def test_a_full_queue_refuses_with_a_time_to_retry(start):
    engine = await start(max_num_seqs=2, max_waiting_requests=1)
    streams = [engine.generate(request(max_tokens=40)) for _ in range(3)]
    firsts = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloadedError) as refusal:
        await collect(engine, max_tokens=1)
    assert 1 <= refusal.value.retry_after_s <= 60
    await asyncio.gather(*firsts)
    for stream in streams:
        await stream.aclose()
    await idle(engine)
    assert len((await collect(engine, max_tokens=2))[0]) == 2


async def test_a_request_that_could_never_be_served_is_refused_before_it_is_queued(start):
    engine = await start()
    with pytest.raises(InvalidRequestError):
        await collect(engine, prompt=())
    assert engine.stats().num_waiting == 0


async def test_a_failed_step_is_an_error_to_its_requests_and_the_engine_goes_on(start):
    engine = await start()
    stream = engine.generate(request(max_tokens=50))
    await anext(stream)
    engine._engine._executor.is_broken = True
    with pytest.raises(GenerationFailedError):
        async for _ in stream:
            pass
    engine._engine._executor.is_broken = False
    assert len((await collect(engine, max_tokens=5))[0]) == 5
    assert engine.stats().is_alive


async def test_a_dead_engine_fails_everything_and_says_so(start, monkeypatch):
    engine = await start()
    streams = [engine.generate(request(max_tokens=50)) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    monkeypatch.setattr(engine._engine, "step", lambda: 1 / 0)
    for stream in streams:
        with pytest.raises(GenerationFailedError):
            async for _ in stream:
                pass
    engine._thread.join(20)
    assert not engine.stats().is_alive
    with pytest.raises(EngineStoppedError):
        await collect(engine, max_tokens=1)


async def test_stop_lets_running_requests_finish_within_the_grace_period(start):
    engine = await start()
    stream = engine.generate(request(max_tokens=20))
    first = await anext(stream)
    stopping = asyncio.create_task(engine.stop(grace_s=20))
    await asyncio.sleep(0)
    with pytest.raises(EngineStoppedError):
        await collect(engine, max_tokens=1)
    rest = [token async for output in stream for token in output.token_ids]
    await stopping
    assert len(first.token_ids) + len(rest) == 20


async def test_stop_ends_what_has_not_finished_by_then(start):
    engine = await start()
    stream = engine.generate(request(max_tokens=50))
    await anext(stream)
    await engine.stop(grace_s=0)
    reasons = [output.finish_reason async for output in stream]
    assert reasons[-1] == "abort"
    assert not engine.stats().is_alive


async def test_health_tells_when_no_step_completes(start):
    class Stuck(Faulty):
        def launch(self, step):
            time.sleep(0.5)
            return super().launch(step)

    engine = await start(executor=Stuck, stall_timeout_s=0.1)
    assert not engine.stats().is_stalled
    stream = engine.generate(request(max_tokens=1))
    first = asyncio.create_task(anext(stream))
    async with asyncio.timeout(60):
        while not engine.stats().is_stalled:
            await asyncio.sleep(0.01)
    await first
    await stream.aclose()
    await idle(engine)
    assert not engine.stats().is_stalled


async def test_a_model_that_cannot_be_loaded_is_an_error_at_start():
    engine = AsyncEngine(EngineConfig(max_model_len=10**6))
    with pytest.raises(ConfigError):
        await engine.start()
    with pytest.raises(EngineStoppedError):
        await collect(engine, max_tokens=1)


async def test_a_stopped_engine_that_nobody_holds_gives_its_memory_back():
    engine = AsyncEngine(EngineConfig(max_model_len=64, num_kv_blocks=8, max_num_seqs=1))
    await engine.start()
    await collect(engine, [1, 2, 3], max_tokens=2)
    await engine.stop()
    model = weakref.ref(engine._engine)
    del engine
    gc.collect()
    assert model() is None

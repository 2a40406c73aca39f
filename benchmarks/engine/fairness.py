"""`python -m benchmarks.engine.fairness`: what one tenant notices of another that floods the engine.

A light tenant sends one request after the other, a heavy one keeps many waiting. The bound printed is what sharing
allows: the light tenant's wait when it is alone, plus the wait until one sequence ends, plus two steps.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import quantiles
from typing import Literal

from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.metrics import FinishRecord, NullMetrics, StepRecord
from apt_serve.engine.sampling_params import SamplingParams
from benchmarks.machine import describe
from benchmarks.table import print_table

POLICIES: tuple[Literal["fcfs", "fair"], ...] = ("fcfs", "fair")
MAX_NUM_SEQS = 16
VOCAB_SIZE = 49152
PATIENCE_S = 120.0
"""A phase ends after so long and MIN_REQUESTS: under fcfs each of them waits for all that the heavy tenant has."""
MIN_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one tenant."""

    tenant: str
    num_at_a_time: int
    prompt_len: int
    output_len: int


@dataclass
class Observed:
    """What was seen in one phase."""

    ttft_s: list[float] = field(default_factory=list)
    """Of the light tenant's requests."""
    ended_at: list[float] = field(default_factory=list)
    """Of all sequences."""
    step_s: list[float] = field(default_factory=list)


class Recorder(NullMetrics):
    """Keeps how long steps took and when sequences ended."""

    def __init__(self) -> None:
        self.observed = Observed()

    def step(self, record: StepRecord) -> None:
        """See MetricsSink."""
        self.observed.step_s.append(record.duration_s)

    def finished(self, record: FinishRecord) -> None:
        """See MetricsSink."""
        self.observed.ended_at.append(time.perf_counter())


class Phase:
    """One engine under the traffic of one or both tenants."""

    def __init__(self, engine: AsyncEngine, recorder: Recorder, seed: int) -> None:
        self._engine = engine
        self._recorder = recorder
        self._random = random.Random(seed)
        self._number = 0

    async def run(self, light: Traffic, heavy: Traffic | None, num_requests: int) -> Observed:
        """The light tenant's requests, one after the other, each after a pause that falls anywhere in a step."""
        flood = [] if heavy is None else [asyncio.create_task(self._flood(heavy)) for _ in range(heavy.num_at_a_time)]
        while heavy is not None and self._engine.stats().num_running < MAX_NUM_SEQS:
            await asyncio.sleep(0.1)
        self._recorder.observed = observed = Observed()
        began = time.perf_counter()
        try:
            while len(observed.ttft_s) < num_requests:
                if time.perf_counter() - began > PATIENCE_S and len(observed.ttft_s) >= MIN_REQUESTS:
                    break
                await asyncio.sleep(self._random.uniform(0.0, 0.2))
                observed.ttft_s.append(await self._first_token(light))
        finally:
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
        return observed

    async def _flood(self, heavy: Traffic) -> None:
        while True:
            async with aclosing(self._engine.generate(self._request(heavy))) as outputs:
                async for _ in outputs:
                    pass

    async def _first_token(self, light: Traffic) -> float:
        """Seconds until it came; the rest of the answer is read, too."""
        began, first = time.perf_counter(), 0.0
        async with aclosing(self._engine.generate(self._request(light))) as outputs:
            async for _ in outputs:
                first = first or time.perf_counter() - began
        return first

    def _request(self, traffic: Traffic) -> GenerationRequest:
        self._number += 1
        # No two alike, and ends spread out as those of real answers are.
        prompt = tuple(self._random.randrange(1000, VOCAB_SIZE) for _ in range(traffic.prompt_len))
        length = self._random.randint(traffic.output_len // 2, traffic.output_len * 3 // 2)
        sampling = SamplingParams(max_tokens=length, ignore_eos=True)
        return GenerationRequest(f"{traffic.tenant}-{self._number}", prompt, sampling, tenant=traffic.tenant)


async def measure(
    policy: Literal["fcfs", "fair"], light: Traffic, heavy: Traffic, num_requests: int, source: str
) -> tuple[Observed, Observed]:
    """The light tenant alone, and beside the heavy one."""
    recorder = Recorder()
    config = EngineConfig(source=source, policy=policy, max_num_seqs=MAX_NUM_SEQS, enable_prefix_caching=False)
    engine = AsyncEngine(config, recorder)
    await engine.start()
    try:
        phase = Phase(engine, recorder, seed=0)
        await phase.run(light, None, 3)
        return await phase.run(light, None, num_requests), await phase.run(light, heavy, num_requests)
    finally:
        await engine.stop()


def p95(values: Sequence[float]) -> float:
    """Of at least two values."""
    return quantiles(values, n=20, method="inclusive")[-1]


def main() -> None:
    """Print the light tenant's time to first token under each policy, and the bound."""
    parser = argparse.ArgumentParser(prog="benchmarks.engine.fairness", description=__doc__)
    parser.add_argument("--source", default=EMBEDDED_MODEL)
    parser.add_argument("--requests", type=int, default=40, help="most of the light tenant in each phase")
    parser.add_argument("--waiting", type=int, default=200, help="requests the heavy tenant keeps in the engine")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args()
    light = Traffic("light", 1, args.prompt_len, 8)
    heavy = Traffic("heavy", args.waiting, args.prompt_len, args.output_len)
    print(describe())
    print(
        f"{args.source}, {MAX_NUM_SEQS} sequences a step; heavy: {args.waiting} requests of {args.prompt_len} + about "
        f"{args.output_len} tokens; light: one of {args.prompt_len} + about 8 at a time, "
        f"up to {args.requests} or for {PATIENCE_S:.0f} s"
    )
    rows = []
    for policy in POLICIES:
        alone, beside = asyncio.run(measure(policy, light, heavy, args.requests, args.source))
        slot = p95([later - earlier for earlier, later in pairwise(beside.ended_at)])
        bound = p95(alone.ttft_s) + slot + 2 * p95(beside.step_s)
        cells = [p95(alone.ttft_s), p95(beside.ttft_s), slot, p95(beside.step_s), bound]
        ratio = p95(beside.ttft_s) / bound
        rows.append([policy, str(len(beside.ttft_s)), *(f"{1000 * each:.0f}" for each in cells), f"{ratio:.2f}"])
    heads = ["p95, ms", "requests", "TTFT alone", "TTFT beside", "one place", "a step", "bound", "of bound"]
    print_table(heads, rows)


if __name__ == "__main__":
    main()

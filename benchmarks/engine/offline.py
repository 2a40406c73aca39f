"""Throughput and latency of the offline engine, beside what the machine allows."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.engine import Engine
from apt_serve.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """So many equal requests that all arrive at once."""

    num_streams: int
    prompt_len: int
    output_len: int


@dataclass(slots=True)
class Timings:
    """When each stream's tokens came, in seconds since all requests arrived."""

    streams: list[list[float]] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Median time to first token."""
        return median(times[0] for times in self.streams)

    @property
    def gaps_s(self) -> list[float]:
        """All times between two tokens of a stream."""
        return [b - a for times in self.streams for a, b in itertools.pairwise(times)]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time, prompts included."""
        return sum(map(len, self.streams)) / max(times[-1] for times in self.streams)

    @property
    def decode_tokens_per_s(self) -> float:
        """Output tokens after the last stream's first one, over the time they took."""
        start = max(times[0] for times in self.streams)
        end = max(times[-1] for times in self.streams)
        return sum(t > start for times in self.streams for t in times) / (end - start)


LATENCY_HEADS = ("TTFT ms", "ITL p50/p99 ms")


def latency_cells(rounds: Sequence[Timings]) -> tuple[str, str]:
    """Cells under LATENCY_HEADS: medians and percentiles over all rounds."""
    ttft = median(timings.ttft_s for timings in rounds)
    return f"{ttft * 1e3:.0f}", percentiles_ms([gap for timings in rounds for gap in timings.gaps_s])


def percentiles_ms(seconds: list[float]) -> str:
    """p50/p99 in milliseconds; - where nothing was measured."""
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return f"{percentile(ordered, 0.5) * 1e3:.1f}/{percentile(ordered, 0.99) * 1e3:.1f}"


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the sorted values lies."""
    return values[min(int(share * len(values)), len(values) - 1)]


def random_prompts(workload: Workload, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens: none finds another's prefix in the cache."""
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(100, vocab_size) for _ in range(workload.prompt_len)) for _ in range(workload.num_streams)
    ]


def run_offline(engine: Engine, workload: Workload, seed: int) -> Timings:
    """Run a workload through the engine in this thread, greedy, to its full length."""
    sampling = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    streams: dict[str, list[float]] = {}
    for prompt in random_prompts(workload, engine.model.vocab_size, seed):
        (sequence,) = engine.sequences_of(GenerationRequest("bench", prompt, sampling))
        streams[sequence.seq_id] = []
        engine.add(sequence)
    started = time.perf_counter()
    while engine.has_work:
        deltas = engine.step()
        now = time.perf_counter() - started
        for delta in deltas:
            streams[delta.seq_id] += [now] * len(delta.output.token_ids)
    return Timings(list(streams.values()))


def prefill_tokens_per_s(engine: Engine, num_tokens: int, seed: int) -> float:
    """Prompt tokens per second of one long prompt batch, output of one token each."""
    workload = Workload(num_streams=max(num_tokens // 128, 1), prompt_len=128, output_len=1)
    timings = run_offline(engine, workload, seed)
    return workload.num_streams * workload.prompt_len / max(times[-1] for times in timings.streams)

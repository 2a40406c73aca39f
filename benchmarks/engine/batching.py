"""APT's engine beside transformers' continuous batching, on the same random weights, in one process.

No checkpoint is needed: weights are made on the device from a shape. Both get prompts of random tokens, all at once,
and continue them greedily to the same length. Each runs a workload once to warm up and then some rounds; figures are
medians. `x batching` is a row's tokens/s over those of transformers' continuous batching, `of limit` the decode's share
of what the memory and the products of the machine allow at most.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, get_args, get_type_hints

import torch

from apt_core.errors import AptError
from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import Engine
from apt_serve.engine.load import load
from apt_serve.engine.sampling_params import SamplingParams
from benchmarks.engine.offline import Timings, Workload, random_prompts, run_offline
from benchmarks.engine.transformers_peer import TransformersPeer
from benchmarks.limits import WEIGHT_BYTES, decode_limit
from benchmarks.machine import Limits, describe, device_of, measure_limits
from benchmarks.models import QWEN3_06B, SHAPES
from benchmarks.random_checkpoint import RandomCheckpoint, random_checkpoint
from benchmarks.table import aligned

TINY = QWEN3_06B | {
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
"""Of no known model: it shows that all of this runs."""
MODELS: dict[str, dict[str, Any]] = {"tiny": TINY, **SHAPES}
PRECISIONS = ("bfloat16", "int8", "int4", "float8")
HEADS = ("", "weights", "streams", "tok/s", "x batching", "decode tok/s", "of limit", "TTFT ms")
WIDTHS = (32, 9, -7, -9, -10, -12, -8, -8)
BLOCK_SIZE = 16
NUM_COMPARED = 8
"""Prompts whose first token both are asked for."""

Rounds = Callable[[Workload, list[int]], list[Timings]]
"""Rounds of a workload, one a seed."""


@dataclass(frozen=True)
class Plan:
    """What is measured of a model."""

    streams: tuple[int, ...]
    prompt_len: int
    output_len: int
    num_rounds: int
    precisions: tuple[str, ...]
    """Of APT's weights."""

    def workloads(self) -> list[Workload]:
        """One for each number of streams."""
        return [Workload(count, self.prompt_len, self.output_len) for count in self.streams]


class Comparison:
    """All contenders on one model."""

    def __init__(self, config: dict[str, Any], device: torch.device, limits: Limits, plan: Plan) -> None:
        self._config = config
        self._checkpoint: RandomCheckpoint = random_checkpoint(config, device)
        self._limits = limits
        self._plan = plan
        self._batching: dict[int, float] = {}
        """Tokens/s of transformers' continuous batching by streams."""
        self._first_tokens: list[int] = []
        """That transformers gives."""

    def lines(self) -> Iterator[str]:
        """Rows under HEADS as they come, and remarks."""
        yield from self._transformers()
        self._release()
        for precision in self._plan.precisions:
            yield from self._apt(precision)
            self._release()

    def _transformers(self) -> Iterator[str]:
        peer = TransformersPeer(self._config, self._checkpoint, torch.bfloat16)
        self._first_tokens = [peer.next_token(prompt) for prompt in self._prompts()]
        for name, rounds in (("batching", peer.continuous), ("generate", peer.plain)):
            label = f"transformers {name}, {peer.attention}"
            try:
                for workload in self._plan.workloads():
                    timings = self._measure(rounds, workload)
                    if name == "batching":
                        self._batching[workload.num_streams] = median(t.tokens_per_s for t in timings)
                    yield self._line(label, "bfloat16", workload, timings)
            except Exception as error:  # a peer that cannot run here leaves the others their rows
                yield f"missing   {label}: {type(error).__name__}: {error}"

    def _apt(self, precision: str) -> Iterator[str]:
        if precision not in get_args(get_type_hints(EngineConfig)["weight_precision"]):
            yield f"missing   APT in {precision}: no weight_precision"
            return
        try:
            engine = self._engine(precision)
        except AptError as error:
            yield f"missing   APT in {precision}: {error}"
            return
        if precision == "bfloat16":
            same = sum(a == b for a, b in zip(self._own_first_tokens(engine), self._first_tokens, strict=True))
            yield f"APT and transformers agree on the first token after {same} of {NUM_COMPARED} prompts"

        def rounds(workload: Workload, seeds: list[int]) -> list[Timings]:
            return [run_offline(engine, workload, seed) for seed in seeds]

        for workload in self._plan.workloads():
            yield self._line("APT", precision, workload, self._measure(rounds, workload))

    def _engine(self, precision: Any) -> Engine:
        length, most = self._plan.prompt_len + self._plan.output_len, max(*self._plan.streams, NUM_COMPARED)
        config = EngineConfig(
            source="random",
            device="cuda" if self._checkpoint.device.type == "cuda" else "cpu",
            dtype="bfloat16",
            weight_precision="auto" if precision == "bfloat16" else precision,
            max_model_len=length,
            max_num_seqs=most,
            max_num_batched_tokens=max(2048, most),
            num_kv_blocks=(most + 1) * -(-length // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            enable_prefix_caching=False,
        )
        return Engine(config, model=load(config, self._checkpoint))

    def _measure(self, rounds: Rounds, workload: Workload) -> list[Timings]:
        """All but the first round, which warms up."""
        return rounds(workload, [workload.num_streams * 1000 + i for i in range(self._plan.num_rounds + 1)])[1:]

    def _line(self, name: str, precision: str, workload: Workload, timings: list[Timings]) -> str:
        limit = decode_limit(
            self._checkpoint.config,
            self._limits,
            weight_bytes=WEIGHT_BYTES[precision],
            head_bytes=max(WEIGHT_BYTES[precision], WEIGHT_BYTES["int8"]),
            kv_bytes=2,
            num_streams=workload.num_streams,
            context=workload.prompt_len + workload.output_len // 2,
        )
        total, decode = (median(getattr(t, rate) for t in timings) for rate in ("tokens_per_s", "decode_tokens_per_s"))
        peer = self._batching.get(workload.num_streams)
        cells = (
            *(name, precision, str(workload.num_streams), f"{total:.1f}"),
            *("-" if peer is None else f"{total / peer:.2f}", f"{decode:.1f}", f"{decode / limit.tokens_per_s:.0%}"),
            f"{median(t.ttft_s for t in timings) * 1e3:.1f}",
        )
        return aligned(cells, WIDTHS)

    def _prompts(self) -> list[tuple[int, ...]]:
        workload = Workload(NUM_COMPARED, self._plan.prompt_len, 1)
        return random_prompts(workload, self._checkpoint.config.vocab_size, seed=0)

    def _own_first_tokens(self, engine: Engine) -> list[int]:
        found: dict[str, int] = {}
        for prompt in self._prompts():
            sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            (sequence,) = engine.sequences_of(GenerationRequest("bench", prompt, sampling))
            found[sequence.seq_id] = -1
            engine.add(sequence)
        while engine.has_work:
            for delta in engine.step():
                for token in delta.output.token_ids:
                    found[delta.seq_id] = token
        return list(found.values())

    def _release(self) -> None:
        """The memory of whoever ran last."""
        gc.collect()
        if self._checkpoint.device.type == "cuda":
            torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> None:
    """Print the rows of every model there is time for."""
    started = time.perf_counter()
    device = device_of(args.device)
    print(describe(device))
    limits = measure_limits(torch.bfloat16, device)
    print(f"limits    memory {limits.read_gb_s:.1f} GB/s, products bfloat16 {limits.gemm_gflop_s / 1e3:.3g} TFLOP/s")
    print(f"shapes    prompt {args.prompt_len}, output {args.output_len}, {args.rounds} rounds, medians")
    for name in args.models or ([*SHAPES] if device.type == "cuda" else ["tiny"]):
        if args.seconds and time.perf_counter() - started > args.seconds:
            print(f"\n{name} left out after {args.seconds:.0f} s")
            continue
        precisions = args.precisions or (PRECISIONS if name == "qwen3-8b" else PRECISIONS[:1])
        plan = Plan(tuple(args.streams), args.prompt_len, args.output_len, args.rounds, tuple(precisions))
        print(f"\n{name}\n{aligned(HEADS, WIDTHS)}", flush=True)
        for line in Comparison(MODELS[name], device, limits, plan).lines():
            print(line, flush=True)

"""`python -m benchmarks.engine`: decode, prefill, TTFT and inter-token latency of the offline engine."""

from __future__ import annotations

import argparse
from statistics import median

import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.model_config import ModelConfig
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.engine import Engine
from benchmarks.engine.offline import (
    LATENCY_HEADS,
    Timings,
    Workload,
    latency_cells,
    prefill_tokens_per_s,
    run_offline,
)
from benchmarks.limits import decode_limit, prefill_limit
from benchmarks.machine import Limits, describe, measure_limits
from benchmarks.table import print_table


def main() -> None:
    """Run every workload in interleaved rounds and print the medians."""
    args = _parse()
    config = EngineConfig(
        source=args.source,
        dtype=args.dtype,
        num_threads=args.threads,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    engine = Engine(config)
    model, dtype = open_checkpoint(args.source).config, getattr(torch, args.dtype)
    limits = measure_limits(dtype)
    print(describe())
    print(f"model     {engine.model.name}, {args.dtype}, {torch.get_num_threads()} threads")
    print(f"shapes    prompt {args.prompt_len}, output {args.output_len}, {args.rounds} rounds, medians")
    print(f"limits    reads {limits.read_gb_s:.1f} GB/s, multiplies {limits.gemm_gflop_s:.0f} GFLOP/s")

    workloads = [Workload(n, args.prompt_len, args.output_len) for n in args.streams]
    run_offline(engine, Workload(1, args.prompt_len, 4), seed=0)
    rounds: list[list[Timings]] = [[] for _ in workloads]
    prefill: list[float] = []
    for number in range(args.rounds):
        prefill.append(prefill_tokens_per_s(engine, 1024, seed=1000 + number))
        for i, workload in enumerate(workloads):
            rounds[i].append(run_offline(engine, workload, seed=number * 100 + i))
    _print_table(workloads, rounds, model, dtype, limits)
    share = median(prefill) / prefill_limit(model, limits)
    print(f"prefill   {median(prefill):.0f} tok/s, {share:.0%} of the matrix rate")


def _print_table(
    workloads: list[Workload], rounds: list[list[Timings]], model: ModelConfig, dtype: torch.dtype, limits: Limits
) -> None:
    rows = []
    first = median(t.decode_tokens_per_s for t in rounds[0])
    for workload, timings in zip(workloads, rounds, strict=True):
        decode = median(t.decode_tokens_per_s for t in timings)
        context = workload.prompt_len + workload.output_len // 2
        size = dtype.itemsize
        limit = decode_limit(
            model, limits, weight_bytes=size, kv_bytes=size, num_streams=workload.num_streams, context=context
        )
        rows.append(
            (
                f"{workload.num_streams}",
                f"{decode:.1f}",
                f"{decode / limit:.0%}",
                f"{decode / first:.1f}x",
                f"{median(t.tokens_per_s for t in timings):.1f}",
                *latency_cells(timings),
            )
        )
    print()
    print_table(("streams", "decode tok/s", "of limit", "to first row", "total tok/s", *LATENCY_HEADS), rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--source", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=EngineConfig.max_num_batched_tokens)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`python -m benchmarks.engine`: decode, prefill, TTFT and inter-token latency of the offline engine.

Beside each rate stands its share of what the machine allows: see benchmarks/limits.py. A source may also be a shape
without a checkpoint, such as random:qwen3-0.6b: see benchmarks/models.py. With --device it is measured beside
transformers' continuous batching instead: see benchmarks/engine/batching.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median

import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.model_config import ModelConfig
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.engine import Engine
from benchmarks.engine import batching
from benchmarks.engine.offline import (
    LATENCY_HEADS,
    Timings,
    Workload,
    latency_cells,
    prefill_tokens_per_s,
    run_offline,
)
from benchmarks.engine.step_profile import profile_steps
from benchmarks.limits import MULTIPLIED_IN, WEIGHT_BYTES, DecodeLimit, decode_limit, prefill_limit
from benchmarks.machine import Limits, best_limits, describe, measure_limits
from benchmarks.models import resolve
from benchmarks.table import print_table


@dataclass(frozen=True)
class Shape:
    """What decides how fast a model can be."""

    model: ModelConfig
    precision: str
    """Of the layers' weights, a key of WEIGHT_BYTES."""
    kv_bytes: int

    def decode_limit(self, limits: Limits, workload: Workload) -> DecodeLimit:
        """What the machine allows at the workload's mean context."""
        return decode_limit(
            self.model,
            limits,
            weight_bytes=WEIGHT_BYTES[self.precision],
            # With layers in int4 the output head is in int8.
            head_bytes=max(WEIGHT_BYTES[self.precision], WEIGHT_BYTES["int8"]),
            kv_bytes=self.kv_bytes,
            num_streams=workload.num_streams,
            context=workload.prompt_len + workload.output_len // 2,
        )


def main() -> None:
    """Measure the engine on a checkpoint, or with --device beside transformers on models that are a shape only."""
    args = _parse()
    if args.device is not None:
        batching.run(args)
    else:
        _measure_alone(args)


def _measure_alone(args: argparse.Namespace) -> None:
    """Run every workload in interleaved rounds and print the medians."""
    precision = args.weight_precision or args.dtype
    config = EngineConfig(
        source=resolve(args.source),
        dtype=args.dtype,
        weight_precision=precision,
        num_threads=args.threads,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    engine = Engine(config)
    shape = Shape(open_checkpoint(config.source).config, precision, getattr(torch, args.dtype).itemsize)
    print(describe())
    print(f"model     {engine.model.name}, {args.dtype}, weights {precision}, {torch.get_num_threads()} threads")
    print(f"shapes    prompt {args.prompt_len}, output {args.output_len}, {args.rounds} rounds, medians")

    workloads = [Workload(n, args.prompt_len, args.output_len) for n in args.streams]
    run_offline(engine, Workload(1, args.prompt_len, 4), seed=0)
    rounds: list[list[Timings]] = [[] for _ in workloads]
    prefill: list[float] = []
    found: list[Limits] = []
    for number in range(args.rounds):
        found.append(measure_limits(MULTIPLIED_IN[precision]))
        prefill.append(prefill_tokens_per_s(engine, 1024, seed=1000 + number))
        for i, workload in enumerate(workloads):
            rounds[i].append(run_offline(engine, workload, seed=number * 100 + i))
    found.append(measure_limits(MULTIPLIED_IN[precision]))
    limits = best_limits(found)
    multiplied = str(MULTIPLIED_IN[precision]).removeprefix("torch.")
    print(f"limits    reads {limits.read_gb_s:.1f} GB/s, multiplies {limits.gemm_gflop_s:.0f} GFLOP/s in {multiplied}")
    _print_table(workloads, rounds, shape, limits)
    share = median(prefill) / prefill_limit(shape.model, limits)
    print(f"prefill   {median(prefill):.0f} tok/s, {share:.0%} of the matrix rate")
    for num_streams in sorted({min(args.streams), max(args.streams)}):
        workload = Workload(num_streams, args.prompt_len, args.output_len)
        print(profile_steps(engine, workload, seed=2000 + num_streams).describe(num_streams))


def _print_table(workloads: list[Workload], rounds: list[list[Timings]], shape: Shape, limits: Limits) -> None:
    rows = []
    first = median(t.decode_tokens_per_s for t in rounds[0])
    for workload, timings in zip(workloads, rounds, strict=True):
        decode = median(t.decode_tokens_per_s for t in timings)
        limit = shape.decode_limit(limits, workload)
        rows.append(
            (
                f"{workload.num_streams}",
                f"{decode:.1f}",
                f"{decode / limit.tokens_per_s:.0%} {limit.bound_by}",
                f"{decode / first:.1f}x",
                f"{median(t.tokens_per_s for t in timings):.1f}",
                *latency_cells(timings),
            )
        )
    print()
    print_table(("streams", "decode tok/s", "share of limit", "to first row", "total tok/s", *LATENCY_HEADS), rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--source", default=EMBEDDED_MODEL, help="a model, or a shape such as random:qwen3-0.6b")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--weight-precision", choices=[*WEIGHT_BYTES], help="default: as --dtype")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=EngineConfig.max_num_batched_tokens)
    parser.add_argument("--rounds", type=int, default=3)
    beside = parser.add_argument_group("beside transformers")
    beside.add_argument("--device", choices=["auto", "cpu", "cuda"], help="measure beside transformers there")
    beside.add_argument("--models", nargs="+", choices=list(batching.MODELS), help="default: all known on a GPU")
    beside.add_argument(
        "--precisions", nargs="+", choices=batching.PRECISIONS, help="of APT's weights; default: all for the largest"
    )
    beside.add_argument("--seconds", type=float, default=0, help="begin no model after so long; 0: no limit")
    return parser.parse_args()


if __name__ == "__main__":
    main()

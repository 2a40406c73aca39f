"""`python -m benchmarks.serve`: tokens/s and latencies over HTTP, beside the offline engine's.

`health` is how long GET /health takes while the streams run: whether the event loop still answers beside the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from statistics import median

import torch

from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.engine import Engine
from benchmarks.engine.offline import LATENCY_HEADS, Timings, Workload, latency_cells, percentiles_ms, run_offline
from benchmarks.machine import describe
from benchmarks.serve.client import HttpTimings, run_http
from benchmarks.serve.launch import RUNNERS, server
from benchmarks.table import print_table


def main() -> None:
    """Run every workload offline and through each runner, in turn, and print the medians."""
    args = _parse()
    config = EngineConfig(source=args.source, dtype=args.dtype, num_threads=args.threads)
    engine = Engine(config)
    vocab_size, model = engine.model.vocab_size, engine.model.name
    workloads = [Workload(n, args.prompt_len, args.output_len) for n in args.streams]
    flags = [args.source, f"--model.dtype={args.dtype}"]
    if args.threads:
        flags.append(f"--model.num_threads={args.threads}")
    found: dict[str, list[list[Timings]]] = {}
    seeds = itertools.count(1)

    def measure(name: str, url: str | None) -> None:
        results = found.setdefault(name, [[] for _ in workloads])
        for i, workload in enumerate(workloads):
            seed = next(seeds)  # never a prompt that a cache may know
            if url is None:
                timings = run_offline(engine, workload, seed)
            else:
                timings = asyncio.run(run_http(url, model, vocab_size, workload, seed))
            results[i].append(timings)

    warm_up = Workload(2, 16, 4)
    run_offline(engine, warm_up, seed=0)
    for runner in args.runners:
        # Without a server beside it: Ray's processes take a tenth of a core even when nobody asks for anything.
        for _ in range(args.rounds):
            measure("offline", None)
        with server(runner, flags) as url:
            asyncio.run(run_http(url, model, vocab_size, warm_up, seed=0))
            for _ in range(args.rounds):
                measure(runner, url)
    print(describe())
    print(f"model     {model}, {args.dtype}, {torch.get_num_threads()} threads")
    print(f"shapes    prompt {args.prompt_len}, output {args.output_len}, {args.rounds} rounds, medians")
    _print_table(workloads, found)


def _print_table(workloads: list[Workload], found: dict[str, list[list[Timings]]]) -> None:
    rows = []
    offline = [median(t.tokens_per_s for t in timings) for timings in found["offline"]]
    for name, by_workload in found.items():
        rates = [median(t.tokens_per_s for t in timings) for timings in by_workload]
        for i, timings in enumerate(by_workload):
            rows.append(
                (
                    name,
                    f"{workloads[i].num_streams}",
                    f"{rates[i]:.1f}",
                    f"{rates[i] / offline[i]:.0%}",
                    f"{rates[i] / rates[0]:.1f}x",
                    *latency_cells(timings),
                    percentiles_ms([s for t in timings if isinstance(t, HttpTimings) for s in t.health_s]),
                )
            )
    print()
    heads = ("", "streams", "tok/s", "of offline", "to first row", *LATENCY_HEADS, "health p50/p99 ms")
    print_table(heads, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--source", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runners", nargs="+", default=["uvicorn", "ray"], choices=[*RUNNERS])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

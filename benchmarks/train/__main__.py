"""`python -m benchmarks.train`: tokens/s of training, beside a plain loop over transformers' model.

Both take the same first weights, batches, precision and settings of the optimizer, in one process and in turns; figures
are medians. The loop is measured with packed documents and a mask between them, and with documents padded to the
longest; padding does not count. `x best loop` is a row's tokens/s over those of the better loop, `of products` the time
that the step's matrix products take alone, measured in the same run, over the step's time, `of peak` the rate of all
floating-point operations over that of a large square product.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from apt_kernels import ops
from apt_train.speed import flops_per_token
from benchmarks.machine import best_limits, describe, measure_limits
from benchmarks.table import print_table
from benchmarks.train.limits import products_seconds
from benchmarks.train.sides import Apt, Side, TransformersLoop
from benchmarks.train.workload import MODELS, Workload, first_weights, mean_context, model_config

APT = "APT"
HEADS = ("", "tokens/s", "x best loop", "of products", "of peak", "first loss", "last loss")
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}
"""Largest relative difference between the sides' losses in any step."""


def main() -> None:
    """Measure one model in each precision."""
    args = _parse()
    ops.set_num_threads(args.threads)
    print(describe())
    config = model_config(args.model, args.layers)
    workload = Workload(args.tokens, args.micro_batches, args.median_length)
    print(f"model     {args.model}, {config.num_layers} layers, {torch.get_num_threads()} threads")
    batch = f"{workload.num_micro_batches} x {workload.num_tokens} tokens a step"
    print(f"shapes    {batch}, documents of {workload.median_length} at the median, {args.rounds} rounds, medians")
    for precision in args.precisions:
        measure(args.model, workload, precision, args)


def measure(name: str, workload: Workload, precision: str, args: argparse.Namespace) -> None:
    """Print a table for one precision.

    Raises:
        SystemExit: the sides' losses are not the same.
    """
    config, dtype = model_config(name, args.layers), getattr(torch, precision)
    weights = first_weights(config)
    sides: dict[str, Side] = {
        APT: Apt(config, weights, precision, compiles=args.compile),
        "loop, packed": TransformersLoop(config, weights, precision, is_packed=True, compiles=args.compile),
        "loop, padded": TransformersLoop(config, weights, precision, is_packed=False, compiles=args.compile),
    }
    steps = workload.steps(config.vocab_size)
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    losses: dict[str, list[float]] = {who: [] for who in sides}
    limits, products, contexts = [], [], []
    for number in range(args.warmup + args.rounds):
        batches = next(steps)
        for who in sorted(sides, key=lambda each: (list(sides).index(each) + number) % len(sides)):
            started = time.perf_counter()
            losses[who].append(sides[who].step(batches))
            if number >= args.warmup:
                seconds[who].append(time.perf_counter() - started)
        if number >= args.warmup:
            contexts.append(mean_context(batches))
            limits.append(measure_limits(dtype))
            products.append(products_seconds(config, workload.num_tokens, dtype, rounds=1))
    _check(losses, LOSS_TOLERANCE[precision])
    step = {who: median(each) for who, each in seconds.items()}
    best = min(taken for who, taken in step.items() if who != APT)
    peak = best_limits(limits).gemm_gflop_s * 1e9
    alone = min(products) * workload.num_micro_batches
    flops = flops_per_token(config, median(contexts)) * workload.step_tokens
    print(f"\n{precision}: multiplies {peak / 1e9:.0f} GFLOP/s; the step's products take {alone:.2f} s")
    rows = [
        (
            who,
            f"{workload.step_tokens / taken:.1f}",
            f"{best / taken:.2f}x",
            f"{alone / taken:.0%}",
            f"{flops / taken / peak:.0%}",
            f"{losses[who][0]:.5f}",
            f"{losses[who][-1]:.5f}",
        )
        for who, taken in step.items()
    ]
    print_table(HEADS, rows)


def _check(losses: dict[str, list[float]], tolerance: float) -> None:
    for who, found in losses.items():
        for step, (loss, expected) in enumerate(zip(found, losses[APT], strict=True)):
            if not abs(loss - expected) <= tolerance * expected:
                raise SystemExit(f"step {step}: {who} has a loss of {loss}, {APT} of {expected}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--precisions", nargs="+", default=list(LOSS_TOLERANCE), choices=list(LOSS_TOLERANCE))
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--median-length", type=int, default=Workload.median_length)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the layers of all sides, by torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()

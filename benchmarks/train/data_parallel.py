"""`python -m benchmarks.train.data_parallel`: two processes with a thread each (DDP) against one with two threads.

Both make steps of the same two micro-batches from the same first weights. On the cores of one machine DDP can win only
what ops lose that do not use two threads well, and pays for gradients that travel; the ratio says how that comes out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from apt_core.models.decoder import DecoderForCausalLM
from apt_kernels import ops
from apt_train.config import ParallelSettings
from apt_train.loop import Trainer
from apt_train.loss import ModelWithLoss
from apt_train.optimizer import build_optimizers
from apt_train.parallel.dims import ParallelDims, data_group
from apt_train.parallel.parallelize import parallelize
from benchmarks.machine import CPU, describe
from benchmarks.table import print_table
from benchmarks.train.sides import OPTIMIZER
from benchmarks.train.workload import MODELS, Workload, first_weights, model_config

NUM_MICRO_BATCHES = 2
Timed = tuple[list[float], float]
"""Seconds of each measured step, and the last one's loss."""


def main() -> None:
    """Measure both and print them."""
    args = _parse()
    print(describe())
    batch = f"{NUM_MICRO_BATCHES} x {args.tokens} tokens a step"
    print(f"model     {args.model}, {model_config(args.model, args.layers).num_layers} layers, {args.precision}")
    print(f"shapes    {batch}, {args.rounds} rounds, medians\n")
    sides = {"1 process, 2 threads": _measure(args, 1), "2 processes, DDP": _measure(args, 2)}
    (_, expected), *_ = sides.values()
    rows, alone = [], median(sides["1 process, 2 threads"][0])
    for who, (seconds, loss) in sides.items():
        if not abs(loss - expected) <= 2e-3 * expected:
            raise SystemExit(f"{who} has a loss of {loss}, not {expected}")
        taken = median(seconds)
        rows.append((who, f"{NUM_MICRO_BATCHES * args.tokens / taken:.1f}", f"{alone / taken:.2f}x", f"{loss:.5f}"))
    print_table(("", "tokens/s", "x 1 process", "last loss"), rows)


def _measure(args: argparse.Namespace, num_processes: int) -> Timed:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (num_processes, args, folder), nprocs=num_processes)
        found: Timed = torch.load(Path(folder) / "found")
        return found


def _run(rank: int, num_processes: int, args: argparse.Namespace, folder: str) -> None:
    ops.set_num_threads(NUM_MICRO_BATCHES // num_processes)
    if num_processes > 1:
        os.environ["WORLD_SIZE"] = str(num_processes)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes)
    trainer, steps = _trainer(args, num_processes), Workload(args.tokens, NUM_MICRO_BATCHES).steps(_vocab_size(args))
    seconds, loss = [], 0.0
    for number in range(args.warmup + args.rounds):
        batches = next(steps)[rank::num_processes]
        started = time.perf_counter()
        loss = trainer.step(number, batches).loss
        if number >= args.warmup:
            seconds.append(time.perf_counter() - started)
    if rank == 0:
        torch.save((seconds, loss), Path(folder) / "found")
    if num_processes > 1:
        dist.destroy_process_group()


def _trainer(args: argparse.Namespace, num_processes: int) -> Trainer:
    config = model_config(args.model, args.layers)
    settings = ParallelSettings(replicated=num_processes)
    dims = ParallelDims.of(settings, num_processes)
    mesh = dims.mesh("cpu")
    plain = DecoderForCausalLM(config)
    plain.load_state_dict(first_weights(config))
    model = parallelize(ModelWithLoss(plain), dims, mesh, settings, compiles=False)
    options: dict[str, Any] = {"precision": args.precision, "max_grad_norm": OPTIMIZER.max_grad_norm}
    optimizers = build_optimizers(model, OPTIMIZER)
    return Trainer(
        model, optimizers, lambda step: OPTIMIZER.learning_rate, device=CPU, data_group=data_group(mesh), **options
    )


def _vocab_size(args: argparse.Namespace) -> int:
    return model_config(args.model, args.layers).vocab_size


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train.data_parallel", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()

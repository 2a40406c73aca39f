"""`python -m benchmarks.kernels.sampling`: choosing tokens beside reading the logits once and beside torch's sorts.

Logits are normal with a standard deviation of 3, of which top_p 0.9 keeps some thousands of tokens, and exist often
enough to come from memory at every call. Ours and the PyTorch twin take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median

import torch

from apt_kernels import ops, reference
from benchmarks.machine import describe, measure_limits
from benchmarks.table import print_table

ROWS = (1, 8, 32)
VOCAB_SIZES = (49152, 151936)
FILTERS: dict[str, dict[str, float]] = {
    "no filter": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.1": {"min_p": 0.1},
}
BEYOND_CACHES = 96 * 2**20
SECONDS_PER_CASE = 0.15

Choose = Callable[[torch.Tensor], object]


def cases(rows: int) -> dict[str, tuple[Choose, Choose]]:
    """(ours, the twin) by name."""
    token_ids = torch.zeros(rows, dtype=torch.int64)
    found: dict[str, tuple[Choose, Choose]] = {"greedy": (ops.argmax, reference.argmax)}
    for name, changes in FILTERS.items():
        values = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0} | changes
        parameters = {
            "temperature": torch.full((rows,), 0.8),
            "top_k": torch.full((rows,), int(values["top_k"])),
            "top_p": torch.full((rows,), values["top_p"]),
            "min_p": torch.full((rows,), values["min_p"]),
            "uniform": torch.rand(rows, dtype=torch.float64),
        }
        found[name] = partial(ops.sample, **parameters), partial(reference.sample, **parameters)
    found["logprobs 5"] = (
        partial(ops.top_logprobs, token_ids=token_ids, num_top=5),
        partial(reference.top_logprobs, token_ids=token_ids, num_top=5),
    )
    return found


def main() -> None:
    """One table a vocabulary."""
    args = _parse()
    if args.threads:
        ops.set_num_threads(args.threads)
    print(describe())
    read_gb_s = measure_limits(torch.bfloat16).read_gb_s
    print(f"limits    reads {read_gb_s:.1f} GB/s")
    for vocab_size in args.vocab_sizes:
        table = []
        for rows in args.rows:
            num_bytes = 4 * rows * vocab_size
            logits = [3 * torch.randn(rows, vocab_size) for _ in range(max(1, BEYOND_CACHES // num_bytes))]
            for name, (ours, twin) in cases(rows).items():
                seconds, twin_seconds = measure(ours, twin, logits)
                limit = num_bytes / (read_gb_s * 1e9) / seconds
                cells = f"{seconds * 1e6:.0f}", f"{limit:.0%}", f"{twin_seconds * 1e6:.0f}"
                table.append((str(rows), name, *cells, f"{twin_seconds / seconds:.1f}"))
        print(f"\n{vocab_size} tokens")
        print_table(("rows", "", "us", "of reads", "torch us", "x torch"), table)


def measure(ours: Choose, twin: Choose, logits: list[torch.Tensor]) -> tuple[float, float]:
    """Median seconds of a call of each; they take turns."""
    inputs = cycle(logits)
    times: list[float] = []
    twin_times: list[float] = []
    deadline = time.perf_counter() + SECONDS_PER_CASE
    while time.perf_counter() < deadline or len(times) < 12:
        times += [_seconds(ours, next(inputs)) for _ in range(4)]
        twin_times.append(_seconds(twin, next(inputs)))
    return median(times), median(twin_times)


def _seconds(choose: Choose, logits: torch.Tensor) -> float:
    started = time.perf_counter()
    choose(logits)
    return time.perf_counter() - started


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.sampling", description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0 takes all")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=VOCAB_SIZES)
    return parser.parse_args()


if __name__ == "__main__":
    main()

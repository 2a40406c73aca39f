"""`python -m benchmarks.kernels.linear`: packed products beside the machine's limits and torch's packed products.

Each weight exists often enough to come from memory at every call, as it does in a model. At 1 row a product should read
at the machine's bandwidth, at many rows multiply at its rate. Ours and the peer take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import torch

from apt_core.quantization import WeightPrecision, pack_weight, quantize_int8
from apt_kernels import ops
from apt_kernels.cpu import linear as cpu_linear
from benchmarks.machine import Limits, describe, measure_limits
from benchmarks.table import print_table

SHAPES = {
    "SmolLM2 qkv": (960, 576),
    "SmolLM2 o": (576, 576),
    "SmolLM2 gate+up": (3072, 576),
    "SmolLM2 down": (576, 1536),
    "SmolLM2 head": (49152, 576),
    "Qwen3-0.6B qkv": (4096, 1024),
    "Qwen3-0.6B o": (1024, 2048),
    "Qwen3-0.6B gate+up": (6144, 1024),
    "Qwen3-0.6B down": (1024, 3072),
    "Qwen3-0.6B head": (151936, 1024),
}
ROWS = (1, 8, 32, 256)
PRECISIONS: tuple[WeightPrecision, ...] = ("bfloat16", "int8", "int4")
BITS = {"bfloat16": 16, "int8": 8, "int4": 5}
BEYOND_CACHES = 96 * 2**20
SECONDS_PER_CASE = 0.1


@dataclass(frozen=True)
class Case:
    """One product to measure."""

    shape: tuple[int, int]
    precision: WeightPrecision

    @property
    def weight_bytes(self) -> float:
        """What one call reads."""
        return self.shape[0] * self.shape[1] * BITS[self.precision] / 8

    def ours(self) -> list[cpu_linear.PackedWeight]:
        """Enough equal weights to exceed the caches."""
        weight = torch.randn(self.shape)
        return [pack_weight(weight, self.precision) for _ in range(self._num_copies())]

    def peers(self) -> list[Callable[[torch.Tensor], object]]:
        """torch's products: oneDNN's packed one in bfloat16, the bare integer product in int8; none in int4."""
        weight = torch.randn(self.shape)
        if self.precision == "bfloat16":
            pack = partial(torch.ops.mkldnn._reorder_linear_weight, weight.bfloat16(), cpu_linear.PACK_BATCH)
            return [partial(_onednn_linear, pack()) for _ in range(self._num_copies())]
        if self.precision == "int8":
            whole = quantize_int8(weight).values.T
            return [partial(_int8_product, whole.clone()) for _ in range(self._num_copies())]
        return []

    def _num_copies(self) -> int:
        return max(1, round(BEYOND_CACHES / self.weight_bytes))


def _onednn_linear(packed: torch.Tensor, x: torch.Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _int8_product(weight: torch.Tensor, x: torch.Tensor) -> object:
    """Without scales, and x is not quantized but merely converted: less than a linear layer needs."""
    return torch._int_mm(x.to(torch.int8), weight)


def main() -> None:
    """One table a number of rows."""
    args = _parse()
    if args.threads:
        ops.set_num_threads(args.threads)
    print(describe())
    bf16, int8 = measure_limits(torch.bfloat16), measure_limits(torch.int8)
    rates = f"bfloat16 {bf16.gemm_gflop_s:.0f}, int8 {int8.gemm_gflop_s:.0f} GOP/s"
    print(f"limits    reads {bf16.read_gb_s:.1f} GB/s; {rates}")
    results: dict[int, list[list[str]]] = {rows: [] for rows in args.rows}
    for name, shape in SHAPES.items():
        if args.only not in name:
            continue
        for precision in PRECISIONS:
            case = Case(shape, precision)
            ours, peers = case.ours(), case.peers()
            for rows in args.rows:
                seconds, peer_seconds = measure(ours, peers, torch.randn(rows, shape[1]).bfloat16())
                limits = bf16 if precision == "bfloat16" else int8
                results[rows].append([name, precision, *_cells(case, rows, seconds, peer_seconds, limits)])
    for rows, table in results.items():
        print(f"\n{rows} rows")
        print_table(["", "weights", "us", "GB/s", "of reads", "GOP/s", "of rate", "x torch"], table)


def measure(
    ours: list[cpu_linear.PackedWeight], peers: list[Callable[[torch.Tensor], object]], x: torch.Tensor
) -> tuple[float, float | None]:
    """Median seconds of a call of ours, and of the peer's; they take turns in blocks."""
    weights, products = cycle(ours), cycle(peers)
    times: list[float] = []
    peer_times: list[float] = []
    deadline = time.perf_counter() + SECONDS_PER_CASE * (2 if peers else 1)
    while time.perf_counter() < deadline or len(times) < 12:
        for _ in range(4):
            times.append(_seconds(partial(ops.packed_linear, x, next(weights))))
        for _ in range(4 if peers else 0):
            peer_times.append(_seconds(partial(next(products), x)))
    return median(times), median(peer_times) if peer_times else None


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _cells(case: Case, rows: int, seconds: float, peer_seconds: float | None, limits: Limits) -> list[str]:
    gb_s = case.weight_bytes / seconds / 1e9
    gop_s = 2 * rows * case.shape[0] * case.shape[1] / seconds / 1e9
    ratio = "-" if peer_seconds is None else f"{peer_seconds / seconds:.2f}"
    shares = f"{gb_s / limits.read_gb_s:.0%}", f"{gop_s / limits.gemm_gflop_s:.0%}"
    return [f"{seconds * 1e6:.0f}", f"{gb_s:.1f}", shares[0], f"{gop_s:.0f}", shares[1], ratio]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.linear", description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0 takes all")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`python -m benchmarks.kernels`: every op on every shape, its share of the machine's limit and its ratio to peers.

A row's rate is that of what bounds the op: bytes over the memory bandwidth, or operations over the matrix rate, both
measured in the same run. Rows are printed as they come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence

import torch

from apt_kernels import ops
from benchmarks.kernels.case import COMPILED, Case
from benchmarks.kernels.registry import GROUPS, cases
from benchmarks.kernels.report import HEADS, WIDTHS, Row
from benchmarks.kernels.sizes import sizes_for
from benchmarks.kernels.timing import Turn, make_turn, measure, num_inputs
from benchmarks.machine import Limits, describe, device_of, measure_limits
from benchmarks.table import aligned


def main() -> None:
    """Print a row for every case there is time for."""
    args = _parse()
    started = time.perf_counter()
    if args.threads:
        ops.set_num_threads(args.threads)
    device = device_of(args.device)
    has_compiler = device.type == "cuda" if args.compile is None else args.compile
    wanted = list(cases(sizes_for(device), device, args.groups, args.only))
    if args.list:
        print("\n".join(case.name for case in wanted))
        return
    print(describe(device))
    limits = _limits(wanted, device)
    print("\n" + aligned(HEADS, WIDTHS), flush=True)
    missing: dict[str, str] = {}
    for number, case in enumerate(wanted):
        if args.seconds and time.perf_counter() - started > args.seconds:
            print(f"{len(wanted) - number} rows left out after {args.seconds} s, from {case.name} on")
            break
        try:
            row = run(case, device, _peers(case, has_compiler))
        except Exception as error:  # one op that cannot run leaves the others their rows
            print(f"{case.name}: {_reason(error)}", flush=True)
            continue
        print(row.line(limits[case.work.dtype]), flush=True)
        missing |= {f"{case.op}, {peer}": reason for peer, reason in row.missing.items()}
    for name, reason in missing.items():
        print(f"missing   {name}: {reason}")


def run(case: Case, device: torch.device, peers: Iterable[str]) -> Row:
    """Measure a case and those of its peers that can."""
    count = num_inputs(case.work.num_bytes, device)
    turns: dict[str, Turn] = {"": make_turn(case.ours, count, device)}
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            turns[peer] = make_turn(case.peers[peer], count, device)
        except Exception as error:  # whatever keeps a peer from running is its row's reason
            missing[peer] = _reason(error)
    seconds = measure(turns)
    return Row(case, seconds.pop(""), seconds, missing)


def _peers(case: Case, has_compiler: bool) -> list[str]:
    return [peer for peer in case.peers if has_compiler or peer not in COMPILED]


def _limits(wanted: Sequence[Case], device: torch.device) -> dict[torch.dtype, Limits]:
    """What the machine does in each dtype that the cases multiply in, which is printed as well."""
    found = {dtype: measure_limits(dtype, device) for dtype in dict.fromkeys(case.work.dtype for case in wanted)}
    memory = max((limits.read_gb_s for limits in found.values()), default=0.0)
    rates = [f"{str(x).removeprefix('torch.')} {limits.gemm_gflop_s / 1e3:.3g}" for x, limits in found.items()]
    print(f"limits    memory {memory:.1f} GB/s, products {', '.join(rates)} TFLOP/s")
    return {dtype: Limits(memory, limits.gemm_gflop_s) for dtype, limits in found.items()}


def _reason(error: Exception) -> str:
    """Its kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--only", default="", help="cases whose op or shape contains this")
    parser.add_argument("--seconds", type=float, default=0, help="begin no case after so long; 0: no limit")
    parser.add_argument("--threads", type=int, default=0, help="on a processor; 0 takes all")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="peers that torch.compile makes, FlexAttention among them; on a GPU by default",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()

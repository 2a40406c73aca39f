"""What a benchmark ran on, and what that machine can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates measured on this machine, now."""

    read_gb_s: float
    """Reading memory once, all threads, in GB/s."""
    gemm_gflop_s: float
    """A large matrix product in one element type, in GFLOP/s; for int8 its additions and multiplications."""


def describe() -> str:
    """Machine, versions and commit in a few lines."""
    num_cores = len(os.sched_getaffinity(0))
    return (
        f"machine   {_processor()}, {num_cores} cores, {_memory_gib():.0f} GiB, {platform.system()}\n"
        f"software  Python {platform.python_version()}, torch {torch.__version__}\n"
        f"commit    {_commit()}"
    )


def measure_limits(dtype: torch.dtype) -> Limits:
    """Take the machine's read bandwidth and matrix rate."""
    data = torch.ones(64 * 2**20, dtype=torch.float32)  # 256 MiB: far beyond any cache
    read = data.nbytes / best_of(data.sum, 5)
    size = 2048
    gemm = 2 * size**3 / best_of(_product(dtype, size), 5)
    return Limits(read_gb_s=read / 1e9, gemm_gflop_s=gemm / 1e9)


def best_limits(found: Sequence[Limits]) -> Limits:
    """The best of several measurements: something else on the machine can only have slowed one of them."""
    return Limits(max(limits.read_gb_s for limits in found), max(limits.gemm_gflop_s for limits in found))


def _product(dtype: torch.dtype, size: int) -> Callable[[], object]:
    """A product of two square matrices."""
    if dtype == torch.int8:
        whole = torch.randint(-128, 128, (2, size, size), dtype=dtype)
        return lambda: torch._int_mm(whole[0], whole[1])
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: left @ right


def best_of(function: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    function()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        ).stdout.strip()

    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + dirty

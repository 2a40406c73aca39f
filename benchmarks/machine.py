"""What a benchmark ran on, and what that machine can do at best."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
COMMIT = "APT_COMMIT"
"""Environment variable that names the commit where there is no git."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates measured on this machine, now."""

    read_gb_s: float
    """Reading memory once, all threads, in GB/s; on a GPU copying it, bytes read and written."""
    gemm_gflop_s: float
    """A large matrix product in one element type, in GFLOP/s; for int8 its additions and multiplications."""


def device_of(name: str) -> torch.device:
    """cpu, cuda, or auto: the GPU if there is one.

    Raises:
        SystemExit: cuda, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available")
    is_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def describe(device: torch.device = CPU) -> str:
    """Machine, versions and commit in a few lines."""
    num_cores = len(os.sched_getaffinity(0))
    lines = [f"machine   {_processor()}, {num_cores} cores, {_memory_gib():.0f} GiB, {platform.system()}"]
    software = f"software  Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        lines.append(f"gpu       {gpu.name}, {gpu.multi_processor_count} multiprocessors, {memory}")
        software += f", CUDA {torch.version.cuda}, Triton {version('triton')}"
    return "\n".join([*lines, software, f"commit    {_commit()}"])


def measure_limits(dtype: torch.dtype, device: torch.device = CPU) -> Limits:
    """Take the machine's memory bandwidth and matrix rate, in a dtype that it multiplies."""
    if device.type == "cuda":
        return _measure_gpu(dtype, device)
    data = torch.ones(64 * 2**20, dtype=torch.float32)  # 256 MiB: far beyond any cache
    read = data.nbytes / best_of(data.sum, 5)
    size = 2048
    gemm = 2 * size**3 / best_of(_product(dtype, size, device), 5)
    return Limits(read_gb_s=read / 1e9, gemm_gflop_s=gemm / 1e9)


def _measure_gpu(dtype: torch.dtype, device: torch.device) -> Limits:
    source = torch.randn(2**30, device=device)
    copy = 2 * source.nbytes / best_of(_awaited(partial(torch.empty_like(source).copy_, source)), 10)
    del source
    size = 8192
    gemm = 2 * size**3 / best_of(_awaited(_product(dtype, size, device)), 20)
    return Limits(read_gb_s=copy / 1e9, gemm_gflop_s=gemm / 1e9)


def _awaited(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> None:
        function()
        torch.cuda.synchronize()

    return call


def best_limits(found: Sequence[Limits]) -> Limits:
    """The best of several measurements: something else on the machine can only have slowed one of them."""
    return Limits(max(limits.read_gb_s for limits in found), max(limits.gemm_gflop_s for limits in found))


def _product(dtype: torch.dtype, size: int, device: torch.device) -> Callable[[], object]:
    """A product of two square matrices of random values: of zeros it may be faster."""
    if dtype == torch.int8:
        whole = torch.randint(-128, 128, (2, size, size), dtype=dtype, device=device)
        right = whole[1].T if device.type == "cuda" else whole[1]  # the layout that each is fast in
        return lambda: torch._int_mm(whole[0], right)
    left, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(left, other.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return lambda: left @ other


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

    if COMMIT in os.environ or shutil.which("git") is None:
        return os.environ.get(COMMIT, "unknown")
    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + dirty

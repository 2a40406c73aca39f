"""What a process and its children hold, over time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Sample:
    """At one moment."""

    at_s: float
    """On the clock of ``time.monotonic``."""
    memory_mib: float
    """Proportional set size: what processes share is counted once."""
    num_files: int
    """Open file descriptors."""


@contextmanager
def watched(pid: int, interval_s: float = 1.0) -> Iterator[list[Sample]]:
    """Samples of a process and all below it, from a thread, until the end of the block."""
    samples: list[Sample] = []
    is_over = threading.Event()

    def watch() -> None:
        root = psutil.Process(pid)
        while not is_over.wait(interval_s):
            samples.append(_sample(root))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def slope_per_minute(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Of the line of least squares through some values."""
    mean_t, mean_v = sum(times_s) / len(times_s), sum(values) / len(values)
    spread = sum((t - mean_t) ** 2 for t in times_s)
    return 60 * sum((t - mean_t) * (v - mean_v) for t, v in zip(times_s, values, strict=True)) / spread


def _sample(root: psutil.Process) -> Sample:
    memory = num_files = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            memory += process.memory_full_info().pss
            num_files += process.num_fds()
    return Sample(time.monotonic(), memory / 2**20, num_files)

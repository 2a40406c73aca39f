"""How many threads a step should have on the processor this process runs on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path("/")


def step_threads(wanted: int | None, num_processes: int = 1) -> int:
    """The threads that were asked for; None takes one per usable core, of which each process has its share.

    More than there are processors are allowed, with a warning.
    """
    if wanted is None:
        return max(usable_cores() // num_processes, 1)
    processors = len(os.sched_getaffinity(0))
    if wanted > processors:
        log.warning("num_threads: %d threads share %d processors, and each step waits for the last", wanted, processors)
    return wanted


def usable_cores() -> int:
    """Physical cores this process may run on, and no more than its cgroups' quota of processor time; at least 1.

    A second thread on one core adds nothing to a product that keeps its units busy. A quota's fraction is left out: a
    group that has used up its share is halted, and a step with it.
    """
    cores = physical_cores(os.sched_getaffinity(0))
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores(processors: Iterable[int], root: Path = ROOT) -> int:
    """Cores behind these logical processors; each counts as one where the kernel does not say.

    Args:
        processors: numbers of logical processors.
        root: of the file system that holds /sys.
    """
    return len({_siblings(number, root) for number in processors})


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time this process's cgroups allow (version 1 or 2); None without a limit.

    Args:
        root: of the file system that holds /proc and /sys.
    """
    return min(_quotas(root), default=None)


def _siblings(processor: int, root: Path) -> str:
    """What is the same for all processors of a core."""
    file = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return _read(file) or str(processor)


def _quotas(root: Path) -> Iterator[float]:
    """The limit of each group that this process is in, innermost first: the least one holds."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if is_v2 else "cpu")
        group = top / path.lstrip("/")
        # In a container the path may be that of its host, of which only the top is mounted: what is missing is skipped.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            quota = _quota_v2(folder) if is_v2 else _quota_v1(folder)
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return None if quota in ("", "max") else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return None if not quota or not period or int(quota) <= 0 else int(quota) / int(period)


def _read(file: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""

"""How many threads a step gets: cores, not hyperthreads, and no more than a container may use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from apt_serve.engine import cpus
from apt_serve.engine.cpus import cpu_quota, physical_cores, step_threads, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    return root


def siblings(processor: int, text: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list": text}


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    root = write(tmp_path, siblings(0, "0,2") | siblings(1, "1,3") | siblings(2, "0,2") | siblings(3, "1,3"))
    assert physical_cores({0, 1, 2, 3}, root) == 2


def test_only_processors_this_process_may_use_count(tmp_path: Path) -> None:
    root = write(tmp_path, siblings(0, "0,2") | siblings(1, "1,3") | siblings(2, "0,2") | siblings(3, "1,3"))
    assert physical_cores({0, 2}, root) == 1


def test_without_topology_each_processor_is_a_core(tmp_path: Path) -> None:
    assert physical_cores({0, 1, 5}, tmp_path) == 3


def test_quota_of_cgroup_2(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/pod/app", "sys/fs/cgroup/pod/app/cpu.max": "150000 100000"})
    assert cpu_quota(root) == 1.5


def test_the_tightest_quota_of_all_groups_above_holds(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/app",
        "sys/fs/cgroup/pod/app/cpu.max": "max 100000",
        "sys/fs/cgroup/pod/cpu.max": "200000 100000",
        "sys/fs/cgroup/cpu.max": "400000 100000",
    }
    assert cpu_quota(write(tmp_path, files)) == 2.0


def test_quota_of_cgroup_1_in_a_container_that_sees_its_hosts_path(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/1a\n3:cpuset:/docker/1a\n2:cpu,cpuacct:/docker/1a\n0::/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(write(tmp_path, files)) == 3.0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"},
        {
            "proc/self/cgroup": "1:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["no cgroups", "version 2 without a limit", "version 1 without a limit"],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert cpu_quota(write(tmp_path, files)) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (16.0, 8), (3.7, 3), (0.5, 1)])
def test_the_default_is_a_thread_per_core_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(cpus, "physical_cores", lambda processors: 8)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert usable_cores() == threads
    assert step_threads(None) == threads
    assert step_threads(None, num_processes=4) == max(threads // 4, 1)


def test_this_machine_has_between_one_core_and_its_processors() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_more_threads_than_processors_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    processors = len(os.sched_getaffinity(0))
    with caplog.at_level(logging.WARNING):
        assert step_threads(processors) == processors
        assert not caplog.records
        assert step_threads(processors + 1) == processors + 1
    assert f"num_threads: {processors + 1} threads share {processors} processors" in caplog.text

"""Agents join and are killed: the run goes on from its last checkpoint, with each micro-batch trained on once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from apt_train.config import read_config
from apt_train.train import train
from tests.apt_train.runs import ROOT, write_config

STEPS = 240
SETTINGS = {
    "run.precision": "float64",
    "checkpoint.temporary_every": "5",
    "metrics.tensorboard": "false",
    "watchdog.stall_after_s": "20",
}
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@contextmanager
def agent(log: Path, config: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """One machine of the job: a torchrun with one process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=2"]
    settings = [f"--{name}={value}" for name, value in (SETTINGS | {"parallel.replicated": "-1"}).items()]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*torchrun, *meeting, "-m", "apt_train", "run", config, *settings],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """An agent and its process at once, as when a machine loses power."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.send_signal(signal.SIGKILL)
    process.wait()


def steps_in(log: Path) -> list[int]:
    """In the order they were printed by the agent whose process is the first."""
    return [int(number) for number in re.findall(r"^(?:\[.*\]:)?step (\d+)/", log.read_text(), re.MULTILINE)]


def wait_for(condition: Callable[[], object], seconds: float, what: str, *logs: Path) -> float:
    """How long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, what + "".join(
            f"\n== {log}\n{log.read_text()[-6000:]}" for log in logs
        )
        time.sleep(0.02)
    return time.monotonic() - begin


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_an_agent_joins_and_is_killed_and_every_step_is_that_of_one_process(tmp_path: Path) -> None:
    for name in ("whole", "elastic"):
        (tmp_path / name).mkdir()
    train(read_config(write_config(tmp_path / "whole", STEPS), SETTINGS))
    config, first, second = write_config(tmp_path / "elastic", STEPS), tmp_path / "first.log", tmp_path / "second.log"
    port = free_port()

    def steps() -> list[int]:
        return steps_in(first) + (steps_in(second) if second.exists() else [])

    def goes_on(beyond: int) -> Callable[[], bool]:
        return lambda: any(step > beyond for step in steps())

    with ExitStack() as stack:
        staying = stack.enter_context(agent(first, config, port))
        wait_for(goes_on(10), 120, "the run does not begin", first)
        joining = stack.enter_context(agent(second, config, port))
        two = "2 processes, after step"
        joined_s = wait_for(
            lambda: two in first.read_text() + second.read_text(), 60, "it does not join", first, second
        )
        at = max(steps())
        joined_s += wait_for(goes_on(at + 5), 120, "the run does not go on with two", first, second)
        kill(joining)
        at = max(steps())
        lost_s = wait_for(goes_on(at + 5), 120, "the run does not go on with one", first)
        assert staying.wait(300) == 0, first.read_text()[-6000:]
    print(f"went on {joined_s:.1f} s after an agent had joined, {lost_s:.1f} s after it was killed")
    expected, found = (load_file(tmp_path / name / "run/model/model.safetensors") for name in ("whole", "elastic"))
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)

"""SIGKILL at any moment, within a save as well: a run that goes on ends with the bits of one that was never killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.apt_train.runs import ROOT, write_config

STEPS = 12
SETTINGS = {"checkpoint.every": "4", "checkpoint.temporary_every": "1", "checkpoint.keep": "2"}
FORKING = """
import os, sys
from apt_train.config import read_config
from apt_train.train import train
settings = dict(pair.split("=") for pair in sys.argv[1:])
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        train(read_config(line.strip(), settings))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
"""A process that has imported all and started nothing; each line of its input, a file of settings, starts a run in a
child of its own."""


class Starter:
    """Starts runs, one at a time."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", FORKING, *(f"{name}={value}" for name, value in SETTINGS.items())],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        assert self._read() == "ready"

    def start(self, config: str) -> int:
        """The process of the run."""
        assert self._process.stdin is not None
        self._process.stdin.write(config + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def status(self) -> int:
        """How the run ended; waits for it."""
        return int(self._read())

    def finish(self, config: str) -> str:
        """Run to the end; a digest of the weights."""
        self.start(config)
        assert self.status() == 0, self.log.read_text()
        return hashlib.sha256((Path(config).parent / "run/model/model.safetensors").read_bytes()).hexdigest()

    def close(self) -> None:
        """End it, and the run that it waits for, if one is left."""
        for child in psutil.Process(self._process.pid).children():
            child.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def wait_for(folder: Path, pattern: str) -> None:
    """Until the run has written such a file, or is over."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and not (folder / "model").exists():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def check_kills(folder: Path, num_kills: int, seed: int) -> None:
    """Each kill hits a run of its own after some step, half of them while a checkpoint is written."""
    chance = random.Random(seed)
    with closing(Starter(folder / "log")) as starter:
        expected = starter.finish(new_config(folder / "whole"))
        for index in range(num_kills):
            config, run = new_config(folder / str(index)), folder / str(index) / "run"
            pid = starter.start(config)
            wait_for(run, f"checkpoints/step-{chance.randrange(1, STEPS - 2):08}")
            if index % 2:
                wait_for(run, "checkpoints/.step-*")
            time.sleep(chance.uniform(0, 0.02 if index % 2 else 0.5))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            was_killed = os.WIFSIGNALED(starter.status())
            left = sorted(path.name for path in run.glob("checkpoints/*step*"))
            print(f"kill {index}: {'in time' if was_killed else 'too late'}, left {', '.join(left)}")
            assert starter.finish(config) == expected, f"kill {index} of seed {seed}"


def new_config(folder: Path) -> str:
    folder.mkdir()
    return write_config(folder, STEPS)


def test_runs_that_are_killed_end_with_the_same_bits(tmp_path):
    check_kills(tmp_path, 3, seed=1)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_runs_that_are_killed_twenty_times_end_with_the_same_bits(tmp_path):
    check_kills(tmp_path, 20, seed=2)

"""A run that is told to stop ends after its step, and the next one goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apt_train.config import read_config
from apt_train.train import train
from tests.apt_train.runs import ROOT, write_config

COMMAND = "import sys; from apt_train.cli import main; sys.exit(main())"


def losses_of(output: str) -> dict[int, str]:
    """What was printed of each step."""
    lines = [line.split() for line in output.splitlines() if line.startswith("step ")]
    return {int(words[1].partition("/")[0]): words[3] for words in lines}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(tmp_path: Path, number: signal.Signals) -> None:
    config = write_config(tmp_path, 1000)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-u", "-c", COMMAND, "run", config, "--checkpoint.export", "none"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "step 3/" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "log").read_text()
    assert status == 128 + number, output
    assert f"{number.name} asked it to stop" in output
    last = max(losses_of(output))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{last:08}"]
    summary = train(read_config(config, {"run.steps": str(last + 2), "checkpoint.export": "none"}))
    assert summary.steps == last + 2

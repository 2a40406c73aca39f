"""ZeRO-3 by DeepSpeed: the same training as in one process, and the same checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt_core.errors import ConfigError
from apt_train.config import read_config
from apt_train.train import train
from tests.apt_train.runs import ROOT, write_config

DEEPSPEED = {
    "parallel.zero_engine": "deepspeed",
    "parallel.offload": "all",
    "parallel.fully_sharded": "2",
    "monitor.enabled": "false",
}
SHAPE = {
    "model.hidden_size": "18",
    "model.num_heads": "3",
    "model.intermediate_size": "37",
    "schedule.kind": "constant",
}
"""Matrices of odd sizes, which two processes cannot share evenly; a schedule that does not depend on the last step."""


def by_one_process(folder: Path, steps: int) -> None:
    train(read_config(write_config(folder, steps), SHAPE))


def by_deepspeed(folder: Path, steps: int) -> None:
    flags = [f"--{name}={value}" for name, value in (SHAPE | DEEPSPEED).items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "apt_train", "run", write_config(folder, steps), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def test_a_run_goes_from_one_engine_to_the_other_and_back(tmp_path):
    """Steps of DeepSpeed are those of one process, and so are its checkpoints."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    by_one_process(whole, steps=6)
    by_one_process(parts, steps=2)
    by_deepspeed(parts, steps=4)
    by_one_process(parts, steps=6)
    expected = weights(whole)
    for name, weight in weights(parts).items():
        difference = (weight - expected[name]).abs().max()
        assert difference < 1e-6, f"{name}: {difference}"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"parallel.offload": "all"}, "parallel.offload"),
        ({"parallel.zero_engine": "deepspeed", "parallel.tensor": "2"}, "parallel.tensor"),
        ({"parallel.zero_engine": "deepspeed", "parallel.zero_stage": "2"}, "parallel.zero_stage"),
        ({"parallel.zero_engine": "deepspeed"}, "monitor.enabled"),
        (DEEPSPEED | {"optimizer.name": "muon"}, "optimizer.name"),
        (DEEPSPEED | {"run.precision": "float16"}, "run.precision"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(tmp_path, settings, field):
    with pytest.raises(ConfigError) as refusal:
        read_config(write_config(tmp_path, 1), settings)
    assert refusal.value.field == field

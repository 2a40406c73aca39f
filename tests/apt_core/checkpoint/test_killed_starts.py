"""Starts that are killed at random moments while they fill the caches: what they leave never hurts the next start."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from apt_kernels.cpu import native
from tests.apt_core.checkpoint.test_packed_cache import environment, start
from tests.apt_core.checkpoint.tiny import hf_model, write_gguf

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")]

FILL_AGAIN_AND_AGAIN = """
import os, sys
from pathlib import Path
os.environ["APT_CACHE"] = sys.argv[2]
from tests.apt_core.checkpoint.test_packed_cache import start
start(Path(sys.argv[1]))
print("filled", flush=True)
while True:
    for entry in Path(sys.argv[2]).glob("*/*.safetensors"):
        entry.unlink()
    start(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("seed", range(12))
def test_a_start_that_is_killed_leaves_whole_entries_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    source, cache = write_gguf(tmp_path / "model.gguf", hf_model("llama")), tmp_path / "cache"
    monkeypatch.setenv("APT_CACHE", str(cache))
    expected = start(source).logits()
    intact = {path: path.read_bytes() for path in cache.glob("*/*.safetensors")}
    assert {path.parent.name for path in intact} == {"gguf", "packed"}

    command = [sys.executable, "-c", FILL_AGAIN_AND_AGAIN, str(source), str(cache)]
    with subprocess.Popen(command, stdout=PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "filled\n"
            time.sleep(random.Random(seed).uniform(0, 0.5))
            assert process.poll() is None
        finally:
            process.kill()

    assert {path: path.read_bytes() for path in cache.glob("*/*.safetensors")}.items() <= intact.items()
    assert torch.equal(start(source).logits(), expected)
    assert start(source).is_hit

"""Every kind of launch compiles for a Hopper GPU, with the instructions that make it fast; none is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import apt_kernels

MAX_SHARED = 227 * 1024
"""Bytes a program may have on that GPU."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Kernels by launch."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(apt_kernels.__file__).parents[1]),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    script = Path(__file__).with_name("hopper.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return kernels


def test_every_kind_of_launch_compiles_and_fits(compiled):
    assert {len(kernels) for name, kernels in compiled.items() if name != "decode in segments"} == {1}
    assert set(compiled["decode in segments"]) == {"attend", "merge"}
    for name, kernels in compiled.items():
        for kernel in kernels.values():
            assert kernel["shared"] <= MAX_SHARED, name


def test_attention_copies_keys_ahead_and_multiplies_large_tiles_by_warp_groups(compiled):
    for name, kernels in compiled.items():
        if "attend" in kernels:
            assert kernels["attend"]["copies"], name
            assert kernels["attend"]["wgmma"] == (name not in ("decode", "decode in segments")), name


def test_rope_rounds_every_product(compiled):
    assert not compiled["rope"]["_rope_store"]["fma"]

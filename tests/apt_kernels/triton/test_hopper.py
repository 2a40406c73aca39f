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

pytestmark = pytest.mark.timeout(600)

MAX_SHARED = 227 * 1024
"""Bytes a program may have on that GPU."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Kernels by launch."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(apt_kernels.__file__).parents[1])]),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    script = Path(__file__).with_name("hopper.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return kernels


def test_every_kind_of_launch_compiles_and_fits(compiled):
    for name, kernels in compiled.items():
        assert kernels, name
        for kernel, facts in kernels.items():
            assert facts["shared"] <= MAX_SHARED, (name, kernel)


SMALL_STACK = {
    "sample_kernel": 128,  # a logarithm and a division of float64 are calls
    "attend": 128,  # the largest tiles of a prompt fill the registers
}


def test_kernels_stay_in_registers(compiled):
    for name, kernels in compiled.items():
        for kernel, facts in kernels.items():
            assert facts["stack"] <= SMALL_STACK.get(kernel, 0), (name, kernel, facts["stack"])


def test_attention_copies_keys_ahead_and_multiplies_large_tiles_by_warp_groups(compiled):
    for name, kernels in compiled.items():
        if "attend" in kernels:
            assert kernels["attend"]["copies"], name
            assert bool(kernels["attend"]["wgmma"]) == (name not in ("decode", "decode in segments")), name
    assert set(compiled["decode in segments"]) == {"attend", "merge"}
    assert all(kernel["wgmma"] for kernel in compiled["packed attention"].values())


def test_products_copy_weights_ahead_and_multiply_by_warp_groups(compiled):
    for name, kernels in compiled.items():
        if name.startswith("linear"):
            assert kernels["_linear_kernel"]["wgmma"] and kernels["_linear_kernel"]["copies"], name


def test_what_only_passes_over_memory_reads_16_bytes_at_a_time(compiled):
    for name in ("norms", "gate", "quantized int8", "quantized float8"):
        for kernel, facts in compiled[name].items():
            assert facts["wide_loads"] >= facts["loads"] - 1, (name, kernel, facts)


def test_rope_rounds_every_product(compiled):
    assert not compiled["rope"]["_rope_store"]["fma"]

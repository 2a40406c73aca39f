"""Compile launches for a Hopper GPU, without one, and say what came out.

The interpreter runs much that the compiler refuses, and says nothing of shared memory, registers or the instructions
chosen. Triton must not be interpreting, so this is a process of its own. `TRITON_INTERPRET=0 python hopper.py` prints
the launches of the test as JSON; `... hopper.py PATTERN [FIRST]` one line for each kernel of every launch whose name
fits, candidates included, from the FIRST-th on: all of them take most of an hour.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from apt_kernels.triton import launch
from tests.apt_kernels.triton import hopper_launches

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Hopper:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_in(run: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """By kernel: what it takes of a multiprocessor, and whether it has instructions of interest."""
    found: dict[str, dict[str, Any]] = {}
    launch_it = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch_it(self, *args, grid=grid, warmup=True, **options)
        found[self.fn.__name__] = described(kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch_it
    return found


def described(kernel: Any) -> dict[str, Any]:
    """Of one compiled kernel; `stack` is the bytes of a thread that found no room in registers."""
    ptx = kernel.asm["ptx"]
    registers, stack = resources(kernel.asm["cubin"])
    return {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[ %r[^;]*0x10", ptx)),
        "wide_loads": len(re.findall(r"ld\.global[.:\w]*\.v4", ptx)),
        "loads": ptx.count("ld.global"),
        "fma": "fma." in ptx,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def report(pattern: str, first: int) -> None:
    """One line for each kernel of the exhaustive launches whose names fit."""
    launches = [(name, run) for name, run in hopper_launches.exhaustive() if re.search(pattern, name)]
    for number, (name, run) in enumerate(launches[first:], first):
        try:
            for kernel, facts in compiled_in(run).items():
                print(number, name, kernel, *(f"{key}={value}" for key, value in facts.items()), flush=True)
        except Exception as error:
            print(number, name, "REFUSED", type(error).__name__, error, flush=True)


def main() -> None:
    """See above."""
    driver.set_active(Hopper())
    launch.INTERPRETED = True  # so that tensors on a processor pass for a GPU's
    if len(sys.argv) > 1:
        report(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    else:
        print(json.dumps({name: compiled_in(run) for name, run in hopper_launches.SELECTION.items()}))


if __name__ == "__main__":
    main()

"""Compiles the C++ ops during set-up: `python -m apt_kernels.cpu.build`.

A file that mentions APT_ISA is compiled once per instruction set, and the processor decides at run time which variant
serves: one library serves every machine of an architecture. Files named bindings* alone see torch's headers.

The library lies in $APT_OPS, else in the user's cache folder, under a hash of the sources, the flags and torch's
version: nothing stale is ever loaded, and nothing is compiled twice. The compiler is not in the hash: the machine that
serves may have none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_kernels.cache import cache_folder

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
QUIET = ("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
"""What GCC 12 says about its own vector types and headers."""
KERNEL_FLAGS = (
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast", "-fira-region=one"),
    *QUIET,
)
"""No -ffast-math: infinities and NaN keep their meaning, and sums their order. One region for the register allocator:
with its own choice GCC 12 sends registers of the int8 product's innermost loop through memory, at half the speed."""
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
AVX512_FLAGS = (
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
    "-mprefer-vector-width=512",
)
ISA_FLAGS: dict[str, tuple[str, ...]] = {"portable": ()}
"""By name of the instruction set. The portable variant is linked first, so that it is its copy of an inline function
of the standard library that every other variant shares."""
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}


class BuildError(Exception):
    """The C++ ops could not be compiled; says why."""


@dataclass(frozen=True)
class Unit:
    """One call of the compiler."""

    source: Path
    flags: tuple[str, ...]
    object_name: str


def library_path() -> Path:
    """Where the library of these sources, for this torch, belongs, whether it exists or not."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    settings = (FLAGS, KERNEL_FLAGS, ISA_FLAGS, torch.__version__, platform.machine())
    digest.update(repr(settings).encode())
    return Path(os.environ.get("APT_OPS") or cache_folder() / "ops") / f"ops-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile what is not there yet; returns the library's path.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    library = library_path()
    if library.exists():
        return library
    if shutil.which(_compiler()) is None:
        raise BuildError(f"no C++ compiler ({_compiler()}); on Debian: apt-get install g++")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = Path(folder)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda unit: _compile(unit, objects), units()))
        linked = objects / library.name
        torch_libs = Path(torch.__file__).parent / "lib"
        paths = [str(objects / unit.object_name) for unit in units()]
        libraries = [f"-L{torch_libs}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([_compiler(), "-shared", "-pthread", *paths, "-o", str(linked), *libraries])
        os.replace(linked, library)  # atomic: another process sees all of it or nothing
    return library


def units() -> list[Unit]:
    """Every call of the compiler, the longest first, in the order in which the objects are linked."""
    sources = sorted(SOURCES.glob("*.cpp"))
    bindings = [source for source in sources if source.name.startswith("bindings")]
    kernels = [source for source in sources if "APT_ISA" in source.read_text()]
    common = [source for source in sources if source not in bindings and source not in kernels]
    units = [Unit(source, _torch_flags(), f"{source.stem}.o") for source in bindings]
    units += [Unit(source, (), f"{source.stem}.o") for source in common]
    for isa, flags in ISA_FLAGS.items():
        isa_flags = (*KERNEL_FLAGS, *flags, f"-DAPT_ISA={isa}")
        units += [Unit(source, isa_flags, f"{source.stem}.{isa}.o") for source in kernels]
    return units


def _compile(unit: Unit, folder: Path) -> None:
    _run([_compiler(), *FLAGS, *unit.flags, "-c", str(unit.source), "-o", str(folder / unit.object_name)])


def _torch_flags() -> tuple[str, ...]:
    include = Path(torch.__file__).parent / "include"
    folders = (include, include / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_paths()["include"]))
    return tuple(f"-isystem{folder}" for folder in folders)


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    """Build, and say how it went; a failure is no reason to stop, because the torch ops serve too."""
    started = time.perf_counter()
    try:
        library = build()
    except BuildError as error:
        print(f"The C++ ops were not built; slower torch ops serve instead. {error}", file=sys.stderr)
        return
    print(f"C++ ops: {library} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()

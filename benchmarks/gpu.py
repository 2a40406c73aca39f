"""`python -m benchmarks.gpu`: what there is to measure on a GPU, each part within a time limit, into text files.

The parts: `tune` finds configurations for the Triton kernels, `kernels` measures single ops, `engine` the engine
beside transformers. Each writes PART-DEVICE.txt as it goes, so that what was measured before a limit is there; `tune`
the table of configurations as well. Together they take nine minutes at most, without `tune` six.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from apt_kernels.triton import tuning
from benchmarks.machine import ROOT, device_of

GRACE_SECONDS = 40
"""After its own limit, until a part that has begun its last row is ended."""


@dataclass(frozen=True)
class Part:
    """A benchmark that ends by itself."""

    module: str
    arguments: tuple[str, ...]
    seconds: int
    """After which it begins nothing more."""


PARTS = {
    "tune": Part("benchmarks.kernels.tune", (), 140),
    "kernels": Part("benchmarks.kernels", ("--device", "cuda"), 140),
    "engine": Part("benchmarks.engine", ("--device", "cuda", "--streams", "1", "8", "64", "--output-len", "128"), 140),
}


def run_part(name: str, part: Part, extra: list[str], seconds: int, folder: Path, device: str) -> bool:
    """Run a part, its output on the terminal and in a file; whether it ended well and in time."""
    command = [sys.executable, "-m", part.module, *part.arguments, "--seconds", str(seconds), *extra]
    path = folder / f"{name}-{device}.txt"
    with path.open("w", encoding="utf-8") as file:
        file.write(f"python {' '.join(command[1:])}\n\n")
        file.flush()
        with subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT) as process:
            try:
                code = process.wait(seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
                file.write(f"ended after {seconds + GRACE_SECONDS} s\n")
    print(path.read_text(encoding="utf-8"), flush=True)
    return code == 0


def main() -> None:
    """Run the parts asked for, one after the other."""
    args = _parse()
    args.out.mkdir(parents=True, exist_ok=True)
    name = tuning.device_name(device_of("cuda"))
    failed = [
        part
        for part in args.parts
        if not run_part(part, PARTS[part], args.extra, args.seconds or PARTS[part].seconds, args.out, name)
    ]
    table = tuning.FOLDER / f"{name}.json"
    if "tune" in args.parts and table.exists():
        shutil.copy(table, args.out / table.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["kernels", "engine"], choices=list(PARTS), help="in this order")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the files")
    parser.add_argument("--seconds", type=int, default=0, help="limit of each part; 0: its own")
    parser.add_argument("extra", nargs="*", help="after --: further arguments of the parts")
    return parser.parse_args()


if __name__ == "__main__":
    main()

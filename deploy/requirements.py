"""What an image installs: `python requirements.py cpu|cuda` writes requirements.txt and constraints.txt beside itself.

The versions are those of constraints/cpu.txt, but for Triton's. Nothing uses it on a processor, where it would be a
third of the image; on a GPU torch requires the version it was built with.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

DEVICES = ("cpu", "cuda")


def requirements(pyproject: str, device: str) -> list[str]:
    """Of the server, without the project itself, so that they can be installed before its code is there."""
    project = tomllib.loads(pyproject)["project"]
    found = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    return found if device == "cuda" else _without_triton(found)


def constraints(pins: str) -> list[str]:
    """Exact versions for either device."""
    return _without_triton(pins.splitlines())


def _without_triton(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not re.match(r"triton\b", line)]


def main() -> None:
    """Write both files into the folder of this one."""
    if sys.argv[1:] not in [[device] for device in DEVICES]:
        sys.exit(f"usage: requirements.py {'|'.join(DEVICES)}")
    folder = Path(__file__).parent
    lines = {
        "requirements.txt": requirements((folder / "pyproject.toml").read_text(encoding="utf-8"), sys.argv[1]),
        "constraints.txt": constraints((folder / "cpu.txt").read_text(encoding="utf-8")),
    }
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

